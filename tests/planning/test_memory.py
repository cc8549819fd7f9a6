"""The formula's bytes equal those of arrays, of tracing and of compilers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import TINY
from support.programs import compile_decoding, needs_tpu_compiler
from support.workloads import GROUPED, ONE_CHIP, eight_devices, workload

from llama_jax.config import LlamaConfig
from llama_jax.model.cache import cache_shardings, init_cache
from llama_jax.model.presets import PRESETS, preset
from llama_jax.model.transformer import Transformer, apply
from llama_jax.params import count_params, flatten, param_shapes
from llama_jax.planning.memory import Footprint, footprint, residual_bytes
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.runtime import TRAINING_RULES, Remat, Runtime
from llama_jax.sharding import make_mesh, param_shardings, parse_mesh
from llama_jax.weights import GROUP_SIZE

MESHES = (
    "fsdp=8",
    "data=2,tensor=4",  # two key/value heads for four chips: replicated
    "fsdp=2,sequence=2,tensor=2",
)
COMPILER = 0.01
"""Relative tolerance to the compiler's bytes, which include padding."""


@pytest.mark.parametrize("name", PRESETS)
def test_one_chip_stores_every_parameter(name: str) -> None:
    config = preset(name)
    params = count_params(param_shapes(config, "stacked"))
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        decoding = workload(config, task="decode", batch=1, seq=8, dtype=dtype)
        assert footprint(decoding, ONE_CHIP).weights == width * params
        training = footprint(workload(config, param_dtype=dtype), ONE_CHIP)
        assert training.weights == training.gradients == width * params
        assert training.optimizer == 2 * width * params


@eight_devices
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("changes", [{}, {"vocab_size": 97}, {"tied_embeddings": True}])
def test_weights_on_a_mesh_equal_the_shards_of_param_shardings(
    text: str, changes: dict[str, Any]
) -> None:
    config = TINY.replace(**changes)
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    shapes = flatten(param_shapes(config))
    training = Runtime(rules=TRAINING_RULES)
    shardings = flatten(param_shardings(config, training, mesh))
    size = sum(
        math.prod(shardings[path].shard_shape(leaf.shape))
        for path, leaf in shapes.items()
    )
    memory = footprint(workload(config, batch=8, seq=16), dict(mesh.shape))
    assert memory.weights == memory.gradients == 4 * size
    assert memory.optimizer == 8 * size


@eight_devices
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("batch", [1, 8])
def test_the_cache_equals_its_arrays_on_the_mesh(text: str, batch: int) -> None:
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    decode = workload(TINY, task="decode", batch=batch, seq=32, dtype="float32")
    cache = init_cache(TINY, batch, 32, jnp.float32)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert footprint(decode, ONE_CHIP).cache == whole
    sharded = jax.device_put(cache, cache_shardings(TINY, Runtime(), mesh, batch, 32))
    part = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(sharded)
    )
    assert footprint(decode, dict(mesh.shape)).cache == part


def test_quantized_weights_take_one_or_half_a_byte_plus_scales() -> None:
    decode = workload(task="decode", batch=1, seq=8)
    shapes = flatten(param_shapes(GROUPED, "stacked"))
    projections = [s.shape for path, s in shapes.items() if path.endswith("_proj")]
    size = sum(map(math.prod, projections))
    columns = sum(shape[0] * shape[2] for shape in projections)
    rest = 2 * (count_params(param_shapes(GROUPED)) - size)
    eight = footprint(decode.replace(quantize="int8"), ONE_CHIP).weights
    assert eight == rest + size + 4 * columns
    four = footprint(decode.replace(quantize="int4"), ONE_CHIP).weights
    assert four == rest + size // 2 + size // GROUP_SIZE * 2


def test_only_adapters_have_gradients_and_moments() -> None:
    full = footprint(workload(task="decode"), ONE_CHIP).weights
    memory = footprint(workload(task="lora", rank=4), ONE_CHIP)
    sizes = {"D": 512, "NH": 512, "KH": 256, "F": 1408}
    adapters = 2 * (2 * sizes["D"] + 2 * sizes["NH"])  # q and o
    adapters += 2 * 2 * (sizes["D"] + sizes["KH"])  # k and v
    adapters += 2 * 3 * (sizes["D"] + sizes["F"])
    assert memory.gradients == 4 * 4 * adapters
    assert memory.optimizer == 2 * memory.gradients
    assert memory.weights == full + memory.gradients


def traced_residuals(config: LlamaConfig, remat: Remat, batch: int, seq: int) -> int:
    """Bytes of the residuals of differentiating the model, without the weights."""
    runtime = Runtime(
        dtype="bfloat16",
        param_dtype="float32",
        layer_layout="stacked",
        remat=remat,
        attention="xla",
    )
    model = Transformer(config, runtime)
    params = param_shapes(config, "stacked")["transformer"]

    def backward(params: Any, tokens: Any) -> Any:
        return jax.vjp(lambda params: apply(model, params, tokens)[0], params)[1]

    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    residuals = jax.tree.leaves(jax.eval_shape(backward, params, tokens))
    weights = {
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params) if leaf.ndim > 1
    }
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in residuals
        if (leaf.shape, leaf.dtype) not in weights
    )


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_residuals_of_a_layer_equal_those_of_differentiation(remat: Remat) -> None:
    deep = GROUPED.replace(num_layers=6)  # two layers and four more
    traced = traced_residuals(deep, remat, 2, 256)
    traced -= traced_residuals(GROUPED, remat, 2, 256)
    work = workload(batch=2, seq=256, flash=False)
    formula = 4 * residual_bytes(work, ONE_CHIP, remat)
    # There are also scales and sums of one number per token.
    assert formula <= traced <= 1.01 * formula


def test_remat_reduces_residuals() -> None:
    none, dots, block = (
        residual_bytes(workload(), ONE_CHIP, remat)
        for remat in ("none", "dots", "block")
    )
    assert none > dots > block == 8 * 64 * 512 * 2


sizes = st.sampled_from([1, 2, 4])


@given(
    data=sizes,
    fsdp=sizes,
    sequence=sizes,
    tensor=sizes,
    axis=st.sampled_from(["data", "fsdp", "tensor"]),
)
def test_more_chips_never_need_more_memory_each(
    data: int, fsdp: int, sequence: int, tensor: int, axis: str
) -> None:
    mesh = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    larger = mesh | {axis: 2 * mesh[axis]}
    for task in ("train", "lora", "decode"):
        work = workload(task=task, batch=64)
        before, after = footprint(work, mesh), footprint(work, larger)
        kinds = ["weights", "optimizer", "gradients", "activations"]
        # Every chip stores the key heads that the axis does not divide.
        if larger["tensor"] <= work.config.num_kv_heads:
            kinds.append("cache")
        for kind in kinds:
            assert getattr(after, kind) <= getattr(before, kind), (task, kind)


@given(
    seq=st.integers(1, 4096),
    more=st.integers(0, 4096),
    batch=st.integers(1, 64),
    remat=st.sampled_from(["none", "block", "dots"]),
    task=st.sampled_from(["train", "lora", "qlora", "decode"]),
    flash=st.booleans(),
)
def test_longer_rows_never_need_less_memory(
    seq: int, more: int, batch: int, remat: Any, task: Any, flash: bool
) -> None:
    short = workload(seq=seq, batch=batch, remat=remat, task=task, flash=flash)
    for kind, before, after in zip(
        Footprint._fields,
        footprint(short, ONE_CHIP),
        footprint(short.replace(seq=seq + more), ONE_CHIP),
        strict=True,
    ):
        assert after >= before, kind


# Temporaries (gradients and residuals included) that libtpu 0.0.52 allocates for a step
# of AdamW, with bfloat16 activations, float32 weights and remat of blocks; `tensor`
# splits the stream between blocks in two of them. Compiling takes one to five minutes.
ALLOCATED = (
    ("llama2-7b", 4, 8, "fsdp=8", 2_040_414_208, 0.01),
    ("llama2-7b", 8, 8, "fsdp=8", 2_782_494_720, 0.01),
    ("llama2-70b", 4, 256, "fsdp=16,tensor=16", 7_660_994_560, 0.1),
    ("llama2-70b", 2, 16, "fsdp=4,tensor=4", 3_923_918_848, 0.1),
)


@pytest.mark.parametrize(
    ("name", "layers", "batch", "mesh", "allocated", "tolerance"), ALLOCATED
)
def test_temporaries_of_training_are_near_the_compilers(
    name: str, layers: int, batch: int, mesh: str, allocated: int, tolerance: float
) -> None:
    config = preset(name).replace(num_layers=layers)
    memory = footprint(workload(config, batch=batch, seq=4096), parse_mesh(mesh))
    temporaries = memory.gradients + memory.activations + memory.temporaries
    assert temporaries == pytest.approx(allocated, rel=tolerance)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
def test_arguments_of_decoding_are_weights_and_cache() -> None:
    config = preset("llama2-7b").replace(num_layers=2)
    device = tpu_devices("v5e:2x2")[0]
    compiled = compile_decoding(
        "decode_step", config, batch=4, slots=2048, dtype="bfloat16", device=device
    )
    analysis = compiled.memory_analysis()
    memory = footprint(workload(config, task="decode", batch=4, seq=2048), ONE_CHIP)
    formula = memory.weights + memory.cache
    assert analysis.argument_size_in_bytes == pytest.approx(formula, rel=COMPILER)
    assert analysis.temp_size_in_bytes < 0.05 * formula
