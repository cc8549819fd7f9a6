"""Compiled programs, and what in them moves whole weights or cache layers about."""

import collections
import importlib.util
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from llama_jax.config import LlamaConfig
from llama_jax.generation import decode as decoding
from llama_jax.generation.sampling import Sampling, sampling_rows
from llama_jax.kernels import Implementation
from llama_jax.model.transformer import Llama
from llama_jax.params import param_shapes
from llama_jax.runtime import CacheDType, DType, Runtime

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed",
)

_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%?[\w.-]+ = \(?\w+\[([0-9,]*)\]\S*.*? ([a-z-]+)\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*{$")
_CALLED = re.compile(r"calls=%?([\w.-]+)")

# These name bytes that are there already, or write a part of them in place. On TPUs the
# asynchronous ones (and the custom call that joins their pieces) fetch what comes next
# into the chip's fast memory, which is the streaming that we want.
_IN_PLACE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "dynamic-update-slice", "copy-start", "copy-done", "slice-start", "slice-done",
    "async-start", "async-done", "custom-call",
}  # fmt: skip


LEAST_MEMORY = (
    {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    if jax.__version_info__ < (0, 12)
    else None
)
"""Compiler options under which a CPU that generates widens no weight before its turn.

That of jax 0.12 does not anyway; older ones want to be told so in XLA_FLAGS.
"""


def whole_results(text: str, sizes: Iterable[int]) -> collections.Counter[str]:
    """Operations whose result is computed anew and has one of these many elements.

    Args:
      text: an optimized program.
      sizes: numbers of elements, of weights and cache layers for example.

    Returns:
      How often each operation occurs, by name and shape; a fusion counts as what its
      root is, and what happens inside it does not count.
    """
    wanted = set(sizes)
    fused = set(_CALLED.findall(text))
    roots: dict[str, str] = {}
    found: list[tuple[str, str, str | None]] = []
    inside = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            inside = header[1]
        if not (match := _INSTRUCTION.match(line)):
            continue
        root, dims, operation = match.groups()
        if root:
            roots[inside] = operation
        size = math.prod(int(dim) for dim in dims.split(",") if dim)
        if inside not in fused and size in wanted:
            called = _CALLED.search(line) if operation == "fusion" else None
            found.append((operation, dims, called[1] if called else None))
    counts: collections.Counter[str] = collections.Counter()
    for operation, dims, called in found:
        if called is not None and roots[called] == "dynamic-update-slice":
            continue
        if operation not in _IN_PLACE:
            name = f"fusion({roots[called]})" if called else operation
            counts[f"{name} [{dims}]"] += 1
    return counts


def compile_decoding(
    program: str,
    config: LlamaConfig,
    *,
    batch: int,
    slots: int,
    dtype: DType = "float32",
    device: Any = None,
    attention: Implementation = "auto",
    cache_dtype: CacheDType | None = None,
) -> Any:
    """`decoding.decode_step` or `decoding.advance`, compiled from shapes alone."""
    runtime = Runtime(dtype=dtype, attention=attention, cache_dtype=cache_dtype)
    model = Llama(config, runtime)
    place = None if device is None else SingleDeviceSharding(device)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
        )

    def ids(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)

    params = placed(param_shapes(config, dtype=jnp.dtype(dtype)))
    greedy = [Sampling(temperature=0)] * batch
    rows = placed(jax.eval_shape(lambda: sampling_rows(greedy, config.vocab_size)))
    lanes, _, _ = jax.eval_shape(
        lambda *arguments: decoding.start(model, *arguments, num_slots=slots),
        *(params, ids(batch, 16), ids(batch), rows, ids(batch, 8), ids(batch)),
    )
    lanes = placed(lanes)
    if program == "decode_step":
        lowered = decoding.decode_step.lower(model, params, lanes.cache, ids(batch))
    else:
        lowered = decoding.advance.lower(model, params, lanes, ids())
    return lowered.compile()


def weight_sizes(config: LlamaConfig) -> set[int]:
    """Elements of each kind of projection, the embedding and the head."""
    leaves = jax.tree.leaves(param_shapes(config))
    return {math.prod(leaf.shape) for leaf in leaves if len(leaf.shape) > 1}


def cache_layer_size(config: LlamaConfig, batch: int, slots: int) -> int:
    """Elements of one layer's keys (its values are as many)."""
    return batch * config.num_kv_heads * slots * config.head_dim
