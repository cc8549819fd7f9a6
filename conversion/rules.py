"""One table per foreign format: which tensor goes where, and how its axes move.

The change of layout is in the row, as a pattern (see `patterns.py`). Read forwards
the rows convert, read backwards they export.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.conversion.patterns import axes_shape, rearrange
from llama_jax.errors import CheckpointError
from llama_jax.leaves import LazyLeaf
from llama_jax.params import axis_sizes, leaf_paths


class Rule(NamedTuple):
    """Where one kind of weight comes from.

    Attributes:
      target: our path, with `{l}` for the layer.
      source: the foreign name, with `{l}` for the layer.
      pattern: from the foreign axes to ours.
      split: the foreign axis that model-parallel ranks divide; none: each has all.
    """

    target: str
    source: str
    pattern: str
    split: int | None = None


class Format(NamedTuple):
    """A foreign format: its rules, and what it holds that is no parameter."""

    name: str
    rules: tuple[Rule, ...]
    dropped: tuple[tuple[str, str], ...]
    """Source name (with `{l}`) and axes of tensors that are checked and left out."""


META = Format(
    "Meta",
    (
        Rule("transformer/embedding", "tok_embeddings.weight", "V D -> V D", 1),
        Rule(
            "transformer/layers/{l}/attention_norm/scale",
            "layers.{l}.attention_norm.weight",
            "D -> D",
        ),
        Rule(
            "transformer/layers/{l}/attention/q_proj",
            "layers.{l}.attention.wq.weight",
            "(N h two) D -> D (N two h)",
            0,
        ),
        Rule(
            "transformer/layers/{l}/attention/k_proj",
            "layers.{l}.attention.wk.weight",
            "(K h two) D -> D (K two h)",
            0,
        ),
        Rule(
            "transformer/layers/{l}/attention/v_proj",
            "layers.{l}.attention.wv.weight",
            "KH D -> D KH",
            0,
        ),
        Rule(
            "transformer/layers/{l}/attention/o_proj",
            "layers.{l}.attention.wo.weight",
            "D NH -> NH D",
            1,
        ),
        Rule(
            "transformer/layers/{l}/mlp_norm/scale",
            "layers.{l}.ffn_norm.weight",
            "D -> D",
        ),
        Rule(
            "transformer/layers/{l}/mlp/gate_proj",
            "layers.{l}.feed_forward.w1.weight",
            "F D -> D F",
            0,
        ),
        Rule(
            "transformer/layers/{l}/mlp/up_proj",
            "layers.{l}.feed_forward.w3.weight",
            "F D -> D F",
            0,
        ),
        Rule(
            "transformer/layers/{l}/mlp/down_proj",
            "layers.{l}.feed_forward.w2.weight",
            "D F -> F D",
            1,
        ),
        Rule("transformer/final_norm/scale", "norm.weight", "D -> D"),
        Rule("lm_head", "output.weight", "V D -> D V", 0),
    ),
    dropped=(
        ("rope.freqs", "h"),
        ("layers.{l}.attention.inner_attention.rope.freqs", "h"),
    ),
)

# On disk these lie kind by kind, stacked over the layers; see `llama2c.py`.
LLAMA2C = Format(
    "llama2.c",
    (
        Rule("transformer/embedding", "token_embedding", "V D -> V D"),
        Rule("transformer/layers/{l}/attention_norm/scale", "rms_att.{l}", "D -> D"),
        Rule(
            "transformer/layers/{l}/attention/q_proj",
            "wq.{l}",
            "(N h two) D -> D (N two h)",
        ),
        Rule(
            "transformer/layers/{l}/attention/k_proj",
            "wk.{l}",
            "(K h two) D -> D (K two h)",
        ),
        Rule("transformer/layers/{l}/attention/v_proj", "wv.{l}", "KH D -> D KH"),
        Rule("transformer/layers/{l}/attention/o_proj", "wo.{l}", "D NH -> NH D"),
        Rule("transformer/layers/{l}/mlp_norm/scale", "rms_ffn.{l}", "D -> D"),
        Rule("transformer/layers/{l}/mlp/gate_proj", "w1.{l}", "F D -> D F"),
        Rule("transformer/layers/{l}/mlp/up_proj", "w3.{l}", "F D -> D F"),
        Rule("transformer/layers/{l}/mlp/down_proj", "w2.{l}", "D F -> F D"),
        Rule("transformer/final_norm/scale", "rms_final", "D -> D"),
        Rule("lm_head", "wcls", "V D -> D V"),
    ),
    dropped=(("freq_cis_real", "S h"), ("freq_cis_imag", "S h")),
)


def pattern_sizes(config: LlamaConfig) -> dict[str, int]:
    """The length of every axis name that a pattern may use."""
    return axis_sizes(config) | {
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim // 2,
        "two": 2,
        "S": config.max_seq_len,
    }


def plan(
    form: Format,
    tensors: Mapping[str, LazyLeaf],
    config: LlamaConfig,
    *,
    where: Any,
    dtype: Any = None,
) -> dict[str, LazyLeaf]:
    """Our leaves, read from a foreign checkpoint's tensors when they are wanted.

    Every tensor is used once, every leaf filled, every shape compared; no weight is
    read here.

    Args:
      form: the rules.
      tensors: what the checkpoint holds, by its own names.
      config: what the checkpoint says it is.
      where: its path, for messages.
      dtype: of the leaves; the tensors' own where not given.

    Raises:
      CheckpointError: a tensor is missing, unknown or of the wrong shape.
    """
    if config.num_layers > len(tensors):
        raise CheckpointError(
            f"{where}: the configuration has {config.num_layers} layers, but there are "
            f"only {len(tensors)} tensors; is every file of the checkpoint here?"
        )
    sizes = pattern_sizes(config)
    sources = source_shapes(form, config)
    dropped = _dropped_shapes(form, config)
    if unknown := sorted(tensors.keys() - sources.keys() - dropped.keys()):
        raise CheckpointError(
            f"{where}: holds tensors that a {form.name} checkpoint of this "
            f"configuration does not have: {_some(unknown)}; is it another kind of "
            "model?"
        )
    if missing := [name for name in sources if name not in tensors]:
        raise CheckpointError(
            f"{where}: lacks {_some(missing)}; is every file of the checkpoint here?"
        )
    for name, tensor in tensors.items():
        wanted = sources.get(name) or dropped[name]
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{where}: {name} has the shape {list(tensor.shape)}, but the "
                f"configuration makes it {list(wanted)}; do the two belong together?"
            )

    def leaf(rule: Rule, tensor: LazyLeaf) -> LazyLeaf:
        kind = tensor.dtype if dtype is None else np.dtype(dtype)
        shape = axes_shape(rule.pattern.split(" -> ")[1], sizes)

        def read() -> np.ndarray:
            with np.errstate(over="ignore"):  # looked for below
                array = rearrange(rule.pattern, tensor.read(), sizes, kind)
            if kind == np.float16 and tensor.dtype != kind:
                _check_finite(array, rule.source, where)
            return array

        return LazyLeaf(shape, kind, read)

    return {
        path: leaf(rule, tensors[rule.source.format(l=layer)])
        for path, rule, layer in _rows(form, config)
    }


def source_shapes(form: Format, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a checkpoint of this kind must hold."""
    sizes = pattern_sizes(config)
    return {
        rule.source.format(l=layer): axes_shape(rule.pattern.split(" -> ")[0], sizes)
        for _, rule, layer in _rows(form, config)
    }


def _rows(form: Format, config: LlamaConfig) -> list[tuple[str, Rule, str]]:
    """Each of our leaves with its rule and its layer's number ("" where none)."""
    by_target = {rule.target: rule for rule in form.rules}
    rows = []
    for path in leaf_paths(config):
        layer = re.search(r"/(\d+)/", path)
        number = layer[1] if layer else ""
        target = re.sub(r"/\d+/", "/{l}/", path)
        rows.append((path, by_target[target], number))
    return rows


def _dropped_shapes(form: Format, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    sizes = pattern_sizes(config)
    return {
        name.format(l=layer): axes_shape(axes, sizes)
        for name, axes in form.dropped
        for layer in range(config.num_layers if "{l}" in name else 1)
    }


def _check_finite(array: np.ndarray, name: str, where: Any) -> None:
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{where}: {name} does not fit into float16, whose largest number is "
            "65504; convert to bfloat16 or float32"
        )


def _some(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
