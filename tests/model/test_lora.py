"""Adapters: what they are, that they say nothing at first, and what a step holds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding
from support.models import TINY, forward, random_params, random_tokens
from support.programs import needs_tpu_compiler, whole_results
from support.tolerances import EQUAL_FORWARD, EQUAL_GRADIENT

from llama_jax.errors import ConfigError
from llama_jax.model.linear import linear
from llama_jax.model.lora import Lora, adapt, init_lora, lora_shapes, merge
from llama_jax.model.presets import preset
from llama_jax.model.quantize import (
    PROJECTIONS,
    quantize,
    quantize_params,
    quantized_shapes,
)
from llama_jax.model.transformer import Llama, apply
from llama_jax.params import count_params, flatten, stack_layers, unstack_layers
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, weight_shardings
from llama_jax.weights import Adapted, Int8, dequantize

LORA = Lora(rank=4, alpha=8)
STACKED = Runtime(layer_layout="stacked", remat="block")

SLOW = pytest.mark.slow  # each compiles a model or two, for seconds


def trained(adapters: Any, seed: int = 0) -> Any:
    """Adapters as after a few training steps: b is not zero."""
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(adapters))))
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype), adapters
    )


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(TINY)


@pytest.fixture(scope="module")
def adapters() -> Any:
    """Stacked."""
    return trained(init_lora(TINY, jax.random.key(1), LORA))


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return random_tokens(TINY, 2, 12)


def check_equal(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD)


@pytest.mark.parametrize(
    "base", ["plain", "nf4", *(pytest.param(k, marks=SLOW) for k in ("int8", "int4"))]
)
def test_an_adapted_model_equals_the_merged_one_in_either_layout(
    params: Any, adapters: Any, tokens: jax.Array, base: Any
) -> None:
    if base != "plain":
        params = quantize_params(params, base)
    unrolled = unstack_layers(adapters)
    model = Llama(TINY, Runtime())
    merged = merge(params, unrolled, LORA.scaling, dtype="float32")
    assert all(isinstance(leaf, jax.Array) for leaf in flatten(merged).values())
    expected, _ = forward(model, merged, tokens)
    actual, _ = forward(model, adapt(params, unrolled, LORA.scaling), tokens)
    check_equal(actual, expected)
    assert float(jnp.abs(expected - forward(model, params, tokens)[0]).max()) > 0.1

    def stack(rows: list[Any]) -> Any:
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *rows)

    stacked = adapt(stack_layers(params, stack), adapters, LORA.scaling)
    check_equal(forward(Llama(TINY, STACKED), stacked, tokens)[0], expected)
    # Adapted leaves are stacked and unstacked whole, too.
    again = unstack_layers(stacked)
    jax.tree.map(
        np.testing.assert_array_equal, again, adapt(params, unrolled, LORA.scaling)
    )


@pytest.mark.parametrize("base", ["plain", "int4", "nf4"])
def test_new_adapters_change_nothing(params: Any, tokens: jax.Array, base: Any) -> None:
    if base != "plain":
        params = quantize_params(params, base)
    for runtime in (Runtime(), Runtime(dtype="bfloat16", param_dtype="float32")):
        model = Llama(TINY, runtime)
        first = init_lora(TINY, jax.random.key(0), LORA, runtime=runtime)
        expected, _ = forward(model, params, tokens)
        actual, _ = forward(model, adapt(params, first, LORA.scaling), tokens)
        np.testing.assert_array_equal(actual, expected)


def test_new_adapters_on_int8_weights_change_only_rounding(
    params: Any, tokens: jax.Array
) -> None:
    # XLA:CPU multiplies by the scale and adds what follows at once where it can.
    params = quantize_params(params, "int8")
    model = Llama(TINY, Runtime())
    first = init_lora(TINY, jax.random.key(0), LORA, runtime=Runtime())
    actual, _ = forward(model, adapt(params, first, LORA.scaling), tokens)
    check_equal(actual, forward(model, params, tokens)[0])


@pytest.mark.parametrize(
    ("base", "rows"),
    [("plain", (1, 1)), ("int8", (1, 1)), ("int8", (2, 3)), ("nf4", (2, 3))],
)
def test_gradients_equal_those_through_the_merged_weight(
    base: Any, rows: tuple[int, ...]
) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    inputs, rank, outputs = 64, 4, 24
    x = jax.random.normal(keys[0], (*rows, inputs))
    plain = weight = jax.random.normal(keys[1], (inputs, outputs)) / 8
    if base != "plain":
        weight = quantize(weight, base)
        plain = dequantize(weight, jnp.float32)
    a = jax.random.normal(keys[2], (inputs, rank)) / 8
    b = jax.random.normal(keys[3], (rank, outputs))
    cotangent = jax.random.normal(keys[4], (*rows, outputs))

    def through_leaf(x: Any, a: Any, b: Any) -> Any:
        return jnp.sum(cotangent * linear(x, Adapted(weight, a, b, 0.5)))

    def through_merged(x: Any, a: Any, b: Any) -> Any:
        return jnp.sum(cotangent * jnp.matmul(x, plain + 0.5 * a @ b))

    actual = jax.jit(jax.grad(through_leaf, (0, 1, 2)))(x, a, b)
    expected = jax.grad(through_merged, (0, 1, 2))(x, a, b)
    for one, other in zip(actual, expected, strict=True):
        scale = float(jnp.abs(other).max())
        assert float(jnp.abs(one - other).max()) < EQUAL_GRADIENT * scale


@pytest.mark.parametrize("base", [pytest.param("plain", marks=SLOW), "int8"])
def test_gradients_of_a_model_equal_those_through_merged_weights(
    params: Any, adapters: Any, tokens: jax.Array, base: Any
) -> None:
    frozen = stack_layers(params)
    if base != "plain":
        frozen = quantize_params(frozen, base)
    model = Llama(TINY, STACKED)

    def loss(weights: Any) -> Any:
        return jnp.mean(jax.nn.logsumexp(apply(model, weights, tokens)[0], axis=-1))

    actual = jax.jit(
        jax.grad(lambda adapters: loss(adapt(frozen, adapters, LORA.scaling)))
    )(adapters)
    expected = jax.jit(
        jax.grad(lambda a: loss(merge(frozen, a, LORA.scaling, dtype="float32")))
    )(adapters)
    for path, leaf in flatten(expected).items():
        scale = float(jnp.abs(leaf).max())
        assert scale > 0
        off = float(jnp.abs(flatten(actual)[path] - leaf).max())
        assert off < EQUAL_GRADIENT * scale, path


def test_adapters_are_the_same_in_either_layout_and_follow_their_targets() -> None:
    key = jax.random.key(3)
    stacked = init_lora(TINY, key, LORA)
    unrolled = init_lora(TINY, key, LORA, runtime=Runtime())
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), unrolled)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(unrolled), stacked)
    for path, leaf in flatten(stacked).items():
        if path.endswith("/b"):
            assert not leaf.any()
        else:
            bound = leaf.shape[1] ** -0.5
            assert 0.9 * bound < float(jnp.abs(leaf).max()) <= bound
            assert len(np.unique(np.asarray(leaf))) > 0.99 * leaf.size
    sizes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)}
    few = Lora(rank=3, alpha=1, targets=("q_proj", "v_proj"))
    expected = 3 * TINY.num_layers * (sum(sizes["q"]) + sum(sizes["v"]))
    assert count_params(init_lora(TINY, key, few)) == expected
    names = {path.split("/")[-2] for path in flatten(stacked)}
    assert names == set(PROJECTIONS)


def test_adapting_copies_nothing_and_takes_shapes(params: Any) -> None:
    first = init_lora(TINY, jax.random.key(0), LORA, runtime=Runtime())
    adapted = flatten(adapt(params, first, LORA.scaling))
    for path, leaf in flatten(params).items():
        one = adapted[path]
        assert (one.base if isinstance(one, Adapted) else one) is leaf
    shapes = quantized_shapes(TINY, Runtime(), "int8")
    tree = adapt(shapes, lora_shapes(TINY, LORA, layout="unrolled"), 2)
    one = flatten(tree)["transformer/layers/1/mlp/down_proj"]
    assert isinstance(one.base, Int8)
    assert one.shape == (TINY.mlp_dim, TINY.embed_dim)
    assert one.scaling == 2.0


def test_the_scaling_is_alpha_over_the_rank_or_its_root() -> None:
    assert Lora(rank=16, alpha=8).scaling == 0.5
    assert Lora(rank=16, alpha=8, rank_stabilized=True).scaling == 2.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": 2.0}, "rank must be an integer, got 2.0"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"targets": ()}, r"targets must be distinct projections, got \[\]"),
        ({"targets": ("q_proj", "q_proj")}, "targets must be distinct projections"),
        (
            {"targets": ("q_proj", "wq")},
            "unknown target 'wq'; choose from q_proj, .*, down_proj$",
        ),
    ],
)
@pytest.mark.wrong_types
def test_invalid_settings_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^(lora|Lora): {reason}"):
        Lora(**({"rank": 4, "alpha": 8} | change))


def test_adapters_that_do_not_fit_are_refused(params: Any, adapters: Any) -> None:
    with pytest.raises(ConfigError, match="use one layer layout for both"):
        adapt(params, adapters, 1.0)
    other = init_lora(TINY.replace(mlp_dim=64), jax.random.key(0), LORA)
    with pytest.raises(ConfigError, match=r"gate_proj is \[2, 32, 4\] by \[2, 4, 64\]"):
        adapt(stack_layers(params), other, 1.0)
    once = adapt(stack_layers(params), adapters, 1.0)
    with pytest.raises(ConfigError, match="use adapters of this model, only once"):
        adapt(once, adapters, 1.0)
    half = {"transformer": {"layers": {"mlp": {"up_proj": {"a": jnp.ones((2, 2))}}}}}
    with pytest.raises(ConfigError, match=r"up_proj/b is missing"):
        merge(params, half, 1.0)


eight_devices = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)


@eight_devices
@pytest.mark.parametrize("base", [pytest.param("plain", marks=SLOW), "int8"])
def test_an_adapted_model_on_a_mesh_equals_one_device(
    params: Any, adapters: Any, base: Any
) -> None:
    tokens = random_tokens(TINY, 4, 12)
    frozen = stack_layers(params)
    if base != "plain":
        frozen = quantize_params(frozen, base)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def gradient(model: Llama, adapters: Any, frozen: Any) -> Any:
        def loss(adapters: Any) -> Any:
            logits, _ = apply(model, adapt(frozen, adapters, LORA.scaling), tokens)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return jax.jit(jax.value_and_grad(loss))(adapters)

    expected, of_one = gradient(Llama(TINY, STACKED), adapters, frozen)
    sharding = functools.partial(
        weight_shardings, config=TINY, runtime=STACKED, mesh=mesh
    )
    actual, of_mesh = gradient(
        Llama(TINY, STACKED, mesh),
        jax.device_put(adapters, sharding(adapters)),
        jax.device_put(frozen, sharding(frozen)),
    )
    check_equal(actual, expected)
    for path, leaf in flatten(of_one).items():
        off = np.abs(np.asarray(flatten(of_mesh)[path]) - np.asarray(leaf)).max()
        assert off < EQUAL_GRADIENT * float(jnp.abs(leaf).max()), path


@eight_devices
def test_adapters_are_initialized_sharded_as_their_weights() -> None:
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    sharded = flatten(init_lora(TINY, jax.random.key(0), LORA, mesh=mesh))
    layer = "transformer/layers/"
    for path, expected in {
        "mlp/up_proj/a": PartitionSpec(None, "fsdp", None),
        "mlp/up_proj/b": PartitionSpec(None, None, "tensor"),
        "mlp/down_proj/a": PartitionSpec(None, "tensor", None),
        "mlp/down_proj/b": PartitionSpec(None, None, "fsdp"),
    }.items():
        sharding = jax.NamedSharding(mesh, expected)
        assert sharded[layer + path].sharding.is_equivalent_to(sharding, 3), path
    alone = flatten(init_lora(TINY, jax.random.key(0), LORA))
    jax.tree.map(np.testing.assert_array_equal, sharded, alone)
    # A tree of adapted leaves has the same shardings.
    shapes = adapt(
        quantized_shapes(TINY, STACKED, "int8"), lora_shapes(TINY, LORA), 1.0
    )
    up = flatten(weight_shardings(shapes, TINY, STACKED, mesh))[f"{layer}mlp/up_proj"]
    assert up.a.spec == PartitionSpec(None, "fsdp", None)
    assert up.base.scales.spec == PartitionSpec(None, "tensor")


def compile_gradient(config: Any, runtime: Runtime, kind: Any, tokens: Any) -> Any:
    """The gradient of a loss with respect to adapters, from shapes alone."""
    model, sharding = Llama(config, runtime), tokens.sharding

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    frozen = placed(quantized_shapes(config, runtime, kind))
    layout = runtime.layer_layout
    adapters = placed(lora_shapes(config, LORA, layout=layout))

    def loss(adapters: Any, frozen: Any, tokens: Any) -> Any:
        weights = adapt(frozen, adapters, LORA.scaling)
        logits, _ = apply(model, weights, tokens, logits_at=tokens[:, :1] * 0)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    return jax.jit(jax.grad(loss)).lower(adapters, frozen, tokens).compile()


UNPACKED = (("int4", "stacked"), ("nf4", "stacked"))
WIDENED_IN_TURN = pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="older XLA:CPU widens an unrolled model's layers all at once; stacked ones, "
    "which are what training has, it does not",
)


@pytest.mark.parametrize(
    ("kind", "layout", "remat"),
    [
        pytest.param("int8", "stacked", "none", marks=SLOW),
        ("int8", "stacked", "block"),
        pytest.param("int8", "unrolled", "block", marks=[SLOW, WIDENED_IN_TURN]),
        pytest.param("int4", "stacked", "block", marks=SLOW),
        pytest.param("nf4", "unrolled", "none", marks=[SLOW, WIDENED_IN_TURN]),
    ],
)
def test_a_gradient_over_a_quantized_base_widens_two_layers_of_eight_at_most(
    kind: Any, layout: Any, remat: Any
) -> None:
    config = TINY.replace(
        vocab_size=100, embed_dim=256, num_heads=4, num_kv_heads=4, head_dim=64,
        mlp_dim=768, num_layers=8,
    )  # fmt: skip
    sharding = SingleDeviceSharding(jax.devices()[0])
    tokens = jax.ShapeDtypeStruct((5, 16), jnp.int32, sharding=sharding)
    runtime = Runtime(layer_layout=layout, remat=remat)
    compiled = compile_gradient(config, runtime, kind, tokens)
    layer = 4 * 256 * 256 + 3 * 256 * 768
    rows = 5 * 16 * (256 * 10 + 768 * 6) * 4  # of one layer's activations
    saved = 1.3 * rows * (config.num_layers if remat == "none" else 1)
    # Stacked four-bit numbers become bytes before the loop; floats are four times that.
    unpacked = config.num_layers * layer if (kind, layout) in UNPACKED else 0
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    # Less than one layer with jax 0.12, 1.2 of them with 0.7.2; of eight.
    assert temporaries < 2 * 4 * layer + saved + unpacked


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_training_step_on_a_tpu_multiplies_with_bits(kind: Any) -> None:
    config = preset("llama2-7b").replace(num_layers=4, vocab_size=1000)
    sharding = SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=sharding)
    # As on a TPU; by default it is as on the device that this process has.
    runtime = STACKED.replace(dtype="bfloat16", attention="mosaic_tpu")
    compiled = compile_gradient(config, runtime, kind, tokens)
    one = config.embed_dim * config.mlp_dim
    stacked = {config.num_layers * one, config.num_layers * config.embed_dim**2}
    assert not whole_results(compiled.as_text(), stacked)
    # A few weights at a time are widened, however many layers there are: for 8 instead
    # of 4 jax 0.12 has 70 MB more in nf4 and 0.7.2 143, where a copy has 405 or more.
    most = 16 if jax.__version_info__ >= (0, 12) else 20
    assert compiled.memory_analysis().temp_size_in_bytes < most * one
