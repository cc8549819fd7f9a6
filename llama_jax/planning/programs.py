"""The programs that a workload runs, as jitted functions with abstract arguments.

They are the functions that training and generation call. Their arguments are shapes,
dtypes and shardings only, so their devices need not be present.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Lowered
from jaxtyping import DTypeLike

from llama_jax.data.batch import Batch
from llama_jax.generation.decode import prefill
from llama_jax.generation.lanes import Lanes, advance, empty_lanes
from llama_jax.kernels.selection import (
    AttentionCall,
    Implementation,
    select,
    unsupported,
)
from llama_jax.model.cache import cache_shardings, init_cache
from llama_jax.model.lora import Lora, lora_shapes
from llama_jax.model.quantize import quantized_shapes
from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.params import param_shapes
from llama_jax.planning.workload import Workload
from llama_jax.runtime import Runtime
from llama_jax.sharding import activation_spec, weight_shardings
from llama_jax.train.losses import trained_loss
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import state_shapes
from llama_jax.train.step import make_train_step
from llama_jax.types import Mesh, PyTree

Tree: TypeAlias = PyTree[jax.ShapeDtypeStruct]


@runtime_checkable
class Lowerable(Protocol):
    """A jitted function or a training step."""

    def lower(self, *arguments: Any, **options: Any) -> Lowered:
        """Trace and lower it for these arguments."""
        ...


class Program(NamedTuple):
    """A jitted function and its abstract arguments.

    Attributes:
      function: to be lowered.
      arguments: pytrees of `jax.ShapeDtypeStruct`s with shardings.
      options: static arguments by name.
      kinds: the arrays among the arguments by kind: "weights", "optimizer", "cache"
        and "batch" (tokens, settings, counters).
      attention: the attention implementation that it calls.
      mesh: sizes by axis.
    """

    function: Lowerable
    arguments: tuple[object, ...]
    options: Mapping[str, int]
    kinds: Mapping[str, Tree]
    attention: Implementation
    mesh: Mapping[str, int]

    def lower(self) -> Lowered:
        """Trace and lower it."""
        lowered: Lowered = self.function.lower(*self.arguments, **self.options)
        return lowered


def make_program(
    work: Workload, mesh: Mesh, *, attention: Implementation | None = None
) -> Program:
    """Make the program of a workload.

    Args:
      work: the workload.
      mesh: its devices need not be present.
      attention: the implementation; by default what "auto" selects on these devices.

    Raises:
      MeshError: the mesh does not divide the model.
    """
    runtime = Runtime(
        dtype=work.dtype,
        param_dtype=work.param_dtype if work.task == "train" else work.dtype,
        cache_dtype=work.cache_dtype,
        attention=attention or choose_attention(work, mesh.devices.flat[0]),
        layer_layout="stacked" if work.trains else "unrolled",
        remat=work.remat if work.trains else "none",
        rules=work.rules,
    )
    model = Llama(work.config, runtime, mesh)
    make: Callable[[Workload, Llama, Mesh], Program] = {
        "train": _train,
        "lora": _train,
        "qlora": _train,
        "prefill": _prefill,
        "decode": _decode,
    }[work.task]
    return make(work, model, mesh)


def choose_attention(work: Workload, device: jax.Device) -> Implementation:
    """Choose the attention implementation for a device that need not be present.

    As "auto" does on CPUs and TPUs. On GPUs: Mosaic's kernel for many queries on a
    Hopper, else plain XLA, since cuDNN compiles only where its library is installed.
    """
    queries = work.queries
    call = AttentionCall(
        dtype=work.dtype,
        head_dim=work.config.head_dim,
        queries=queries,
        slots=work.seq,
        group=work.config.num_heads // work.config.num_kv_heads,
        cached=work.task == "decode",
        quantized=work.task == "decode" and work.cache_dtype == "int8",
    )
    if device.platform not in ("gpu", "cuda"):
        return select(call, device).implementation
    hopper = getattr(device, "compute_capability", "") == "9.0"
    fits = hopper and queries > 1 and unsupported("mosaic_gpu", call) is None
    return "mosaic_gpu" if fits else "xla"


def _train(work: Workload, model: Llama, mesh: Mesh) -> Program:
    trained, frozen, lora = _weights(work, model, mesh), {}, None
    if work.task != "train":
        lora = Lora(rank=work.rank, alpha=float(work.rank))
        shapes = lora_shapes(work.config, lora, dtype=work.param_dtype)
        trained, frozen = shard_weights(shapes, model, mesh), trained
    optimizer = make_optimizer(make_schedule("cosine", 3e-4, steps=1000, warmup=10))
    state = state_shapes(trained, optimizer, mesh)
    ids, mask = _tokens(work, mesh), _tokens(work, mesh, jnp.float32)
    batch = Batch(ids, ids, mask, ids, ids)
    kinds = {"weights": (state.params, frozen), "optimizer": state.opt_state}
    kinds["batch"] = batch
    step = make_train_step(trained_loss(model, lora=lora), optimizer)
    return _program(model, mesh, step, (state, frozen, batch), kinds)


def _tokens(work: Workload, mesh: Mesh, dtype: DTypeLike = jnp.int32) -> Tree:
    """An array `[B, T]`, split as training and prefill split it."""
    shape = (work.batch, work.seq)
    sharding = NamedSharding(mesh, activation_spec(shape, "B T", work.rules, mesh))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _prefill(work: Workload, model: Llama, mesh: Mesh) -> Program:
    params, tokens = _weights(work, model, mesh), _tokens(work, mesh)
    lengths = _replicate(jax.ShapeDtypeStruct((work.batch,), jnp.int32), mesh)
    kinds = {"weights": params, "batch": (tokens, lengths)}
    arguments = (model, params, tokens, lengths)
    return _program(model, mesh, prefill, arguments, kinds, num_slots=work.seq)


def _decode(work: Workload, model: Llama, mesh: Mesh) -> Program:
    return decode_program(work, model, mesh, _weights(work, model, mesh))


def decode_program(work: Workload, model: Llama, mesh: Mesh, params: Tree) -> Program:
    """Make the program of a decoding step with these weights."""
    config, batch, slots = work.config, work.batch, work.seq

    def make_lanes() -> Lanes:
        cache = init_cache(config, batch, slots, model.runtime.slot_dtype)
        return empty_lanes(cache, config.vocab_size)

    lanes = jax.eval_shape(make_lanes)
    shardings = cache_shardings(config, model.runtime, mesh, batch, slots)
    cache = jax.tree.map(_with_sharding, lanes.cache, shardings)
    lanes = _replicate(lanes, mesh)._replace(cache=cache)
    steps = _replicate(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    kinds = {"weights": params, "cache": cache}
    kinds["batch"] = (lanes._replace(cache=()), steps)
    arguments = (model, params, lanes, steps)
    return _program(model, mesh, advance, arguments, kinds)


def _weights(work: Workload, model: Llama, mesh: Mesh) -> Tree:
    """The model's weights, quantized if the workload says so."""
    runtime = model.runtime
    if work.quantize == "none":
        dtype = jnp.dtype(runtime.weight_dtype)
        shapes = param_shapes(work.config, runtime.layer_layout, dtype=dtype)
    else:
        shapes = quantized_shapes(work.config, runtime, work.quantize)
    return shard_weights(shapes, model, mesh)


def shard_weights(shapes: Tree, model: Llama | ScalarModel, mesh: Mesh) -> Tree:
    """Shapes of weights or adapters with the shardings that a model gives them."""
    shardings = weight_shardings(shapes, model.config, model.runtime, mesh)
    return jax.tree.map(_with_sharding, shapes, shardings)


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Tree:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _replicate(tree: Tree, mesh: Mesh) -> Tree:
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _with_sharding(leaf, replicated), tree)


def _program(
    model: Llama,
    mesh: Mesh,
    function: Lowerable,
    arguments: tuple[object, ...],
    kinds: Mapping[str, Tree],
    **options: int,
) -> Program:
    sizes = {str(axis): size for axis, size in mesh.shape.items()}
    attention = model.runtime.attention
    return Program(function, arguments, options, kinds, attention, sizes)


def shard_bytes(tree: Tree) -> int:
    """Bytes of sharded arrays on one device, without the padding of layouts.

    Args:
      tree: arrays or shapes with shardings. Two four-bit numbers take one byte.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def _bits(dtype: DTypeLike) -> int:
    four_bits = jnp.dtype(dtype).name in ("int4", "uint4")
    return 4 if four_bits else 8 * jnp.dtype(dtype).itemsize
