"""The programs that a workload runs, as jitted functions and what they take.

They are the very functions that training and generation call; of their arguments only
shapes, dtypes and placements are made, so that devices need not exist.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from llama_jax.data.batch import Batch
from llama_jax.generation import decode as decoding
from llama_jax.generation.sampling import Sampling, sampling_rows
from llama_jax.kernels.dispatch import Asked, Implementation, choose, refusal
from llama_jax.model.lora import Lora, adapt, lora_shapes
from llama_jax.model.quantize import quantized_shapes
from llama_jax.model.transformer import Llama
from llama_jax.params import param_shapes
from llama_jax.planning.memory import Workload
from llama_jax.runtime import Runtime
from llama_jax.sharding import cache_shardings, divisible, weight_shardings
from llama_jax.train.loss import LossSums, next_token_loss
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import state_shapes
from llama_jax.train.step import make_train_step
from llama_jax.types import Mesh

_STOP_IDS = 8


class Program(NamedTuple):
    """A jitted function and its arguments, which may be of devices that are not there.

    Attributes:
      function: jitted.
      arguments: `jax.ShapeDtypeStruct`s, placed on the mesh.
      options: static arguments by name.
      kinds: the arrays among the arguments by kind: "weights", "optimizer", "cache"
        and "batch" (tokens, settings, counters).
      attention: the implementation that it calls.
      mesh: sizes by axis.
    """

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    kinds: dict[str, Any]
    attention: Implementation
    mesh: dict[str, int]

    def lower(self) -> Any:
        """The program before it is compiled."""
        return self.function.lower(*self.arguments, **self.options)


def program(
    work: Workload, mesh: Mesh, *, attention: Implementation | None = None
) -> Program:
    """What runs this work on a mesh, whose devices need not be there.

    Args:
      work: what is run.
      mesh: where.
      attention: the implementation; what `"auto"` takes on such a device if not given.

    Raises:
      MeshError: the mesh does not divide the model.
    """
    chosen = attention or attention_of(work, mesh.devices.flat[0])
    runtime = Runtime(
        dtype=work.dtype,
        param_dtype=work.param_dtype if work.task == "train" else work.dtype,
        cache_dtype=work.cache_dtype,
        attention=chosen,
        layer_layout="stacked" if work.trains else "unrolled",
        remat=work.remat if work.trains else "none",
        rules=work.rules,
    )
    model = Llama(work.config, runtime, mesh)
    build: Callable[..., Program] = {
        "train": _train,
        "lora": _tune,
        "qlora": _tune,
        "prefill": _prefill,
        "decode": _decode,
    }[work.task]
    return build(work, model, mesh)


def attention_of(work: Workload, device: Any) -> Implementation:
    """What attention runs on a device that need not be there.

    As `"auto"` has it; on GPUs Mosaic's kernel where many queries meet, if the GPU is a
    Hopper, since cuDNN compiles only where its library is; else plain XLA.
    """
    queries = 1 if work.task == "decode" else work.seq
    asked = Asked(
        dtype=work.dtype,
        head_dim=work.config.head_dim,
        queries=queries,
        slots=work.seq,
        group=work.config.num_heads // work.config.num_kv_heads,
        cached=work.task == "decode",
        quantized=work.task == "decode" and work.cache_dtype == "int8",
    )
    if device.platform not in ("gpu", "cuda"):
        return choose(asked, device).implementation
    hopper = getattr(device, "compute_capability", "") == "9.0"
    fits = hopper and queries > 1 and refusal("mosaic_gpu", asked) is None
    return "mosaic_gpu" if fits else "xla"


def _train(work: Workload, model: Llama, mesh: Mesh) -> Program:
    def loss(params: Any, _: Any, batch: Batch) -> LossSums:
        return next_token_loss(model, params, batch)

    return _step(work, model, mesh, loss, _weights(work, model, mesh), {})


def _tune(work: Workload, model: Llama, mesh: Mesh) -> Program:
    lora = Lora(rank=work.rank, alpha=float(work.rank))

    def loss(adapters: Any, frozen: Any, batch: Batch) -> LossSums:
        return next_token_loss(model, adapt(frozen, adapters, lora.scaling), batch)

    shapes = lora_shapes(work.config, lora, dtype=work.param_dtype)
    adapters = _on_mesh(shapes, model, mesh)
    return _step(work, model, mesh, loss, adapters, _weights(work, model, mesh))


def _step(
    work: Workload, model: Llama, mesh: Mesh, loss: Any, trained: Any, frozen: Any
) -> Program:
    optimizer = make_optimizer(make_schedule("cosine", 3e-4, steps=1000, warmup=10))
    state = state_shapes(trained, optimizer, mesh)
    step = make_train_step(loss, optimizer)
    batch = _batch(work, mesh)
    kinds = {"weights": (state.params, frozen), "optimizer": state.opt_state}
    return _made(model, step, (state, frozen, batch), {}, kinds | {"batch": batch})


def _batch(work: Workload, mesh: Mesh) -> Batch:
    shape = (work.batch, work.seq)
    place = NamedSharding(mesh, divisible(shape, "B T", work.rules, mesh))

    def rows(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    ids = rows(jnp.int32)
    return Batch(ids, ids, rows(jnp.float32), ids, ids)


def _prefill(work: Workload, model: Llama, mesh: Mesh) -> Program:
    params = _weights(work, model, mesh)
    place = NamedSharding(
        mesh, divisible((work.batch, work.seq), "B T", work.rules, mesh)
    )
    tokens = jax.ShapeDtypeStruct((work.batch, work.seq), jnp.int32, sharding=place)
    lengths = _everywhere(jax.ShapeDtypeStruct((work.batch,), jnp.int32), mesh)
    kinds = {"weights": params, "batch": (tokens, lengths)}
    arguments = (model, params, tokens, lengths)
    options = {"num_slots": work.seq}
    return _made(model, decoding.prefill, arguments, options, kinds)


def _decode(work: Workload, model: Llama, mesh: Mesh) -> Program:
    config, batch = work.config, work.batch
    params = _weights(work, model, mesh)

    def ids(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    settings = [Sampling()] * batch
    rows = jax.eval_shape(lambda: sampling_rows(settings, config.vocab_size))
    start = functools.partial(decoding.start, model, num_slots=work.seq)
    prompts = (ids(batch, 1), ids(batch), rows, ids(batch, _STOP_IDS), ids(batch))
    lanes, _, _ = jax.eval_shape(start, params, *prompts)
    places = cache_shardings(config, model.runtime, mesh, batch, work.seq)
    cache = jax.tree.map(_placed, lanes.cache, places)
    lanes = _everywhere(lanes, mesh)._replace(cache=cache)
    steps = _everywhere(ids(), mesh)
    kinds = {
        "weights": params,
        "cache": cache,
        "batch": (lanes._replace(cache=()), steps),
    }
    arguments = (model, params, lanes, steps)
    return _made(model, decoding.advance, arguments, {}, kinds)


def _weights(work: Workload, model: Llama, mesh: Mesh) -> Any:
    """Those of the model: what is trained, or what stays, quantized if it is asked."""
    runtime = model.runtime
    if work.quantize == "none":
        dtype = jnp.dtype(runtime.weight_dtype)
        shapes = param_shapes(work.config, runtime.layer_layout, dtype=dtype)
    else:
        shapes = quantized_shapes(work.config, runtime, work.quantize)
    return _on_mesh(shapes, model, mesh)


def _on_mesh(shapes: Any, model: Llama, mesh: Mesh) -> Any:
    places = weight_shardings(shapes, model.config, model.runtime, mesh)
    return jax.tree.map(_placed, shapes, places)


def _placed(leaf: Any, place: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    """The same on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _placed(leaf, whole), tree)


def _made(
    model: Llama, function: Any, arguments: Any, options: Any, kinds: Any
) -> Program:
    assert model.mesh is not None
    sizes = {str(axis): size for axis, size in model.mesh.shape.items()}
    attention = model.runtime.attention
    return Program(function, arguments, options, kinds, attention, sizes)


def shard_bytes_of(tree: Any) -> int:
    """What one device holds of placed shapes, without the padding of layouts."""
    return sum(
        _numbers(leaf.sharding.shard_shape(leaf.shape)) * bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def bits(dtype: Any) -> int:
    """Of one number; four-bit ones lie two to a byte."""
    name = jnp.dtype(dtype).name
    return 4 if name in ("int4", "uint4") else 8 * jnp.dtype(dtype).itemsize


def _numbers(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def abstract_gpu(kind: str, cores: int) -> contextlib.AbstractContextManager[Any]:
    """In which kernels for a GPU can be lowered where there is none.

    jax 0.7 asks for no device, and has no such description of one.
    """
    device = getattr(jax.sharding, "AbstractDevice", None)
    try:
        described = device(device_kind=kind, num_cores=cores, platform="cuda")  # type: ignore[misc]
    except TypeError:
        return contextlib.nullcontext()
    mesh = AbstractMesh((), (), abstract_device=described)
    return jax.sharding.use_abstract_mesh(mesh)
