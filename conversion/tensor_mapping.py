"""Apply a table: our leaves from a foreign checkpoint's tensors, and back."""

from collections.abc import Iterator, Mapping

import numpy as np

from llama_jax.checkpoint.finite import check_cast
from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.config import LlamaConfig
from llama_jax.conversion.axis_patterns import (
    axes_shape,
    moves_nothing,
    rearrange,
    reverse,
)
from llama_jax.conversion.tensor_tables import ORBAX, Format, Rule
from llama_jax.errors import CheckpointError
from llama_jax.params import axis_sizes, leaf_paths, row_of


def pattern_sizes(config: LlamaConfig) -> dict[str, int]:
    """Return the length of every axis name of the patterns."""
    return axis_sizes(config) | {
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "h": config.head_dim // 2,
        "two": 2,
        "S": config.max_seq_len,
    }


def leaves_from_tensors(
    format: Format,
    tensors: Mapping[str, LazyLeaf],
    config: LlamaConfig,
    *,
    where: object,
    dtype: np.dtype | None = None,
) -> dict[str, LazyLeaf]:
    """Return our leaves as lazy views of a foreign checkpoint's tensors.

    Checks that every tensor is used once, every leaf is filled and every shape is
    right. Reads no weights.

    Args:
      format: table of the checkpoint's format.
      tensors: all tensors of the checkpoint, by foreign name.
      config: of the checkpoint.
      where: its path, for messages.
      dtype: of the leaves; defaults to that of each tensor.

    Returns:
      One leaf per layer and weight, in the order of `leaf_paths`.

    Raises:
      CheckpointError: a tensor is missing, unknown or of the wrong shape.
    """
    if config.num_layers > len(tensors):
        raise CheckpointError(
            f"{where}: the configuration has {config.num_layers} layers, but there are "
            f"only {len(tensors)} tensors; download all files of the checkpoint"
        )
    sizes = pattern_sizes(config)
    expected = source_shapes(format, config)
    dropped = _dropped_shapes(format, config)
    if unknown := sorted(tensors.keys() - expected.keys() - dropped.keys()):
        raise CheckpointError(
            f"{where}: tensors {_first_names(unknown)} are not part of a {format.name} "
            "checkpoint with this configuration; is it another kind of model?"
        )
    if missing := [name for name in expected if name not in tensors]:
        raise CheckpointError(
            f"{where}: lacks {_first_names(missing)}; download all files of the "
            "checkpoint"
        )
    for name, tensor in tensors.items():
        shape = expected.get(name) or dropped[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{where}: {name} has the shape {list(tensor.shape)}, but the "
                f"configuration requires {list(shape)}; do the two belong together?"
            )
    return {
        path: _rearranged(rule.pattern, tensors[name], sizes, where, name, dtype)
        for path, rule, name in _leaf_rules(format, config)
    }


def tensors_from_leaves(
    format: Format, leaves: Mapping[str, LazyLeaf], config: LlamaConfig
) -> dict[str, LazyLeaf]:
    """Return the tensors of a foreign checkpoint as lazy views of our leaves.

    Args:
      format: table of the target format.
      leaves: all of `leaf_paths(config)`.
      config: of the model.

    Returns:
      Tensors by foreign name, in the table's order, layer by layer.

    Raises:
      ConfigError: the model has a scalar head, which foreign formats lack.
    """
    if format is not ORBAX:
        config.check_head("lm", f"export to {format.name}")
    sizes = pattern_sizes(config)
    tensors = {
        name: _rearranged(reverse(rule.pattern), leaves[path], sizes, "the model", name)
        for path, rule, name in _leaf_rules(format, config)
    }
    if config.tied_embeddings and not format.can_tie:
        names = {rule.row: rule.foreign_name for rule in format.rules}
        tensors[names["lm_head"]] = tensors[names["transformer/embedding"]]
    return tensors


def rule_of(format: Format, name: str) -> Rule:
    """Return the rule of a foreign tensor name."""
    template = ".".join("{l}" if part.isdecimal() else part for part in name.split("."))
    return next(rule for rule in format.rules if rule.foreign_name in (name, template))


def source_shapes(format: Format, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a checkpoint must contain."""
    sizes = pattern_sizes(config)
    return {
        name: axes_shape(rule.pattern.split(" -> ")[0], sizes)
        for _, rule, name in _leaf_rules(format, config)
    }


def foreign_names(format: Format, config: LlamaConfig) -> list[str]:
    """Return the foreign name of each of our leaves, in the order of `leaf_paths`."""
    return [name for _, _, name in _leaf_rules(format, config)]


def _leaf_rules(format: Format, config: LlamaConfig) -> Iterator[tuple[str, Rule, str]]:
    """Yield path, rule and foreign name of each of our leaves."""
    rules = {rule.row: rule for rule in format.rules}
    for path in leaf_paths(config):
        row, layer = row_of(path)
        yield path, rules[row], rules[row].foreign_name.format(l=layer)


def _rearranged(
    pattern: str,
    tensor: LazyLeaf,
    sizes: Mapping[str, int],
    where: object,
    name: str,
    dtype: np.dtype | None = None,
) -> LazyLeaf:
    """Return a leaf that moves the axes of another one, and casts it, when read."""
    dtype = tensor.dtype if dtype is None else dtype
    shape = axes_shape(pattern.split(" -> ")[1], sizes)

    def read() -> np.ndarray:
        with np.errstate(over="ignore"):  # checked below
            array = rearrange(pattern, tensor.read(), sizes, dtype)
        if dtype not in (tensor.dtype, np.float32):
            check_cast(array, where, name)
        return array

    leaf = LazyLeaf(shape, dtype, read)
    is_view = moves_nothing(pattern) and dtype == tensor.dtype
    return leaf.with_host_bytes(tensor.host_bytes + (0 if is_view else leaf.nbytes))


def _dropped_shapes(format: Format, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    sizes = pattern_sizes(config)
    return {
        name.format(l=layer): axes_shape(axes, sizes)
        for name, axes in format.dropped
        for layer in range(config.num_layers if "{l}" in name else 1)
    }


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
