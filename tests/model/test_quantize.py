"""Weights in few bits: how far off they are, and that programs never widen them."""

import json
import pathlib
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec, SingleDeviceSharding
from support.models import TINY, forward, in_layout, random_params, random_tokens
from support.programs import (
    LEAST_MEMORY,
    cache_layer_size,
    needs_tpu_compiler,
    weight_sizes,
    whole_results,
)
from support.tolerances import EQUAL_FORWARD

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.generation import decode as decoding
from llama_jax.model.cache import init_cache
from llama_jax.model.linear import linear
from llama_jax.model.presets import preset
from llama_jax.model.quantize import (
    PROJECTIONS,
    describe,
    quantize,
    quantize_leaf,
    quantize_params,
    quantized_shapes,
    restore,
)
from llama_jax.model.transformer import Llama
from llama_jax.params import flatten, stack_layers, unstack_layers
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, weight_shardings
from llama_jax.weights import KINDS, NF4_LEVELS, Int4, Quantized, dequantize, group_size

every_kind = pytest.mark.parametrize("kind", KINDS)
few_kinds = pytest.mark.parametrize(  # where each compiles for seconds
    "kind",
    ["int8", *(pytest.param(k, marks=pytest.mark.slow) for k in ("int4", "nf4"))],
)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def widened(params: Any) -> Any:
    """The tree with plain float32 weights, which mean the same."""
    return jax.tree.map(
        lambda leaf: dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )


def weights() -> st.SearchStrategy[jax.Array]:
    """Matrices of every size and scale; some columns or all of them zero."""

    def build(
        seed: int, inputs: int, outputs: int, exponent: int, zeros: int, dtype: str
    ) -> jax.Array:
        rng = np.random.default_rng(seed)
        array = rng.standard_t(3, size=(inputs, outputs)) * 2.0**exponent
        array[:, :zeros] = 0
        return jnp.asarray(array, dtype)

    return st.builds(
        build,
        seed=st.integers(0, 2**16),
        inputs=st.sampled_from([3, 96, 150]),
        outputs=st.just(5),
        exponent=st.integers(-9, 3),
        zeros=st.integers(0, 5),
        dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    )


@hypothesis.settings(max_examples=25)
@given(weight=weights(), group=st.sampled_from([1, 64]))
def test_rounding_errors_are_at_most_half_a_step(weight: jax.Array, group: int) -> None:
    exact = np.asarray(weight, np.float64)
    inputs = weight.shape[0]
    eight = quantize(weight, "int8")
    assert eight.scales.dtype == jnp.float32
    off = np.abs(exact - np.asarray(dequantize(eight, jnp.float32)))
    half = np.asarray(eight.scales, np.float64) / 2
    assert (off <= half * (1 + 1e-4)).all()  # products are rounded to float32

    four = quantize(weight, "int4", group=group)
    assert four.scales.dtype == weight.dtype
    size = inputs // four.scales.shape[0]
    assert size == group_size(inputs, group)
    assert size <= group
    off = np.abs(exact - np.asarray(dequantize(four, jnp.float32)))
    half = np.repeat(np.asarray(four.scales, np.float64), size, axis=0) / 2
    # A scale of float16 that is nearly zero keeps few digits itself.
    rounded = 7 * np.finfo(np.float16).smallest_subnormal / 2
    assert (off <= half * (1 + 1e-4) + rounded).all()

    normal = quantize(weight, "nf4", group=group)
    largest = np.repeat(np.asarray(normal.scales, np.float64), size, axis=0)
    off = np.abs(exact - np.asarray(dequantize(normal, jnp.float32)))
    widest = np.diff(NF4_LEVELS).max() / 2
    assert (off <= largest * widest * (1 + 1e-4) + rounded).all()


def test_normal_floats_are_the_nearest_levels() -> None:
    numbers = np.linspace(-1, 1, 257)[:, None].repeat(2, axis=1)
    actual = quantize(jnp.asarray(numbers, jnp.float32), "nf4", group=257)
    levels = np.asarray(NF4_LEVELS)
    nearest = np.abs(numbers[..., None] - levels).min(axis=-1)
    values = np.asarray(dequantize(actual, jnp.float32))
    np.testing.assert_allclose(np.abs(values - numbers), nearest, atol=1e-6)
    assert set(np.asarray(actual.values.astype(jnp.int32)).ravel()) == set(range(16))
    np.testing.assert_allclose(np.unique(values), levels, atol=1e-6)


def test_groups_are_equal_and_no_larger_than_the_limit() -> None:
    assert [group_size(n, 64) for n in (4096, 11008, 288, 48, 67)] == [
        64,
        64,
        48,
        48,
        1,
    ]


@every_kind
@pytest.mark.parametrize("rows", [(1, 1), (3, 7), (2, 48)])
def test_a_product_equals_that_with_the_dequantized_weight(
    kind: Any, rows: tuple[int, ...]
) -> None:
    key = jax.random.key(0)
    x = jax.random.normal(key, (*rows, 192))
    w = quantize(jax.random.normal(jax.random.fold_in(key, 1), (192, 40)) / 14, kind)
    plain = dequantize(w, jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(plain, np.float64)
    actual = jax.jit(linear)(x, w)
    np.testing.assert_allclose(actual, expected, atol=EQUAL_FORWARD)
    cotangent = jax.random.normal(jax.random.fold_in(key, 2), expected.shape)
    of_x = jax.jit(jax.grad(lambda x: jnp.sum(cotangent * linear(x, w))))(x)
    np.testing.assert_allclose(of_x, cotangent @ plain.T, atol=EQUAL_FORWARD)


@every_kind
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_product_with_quantized_weights_is_rounded_once(
    kind: Any, dtype: str
) -> None:
    key = jax.random.key(0)
    x = jax.random.normal(key, (96, 256), dtype)
    exact = jax.random.normal(jax.random.fold_in(key, 1), (256, 32)) / 2**10
    w = quantize(exact.astype(dtype), kind)
    plain = np.asarray(dequantize(w, jnp.float32), np.float64)
    expected = np.asarray(x, np.float64) @ plain
    spread = np.abs(expected).max()
    step = float(jnp.finfo(dtype).eps)
    for few in (x, x[:1]):
        actual = linear(few, w)
        assert actual.dtype == dtype
        off = np.asarray(actual, np.float64) - expected[: len(few)]
        assert np.abs(off).max() < 2 * step * spread
        assert linear(few, w, out_dtype=jnp.float32).dtype == jnp.float32
    # A gradient as small as float16 can say is not lost on its way.
    cotangent = jnp.full((96, 32), 2.0**-12, dtype)
    of_x = jax.grad(lambda x: jnp.sum((cotangent * linear(x, w)).astype(jnp.float32)))(
        x
    )
    assert of_x.dtype == dtype
    expected = np.asarray(cotangent, np.float64) @ plain.T
    off = np.abs(np.asarray(of_x, np.float64) - expected).max()
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    assert off < 2 * step * np.abs(expected).max() + smallest


@every_kind
def test_a_quantized_model_equals_the_dequantized_one(kind: Any) -> None:
    params, tokens = random_params(TINY), random_tokens(TINY, 2, 12)
    model = Llama(TINY, Runtime())
    quantized = quantize_params(params, kind)
    expected, _ = forward(model, widened(quantized), tokens)
    actual, _ = forward(model, quantized, tokens)
    np.testing.assert_allclose(actual, expected, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD)
    assert float(jnp.abs(actual - forward(model, params, tokens)[0]).max()) > 1e-3
    runtime = Runtime(layer_layout="stacked", remat="dots")
    stacked = quantize_params(stack_layers(params), kind)
    actual, _ = forward(Llama(TINY, runtime), stacked, tokens)
    np.testing.assert_allclose(actual, expected, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD)


@every_kind
def test_layers_are_quantized_alike_in_both_layouts(kind: Any) -> None:
    unrolled = quantize_params(random_params(TINY), kind)
    stacked = quantize_params(stack_layers(random_params(TINY)), kind)
    actual, expected = flatten(unstack_layers(stacked)), flatten(unrolled)
    assert actual.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_only_projections_are_quantized() -> None:
    params = random_params(TINY)
    flat = flatten(quantize_params(params, "int4", which=("q_proj", "down_proj")))
    chosen = {path for path, leaf in flat.items() if isinstance(leaf, Int4)}
    assert {path.rpartition("/")[2] for path in chosen} == {"q_proj", "down_proj"}
    assert len(chosen) == 2 * TINY.num_layers
    for path, leaf in flatten(params).items():
        assert path in chosen or flat[path] is leaf
    every = flatten(quantize_params(params, "int8"))
    assert sum(map(is_quantized, every.values())) == 7 * TINY.num_layers
    assert not any(is_quantized(every[path]) for path in ("lm_head",))


def test_weights_are_freed_as_they_are_quantized() -> None:
    params = random_params(TINY)
    quantized = quantize_params(params, "nf4", delete=True)
    for path, leaf in flatten(params).items():
        assert leaf.is_deleted() == (path.rpartition("/")[2] in PROJECTIONS)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(quantized))


def test_quantized_weights_are_not_quantized_again() -> None:
    quantized = quantize_params(random_params(TINY), "int8")
    again = flatten(quantize_params(quantized, "int4"))
    assert all(leaf is flatten(quantized)[path] for path, leaf in again.items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "int3"}, "unknown kind 'int3'; choose from int8, int4, nf4$"),
        ({"which": ("wq",)}, "unknown projection 'wq'; choose from q_proj, .*"),
    ],
)
@pytest.mark.wrong_types
def test_unknown_kinds_and_projections_are_refused(
    change: dict[str, Any], reason: str
) -> None:
    options = {"kind": "int8"} | change
    with pytest.raises(ConfigError, match=f"^quantize: {reason}"):
        quantize_leaf("lm_head", jnp.ones((2, 2)), **options)


def test_a_quantized_weight_of_another_model_is_refused() -> None:
    params = quantize_params(random_params(TINY.replace(mlp_dim=64)), "int8")
    with pytest.raises(
        ConfigError, match=r"^transformer/.*_proj: the weight has shape \[32, 64"
    ):
        forward(Llama(TINY, Runtime()), params, random_tokens(TINY, 1, 4))


@every_kind
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_shapes_equal_those_of_the_arrays(kind: Any, layout: Any) -> None:
    runtime = Runtime(layer_layout=layout, dtype="bfloat16")
    params = in_layout(random_params(TINY), runtime)
    shapes = quantized_shapes(TINY, runtime, kind)
    arrays = quantize_params(params, kind)
    assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
    for shape, array in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(arrays), strict=True
    ):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


@every_kind
@pytest.mark.parametrize("width", [32, 33])
def test_restore_inverts_describe(
    tmp_path: pathlib.Path, kind: Any, width: int
) -> None:
    import orbax.checkpoint as ocp

    config = TINY.replace(embed_dim=width)
    params = quantize_params(random_params(config), kind)
    arrays, described = describe(params)
    assert {array.dtype for array in arrays.values()} <= {
        jnp.dtype(name) for name in ("float32", "int8", "uint8")
    }
    if kind != "int8":
        packed = arrays["transformer/layers/0/mlp/gate_proj/values"]
        assert packed.shape == (-(-width // 2), config.mlp_dim)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        actual = checkpointer.restore(tmp_path / "tree", arrays)
    restored = restore(actual, json.loads(json.dumps(described)))
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, restored, params)


def test_a_description_that_does_not_match_is_refused() -> None:
    arrays, described = describe(quantize_params(random_params(TINY), "int4"))
    path = "transformer/layers/0/mlp/gate_proj"
    for facts in ({}, {"kind": "int3", "inputs": 32}, {"kind": "int4"}, None):
        with pytest.raises(CheckpointError, match=f"^{path}: described as quantized"):
            restore(arrays, described | {path: facts})
    with pytest.raises(CheckpointError, match="'x/values' is missing"):
        restore(arrays, {"x": {"kind": "int8", "inputs": 4}})


eight_devices = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)


@eight_devices
@few_kinds
def test_a_quantized_model_on_a_mesh_equals_one_device(kind: Any) -> None:
    runtime, tokens = Runtime(), random_tokens(TINY, 4, 12)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = quantize_params(random_params(TINY), kind, group=8)
    expected, _ = forward(Llama(TINY, runtime), params, tokens)
    shardings = weight_shardings(params, TINY, runtime, mesh)
    placed = jax.device_put(params, shardings)
    actual, _ = forward(Llama(TINY, runtime, mesh), placed, tokens)
    np.testing.assert_allclose(actual, expected, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD)
    one = flatten(placed)["transformer/layers/0/mlp/gate_proj"]
    assert one.values.addressable_shards[0].data.shape == (16, 24)
    # A weight that lies on the mesh is quantized there, into the same numbers.
    plain = random_params(TINY)
    quantized = quantize_params(
        jax.device_put(plain, weight_shardings(plain, TINY, runtime, mesh)),
        kind,
        group=8,
    )
    jax.tree.map(np.testing.assert_array_equal, quantized, params)


@eight_devices
def test_scales_are_sharded_as_their_weights() -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    for layout, lead in (("unrolled", ()), ("stacked", (None,))):
        runtime = Runtime(layer_layout=layout)
        for kind in KINDS:
            shapes = quantized_shapes(TINY, runtime, kind, group=8)
            tree = weight_shardings(shapes, TINY, runtime, mesh)
            flat = flatten(tree)
            layer = "transformer/layers/" + ("0/" if not lead else "")
            gate, down = flat[f"{layer}mlp/gate_proj"], flat[f"{layer}mlp/down_proj"]
            assert gate.values.spec == PartitionSpec(*lead, "fsdp", "tensor")
            if kind == "int8":
                assert gate.scales.spec == PartitionSpec(*lead, "tensor")
                assert down.scales.spec == PartitionSpec(*lead, "fsdp")
            else:
                assert gate.scales.spec == PartitionSpec(*lead, "fsdp", "tensor")
                assert down.scales.spec == PartitionSpec(*lead, "tensor", "fsdp")
            assert flat["lm_head"].spec == PartitionSpec("fsdp", "tensor")
    # One group of 32 inputs cannot be split: it is whole everywhere.
    shapes = quantized_shapes(TINY, Runtime(), "int4")
    flat = flatten(weight_shardings(shapes, TINY, Runtime(), mesh))
    gate = flat["transformer/layers/1/mlp/gate_proj"]
    assert gate.scales.spec == PartitionSpec(None, "tensor")


def compile_step(
    config: LlamaConfig, kind: Any, *, batch: int, slots: int, device: Any, dtype: Any
) -> tuple[Any, Any]:
    """`decode_step` of a quantized model from shapes alone, and its parameters."""
    runtime = Runtime(dtype=dtype)
    sharding = SingleDeviceSharding(device)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    params = placed(quantized_shapes(config, runtime, kind))
    cache = placed(jax.eval_shape(lambda: init_cache(config, batch, slots, dtype)))
    tokens = placed(jax.ShapeDtypeStruct((batch,), jnp.int32))
    model = Llama(config, runtime)
    lowered = decoding.decode_step.lower(model, params, cache, tokens)
    options = LEAST_MEMORY if device.platform == "cpu" else None
    return lowered.compile(options), params


def held_bytes(params: Any) -> int:
    """What the arrays of a tree take: four-bit numbers half a byte."""
    bits = {"int4": 4, "uint4": 4}
    return sum(
        leaf.size * bits.get(leaf.dtype.name, 8 * leaf.dtype.itemsize) // 8
        for leaf in jax.tree.leaves(params)
    )


def check_bits_are_held_as_bits(
    compiled: Any, params: Any, config: LlamaConfig, batch: int, slots: int, width: int
) -> None:
    memory = compiled.memory_analysis()
    cache = 2 * config.num_layers * cache_layer_size(config, batch, slots) * width
    total = held_bytes(params) + cache
    assert total <= memory.argument_size_in_bytes < 1.001 * total + 1e5
    assert memory.alias_size_in_bytes >= cache


WIDE = TINY.replace(
    vocab_size=500, embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64,
    mlp_dim=1536, num_layers=3,
)  # fmt: skip


@few_kinds
@pytest.mark.parametrize("batch", [1, 4])
def test_decoding_on_cpu_widens_no_more_than_one_weight(kind: Any, batch: int) -> None:
    compiled, params = compile_step(
        WIDE, kind, batch=batch, slots=64, device=jax.devices()[0], dtype="float32"
    )
    check_bits_are_held_as_bits(compiled, params, WIDE, batch, 64, 4)
    largest = WIDE.embed_dim * WIDE.mlp_dim
    # Eight bits are widened a few rows at a time; four become bytes first.
    room = largest if kind == "int8" else 4 * largest
    assert compiled.memory_analysis().temp_size_in_bytes < room


@few_kinds
def test_reading_a_prompt_on_cpu_widens_no_more_than_one_layer(kind: Any) -> None:
    runtime = Runtime()
    params = quantized_shapes(WIDE, runtime, kind)
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = decoding.prefill.lower(
        Llama(WIDE, runtime), params, tokens, lengths, num_slots=256
    ).compile(LEAST_MEMORY)
    layer = 4 * WIDE.embed_dim**2 + 3 * WIDE.embed_dim * WIDE.mlp_dim
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * layer


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.parametrize(("kind", "batch"), [("int8", 1), ("int8", 8), ("int4", 1)])
def test_decoding_on_a_tpu_multiplies_with_bits(kind: Any, batch: int) -> None:
    config, slots = preset("llama2-7b").replace(num_layers=4), 2048
    compiled, params = compile_step(
        config,
        kind,
        batch=batch,
        slots=slots,
        device=tpu_devices("v5e:2x2")[0],
        dtype="bfloat16",
    )
    check_bits_are_held_as_bits(compiled, params, config, batch, slots, 2)
    memory = compiled.memory_analysis()
    if kind == "int8" or jax.__version_info__ >= (0, 12):
        sizes = weight_sizes(config) | {cache_layer_size(config, batch, slots)}
        assert not whole_results(compiled.as_text(), sizes)
        assert memory.temp_size_in_bytes < 2**24
    else:  # one weight's scales at a time, repeated over their groups
        assert memory.temp_size_in_bytes < 2.3 * config.embed_dim * config.mlp_dim


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
def test_llama2_7b_in_eight_bits_decodes_eight_rows_on_one_chip() -> None:
    config = preset("llama2-7b")
    compiled, params = compile_step(
        config,
        "int8",
        batch=8,
        slots=2048,
        device=tpu_devices("v5e:2x2")[0],
        dtype="bfloat16",
    )
    check_bits_are_held_as_bits(compiled, params, config, 8, 2048, 2)
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert total < 15.75 * 2**30
