"""Compiled programs, and which of their operations copy whole weights or caches."""

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
from llama_jax.generation import lanes as lanes_module
from llama_jax.generation.decode import decode_step
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

# These alias existing arrays, or write a part of them in place. The asynchronous ones
# (and the custom call that joins their parts) prefetch arrays into the fast memory of a
# TPU, which is intended.
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
"""Compiler options with which a CPU dequantizes a weight only when it is used.

The default of jax 0.12; with older versions users set it in XLA_FLAGS.
"""


def whole_results(text: str, sizes: Iterable[int]) -> collections.Counter[str]:
    """Count operations that write a new array with one of these numbers of elements.

    Args:
      text: an optimized program.
      sizes: numbers of elements, such as those of weights and cache layers.

    Returns:
      Number of occurrences of each operation, by name and shape; a fusion counts as its
      root, and operations inside it do not count.
    """
    sizes = set(sizes)
    fused = set(_CALLED.findall(text))
    roots: dict[str, str] = {}
    results: list[tuple[str, str, str | None]] = []
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
        if inside not in fused and size in sizes:
            called = _CALLED.search(line) if operation == "fusion" else None
            results.append((operation, dims, called[1] if called else None))
    counts: collections.Counter[str] = collections.Counter()
    for operation, dims, called in results:
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
    """Compile `decode_step` or `lanes_module.advance` from shapes."""
    runtime = Runtime(dtype=dtype, attention=attention, cache_dtype=cache_dtype)
    model = Llama(config, runtime)
    sharding = None if device is None else SingleDeviceSharding(device)

    def shapes(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def ids(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    params = shapes(param_shapes(config, dtype=jnp.dtype(dtype)))
    greedy = [Sampling(temperature=0)] * batch
    rows = shapes(jax.eval_shape(lambda: sampling_rows(greedy, config.vocab_size)))
    lanes, _, _ = jax.eval_shape(
        lambda *arguments: lanes_module.start(model, *arguments, num_slots=slots),
        *(params, ids(batch, 16), ids(batch), rows, ids(batch, 8), ids(batch)),
    )
    lanes = shapes(lanes)
    if program == "decode_step":
        lowered = decode_step.lower(model, params, lanes.cache, ids(batch))
    else:
        lowered = lanes_module.advance.lower(model, params, lanes, ids())
    return lowered.compile()


def weight_sizes(config: LlamaConfig) -> set[int]:
    """Numbers of elements of the projections, the embedding and the head."""
    leaves = jax.tree.leaves(param_shapes(config))
    return {math.prod(leaf.shape) for leaf in leaves if len(leaf.shape) > 1}


def cache_layer_size(config: LlamaConfig, batch: int, slots: int) -> int:
    """Number of elements of one layer's keys, or of its values."""
    return batch * config.num_kv_heads * slots * config.head_dim
