"""The tables at work: our leaves from a foreign checkpoint's tensors, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.config import LlamaConfig
from llama_jax.conversion.axis_patterns import axes_shape, is_plain, rearrange, reverse
from llama_jax.conversion.tensor_tables import ORBAX, Format, Rule
from llama_jax.errors import CheckpointError
from llama_jax.params import axis_sizes, leaf_paths, row_of


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
      form: the table.
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

    return {
        path: _moved(rule.pattern, tensors[name], sizes, where, name, dtype)
        for path, rule, name in _rows(form, config)
    }


def export(
    form: Format, leaves: Mapping[str, LazyLeaf], config: LlamaConfig
) -> dict[str, LazyLeaf]:
    """The tensors of a foreign checkpoint, made from our leaves when they are wanted.

    In the table's order, layer by layer; all of `leaf_paths(config)` must be there.

    Raises:
      ConfigError: the model has a scalar head, which foreign formats lack.
    """
    if form is not ORBAX:
        config.check_head("lm", f"export to {form.name}")
    sizes = pattern_sizes(config)
    tensors = {
        name: _moved(reverse(rule.pattern), leaves[path], sizes, "the model", name)
        for path, rule, name in _rows(form, config)
    }
    if config.tied_embeddings and not form.can_tie:
        by_row = {rule.target: rule for rule in form.rules}
        embedding = by_row["transformer/embedding"].source
        tensors[by_row["lm_head"].source] = tensors[embedding]
    return tensors


def rule_of(form: Format, name: str) -> Rule:
    """The row that a foreign name belongs to."""
    spelled = ".".join("{l}" if part.isdecimal() else part for part in name.split("."))
    return next(rule for rule in form.rules if rule.source in (name, spelled))


def _moved(
    pattern: str,
    tensor: LazyLeaf,
    sizes: Mapping[str, int],
    where: Any,
    name: str,
    dtype: Any = None,
) -> LazyLeaf:
    """A tensor with its axes moved, and cast, when it is read."""
    kind = tensor.dtype if dtype is None else np.dtype(dtype)
    shape = axes_shape(pattern.split(" -> ")[1], sizes)

    def read() -> np.ndarray:
        with np.errstate(over="ignore"):  # looked for below
            array = rearrange(pattern, tensor.read(), sizes, kind)
        if kind == np.float16 and tensor.dtype != kind:
            _check_finite(array, name, where)
        return array

    moved = LazyLeaf(shape, kind, read)
    copied = 0 if is_plain(pattern) and kind == tensor.dtype else moved.nbytes
    return moved.with_host_bytes(tensor.host_bytes + copied)


def source_shapes(form: Format, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a checkpoint of this kind must hold."""
    sizes = pattern_sizes(config)
    return {
        name: axes_shape(rule.pattern.split(" -> ")[0], sizes)
        for _, rule, name in _rows(form, config)
    }


def foreign_names(form: Format, config: LlamaConfig) -> list[str]:
    """The foreign name of each of our leaves, in the order of `leaf_paths`."""
    return [name for _, _, name in _rows(form, config)]


def _rows(form: Format, config: LlamaConfig) -> list[tuple[str, Rule, str]]:
    """Each of our leaves with its rule and its foreign name."""
    by_target = {rule.target: rule for rule in form.rules}
    rows = []
    for path in leaf_paths(config):
        row, layer = row_of(path)
        rule = by_target[row]
        rows.append((path, rule, rule.source.format(l=layer)))
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
