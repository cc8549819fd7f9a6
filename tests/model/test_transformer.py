"""The model against the oracle, against itself in other shapes, and its causality."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.models import (
    TINY,
    configs,
    forward,
    in_layout,
    random_params,
    random_tokens,
)
from support.tolerances import (
    BFLOAT16_LOGITS,
    EQUAL_FORWARD,
    EQUAL_GRADIENT,
    FLOAT16_LOGITS,
    ORACLE_FLOAT32,
)

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import ConfigError
from llama_jax.generation import decode as decoding
from llama_jax.model.cache import KVCache, grow, init_cache
from llama_jax.model.init import init_params
from llama_jax.model.layer_cache import CacheRows, DenseLayerCache
from llama_jax.model.transformer import Llama, ScalarModel, apply
from llama_jax.params import flatten, unstack_layers
from llama_jax.runtime import LayerLayout, Remat, Runtime

MODEL = Llama(TINY, Runtime())
SCALAR = TINY.replace(head="scalar")
B, T = 3, 12
SEGMENTS = [[0] * 5 + [1] * 4 + [2] * 3, [7] * 12, [1] + [2] * 10 + [3]]
RESTARTED = [[*range(5), *range(4), *range(3)], [*range(12)], [0, *range(10), 0]]


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(TINY)


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return random_tokens(TINY, B, T)


@pytest.fixture(scope="module")
def logits(params: dict[str, Any], tokens: jax.Array) -> np.ndarray:
    """Of one full forward."""
    return np.asarray(forward(MODEL, params, tokens)[0])


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance
    )


# The oracle


@settings(max_examples=5)
@given(configs())
def test_model_equals_the_oracle(config: LlamaConfig) -> None:
    params, tokens = random_params(config), random_tokens(config, 2, 7)
    actual, cache = forward(Llama(config, Runtime()), params, tokens)
    assert cache is None
    assert_near(actual, oracle.logits(config, params, tokens), ORACLE_FLOAT32)


def test_packed_model_equals_the_oracle(
    params: dict[str, Any], tokens: jax.Array
) -> None:
    packed = {"segment_ids": SEGMENTS, "positions": RESTARTED}
    arrays = {name: jnp.asarray(value) for name, value in packed.items()}
    actual, _ = forward(MODEL, params, tokens, **arrays)
    expected = oracle.logits(TINY, params, tokens, **packed)
    assert_near(actual, expected, ORACLE_FLOAT32)


def test_scalar_model_equals_the_oracle(tokens: jax.Array) -> None:
    params = random_params(SCALAR)
    actual, cache = forward(ScalarModel(SCALAR, Runtime()), params, tokens)
    assert cache is None
    assert actual.shape == tokens.shape
    assert_near(actual, oracle.scalars(TINY, params, tokens), ORACLE_FLOAT32)


# The cache


@st.composite
def ragged_splits(draw: st.DrawFn) -> tuple[list[int], int, list[list[int]]]:
    """Row lengths, the width of a call, and for each row the sizes of its parts."""
    width = draw(st.sampled_from([1, 4, 12]))
    lengths = draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    parts = []
    for length in lengths:
        row: list[int] = []
        while sum(row) < length:
            row.append(
                draw(st.integers(0 if row else 1, min(width, length - sum(row))))
            )
            if len(row) > 30:
                row.append(min(width, length - sum(row)))
        parts.append(row)
    return lengths, width, parts


@settings(max_examples=25)
@given(ragged_splits())
def test_any_split_into_calls_equals_one_forward(
    params: dict[str, Any],
    tokens: jax.Array,
    logits: np.ndarray,
    split: tuple[list[int], int, list[list[int]]],
) -> None:
    lengths, width, parts = split
    # Room after the longest row for the padding of its last call.
    cache = init_cache(TINY, B, T + width, jnp.float32)
    done = [0] * B
    for call in range(max(map(len, parts))):
        sizes = [row[call] if call < len(row) else 0 for row in parts]
        new = np.full((B, width), 95, np.int32)  # padding: any id
        for row, size in enumerate(sizes):
            new[row, :size] = tokens[row, done[row] : done[row] + size]
        actual, cache = forward(
            MODEL, params, jnp.asarray(new), cache=cache, lengths=jnp.asarray(sizes)
        )
        for row, size in enumerate(sizes):
            expected = logits[row, done[row] : done[row] + size]
            assert_near(actual[row, :size], expected, EQUAL_FORWARD)
            done[row] += size
    assert done == lengths == cache.length.tolist()


@pytest.mark.parametrize(("width", "num_slots"), [(8, 16), (12, 32)])
def test_prefill_and_decoding_equal_one_forward(
    params: dict[str, Any],
    tokens: jax.Array,
    logits: np.ndarray,
    width: int,
    num_slots: int,
) -> None:
    lengths = jnp.asarray([8, 1, 5])
    prompts = tokens[:, :width]
    actual, cache = decoding.prefill(MODEL, params, prompts, lengths, num_slots)
    rows = jnp.arange(B)
    assert_near(actual, logits[rows, lengths - 1], EQUAL_FORWARD)
    assert cache.num_slots == num_slots
    for step in range(4):
        at = lengths + step
        actual, cache = decoding.decode_step(MODEL, params, cache, tokens[rows, at])
        assert_near(actual, logits[rows, at], EQUAL_FORWARD)
        assert cache.length.tolist() == (at + 1).tolist()


YARN = {"attention_factor": 1.2, "beta_fast": 4.0, "beta_slow": 0.1, "truncate": True}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("linear", {}),
        ("dynamic", {"original_max_seq_len": 4}),
        ("yarn", {"original_max_seq_len": 8} | YARN),
        ("llama3", {"original_max_seq_len": 64} | LLAMA3),
    ],
)
def test_decoding_equals_one_forward_with_scaled_positions(
    params: dict[str, Any],
    tokens: jax.Array,
    logits: np.ndarray,
    kind: Any,
    fields: dict[str, Any],
) -> None:
    scaling = RopeScaling(kind=kind, factor=8.0, **fields)
    model = Llama(TINY.replace(rope_scaling=scaling), Runtime())
    expected = np.asarray(forward(model, params, tokens)[0])
    assert np.abs(expected - logits).max() > 0.01
    lengths = jnp.asarray([8, 1, 5])
    actual, cache = decoding.prefill(model, params, tokens[:, :8], lengths, 16)
    for step in range(4):
        at = lengths + step
        assert_near(actual, expected[jnp.arange(B), at - 1], EQUAL_FORWARD)
        next_tokens = tokens[jnp.arange(B), at]
        actual, cache = decoding.decode_step(model, params, cache, next_tokens)


def test_new_keys_are_appended_after_each_rows_length_and_nowhere_else() -> None:
    empty = init_cache(TINY, 2, 8, jnp.float32)
    layer = DenseLayerCache(empty.layers[0].k - 1, empty.layers[0].v - 1)
    rows = CacheRows(jnp.asarray([0, 5]))
    new = jnp.arange(2 * 2 * 3 * 8, dtype=jnp.float32).reshape(2, 2, 3, 8)
    written = layer.append(new, -new, rows, runtime=Runtime(), mesh=None)
    expected = np.full((2, 2, 8, 8), -1, np.float32)
    expected[0, :, 0:3], expected[1, :, 5:8] = new[0], new[1]
    np.testing.assert_array_equal(written.k, expected)
    expected[0, :, 0:3], expected[1, :, 5:8] = -new[0], -new[1]
    np.testing.assert_array_equal(written.v, expected)


def test_a_cache_grows_and_does_not_shrink() -> None:
    small = init_cache(TINY, 2, 4, jnp.bfloat16)
    full = jax.tree.map(lambda x: x + 1, small)
    grown = grow(full, 7)
    assert grown.num_slots == 7
    assert grown.layers[1].k.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grown.layers[1].k[:, :, :4], full.layers[1].k)
    np.testing.assert_array_equal(grown.layers[1].k[:, :, 4:], 0)
    with pytest.raises(ValueError, match="cannot shrink 7 slots to 4"):
        grow(grown, 4)


def test_stacked_layers_refuse_a_cache(params: dict[str, Any]) -> None:
    runtime = Runtime(layer_layout="stacked")
    stacked = in_layout(params, runtime)
    cache = init_cache(TINY, 1, 4, jnp.float32)
    with pytest.raises(ConfigError, match="stacked layer layout takes no cache"):
        apply(Llama(TINY, runtime), stacked, jnp.zeros((1, 1), int), cache=cache)


# Independence


def test_neighbours_and_padding_change_no_bit(
    params: dict[str, Any], tokens: jax.Array, logits: np.ndarray
) -> None:
    others = random_tokens(TINY, B, T, seed=1)
    mixed = others.at[1, :7].set(tokens[1, :7])
    actual, _ = forward(MODEL, params, mixed)
    np.testing.assert_array_equal(actual[1, :7], logits[1, :7])
    assert not np.array_equal(actual[1, 7:], logits[1, 7:])


def test_neighbours_and_padding_change_no_bit_of_decoding(
    params: dict[str, Any], tokens: jax.Array
) -> None:
    def run(tokens: jax.Array, neighbour: int) -> Iterator[np.ndarray]:
        lengths = jnp.asarray([neighbour, 6, 12 - neighbour])
        logits, cache = decoding.prefill(MODEL, params, tokens, lengths, 16)
        yield np.asarray(logits[1])
        for step in range(3):
            new = tokens[:, 8 + step].at[1].set(step)
            logits, cache = decoding.decode_step(MODEL, params, cache, new)
            yield np.asarray(logits[1])

    others = random_tokens(TINY, B, T, seed=1).at[1, :6].set(tokens[1, :6])
    for one, other in zip(run(tokens, 3), run(others, 10), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_losses_depend_on_nothing_later_and_on_no_other_segment(
    params: dict[str, Any], packed: bool
) -> None:
    row = jnp.arange(T)[None]  # distinct tokens: a row of the embedding is a position
    segments = jnp.asarray(SEGMENTS[:1] if packed else [[0] * T])
    positions = jnp.asarray(RESTARTED[:1]) if packed else None

    def losses(embedding: jax.Array) -> jax.Array:
        changed = {**params["transformer"], "embedding": embedding}
        logits, _ = apply(
            MODEL,
            {**params, "transformer": changed},
            row,
            segment_ids=segments if packed else None,
            positions=positions,
        )
        return -jax.nn.log_softmax(logits[0])[:, 50]

    gradient = jax.jit(jax.jacrev(losses))(params["transformer"]["embedding"])
    touched = np.asarray(jnp.any(gradient != 0, axis=-1))[:, :T]
    ids = np.asarray(segments[0])
    sees = np.tri(T, dtype=bool) & (ids[:, None] == ids[None])
    np.testing.assert_array_equal(touched, sees)  # exactly 0, or not at all


def test_packed_sequences_equal_the_sequences_alone(
    params: dict[str, Any], tokens: jax.Array
) -> None:
    packed, _ = forward(
        MODEL,
        params,
        tokens,
        segment_ids=jnp.asarray(SEGMENTS),
        positions=jnp.asarray(RESTARTED),
    )
    alone = jnp.zeros_like(tokens)
    alone = alone.at[0, :4].set(tokens[0, 5:9]).at[1, :3].set(tokens[0, 9:12])
    alone = alone.at[2, :10].set(tokens[2, 1:11])
    logits, _ = forward(MODEL, params, alone)
    assert_near(packed[0, 5:9], logits[0, :4], EQUAL_FORWARD)
    assert_near(packed[0, 9:12], logits[1, :3], EQUAL_FORWARD)
    assert_near(packed[2, 1:11], logits[2, :10], EQUAL_FORWARD)


# One function in several forms


def test_logits_at_equal_a_slice(
    params: dict[str, Any], tokens: jax.Array, logits: np.ndarray
) -> None:
    at = jnp.asarray([[0, 11], [3, 3], [5, 0]])
    actual, _ = forward(MODEL, params, tokens, logits_at=at)
    expected = np.take_along_axis(logits, np.asarray(at)[..., None], axis=1)
    assert_near(actual, expected, EQUAL_FORWARD)


def test_grouped_heads_equal_repeated_heads(
    params: dict[str, Any], tokens: jax.Array, logits: np.ndarray
) -> None:
    group = TINY.num_heads // TINY.num_kv_heads
    repeated = TINY.replace(num_kv_heads=TINY.num_heads)

    def repeat(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key not in ("k_proj", "v_proj"):
            return leaf
        heads = leaf.reshape(TINY.embed_dim, TINY.num_kv_heads, TINY.head_dim)
        return jnp.repeat(heads, group, axis=1).reshape(TINY.embed_dim, -1)

    wide = jax.tree_util.tree_map_with_path(repeat, params)
    actual, _ = forward(Llama(repeated, Runtime()), wide, tokens)
    assert_near(actual, logits, EQUAL_FORWARD)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(model: Llama, params: Any, tokens: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        logits, _ = apply(model, params, tokens[:, :-1])
        scores = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def plain(params: dict[str, Any], tokens: jax.Array) -> Any:
    return loss_and_gradient(MODEL, params, tokens)


@pytest.mark.parametrize(
    ("layout", "remat"),
    [
        ("unrolled", "block"),
        ("stacked", "none"),
        ("stacked", "block"),
        ("stacked", "dots"),
    ],
)
def test_scan_and_remat_change_neither_loss_nor_gradient(
    params: dict[str, Any],
    tokens: jax.Array,
    plain: Any,
    layout: LayerLayout,
    remat: Remat,
) -> None:
    runtime = Runtime(layer_layout=layout, remat=remat)
    loss, gradient = loss_and_gradient(
        Llama(TINY, runtime), in_layout(params, runtime), tokens
    )
    assert_near(loss, plain[0], EQUAL_FORWARD)
    expected = flatten(in_layout(plain[1], runtime))
    assert flatten(gradient).keys() == expected.keys()
    for path, leaf in flatten(gradient).items():
        scale = float(jnp.abs(expected[path]).max())
        assert scale > 0, path
        difference = float(jnp.abs(leaf - expected[path]).max())
        assert difference < EQUAL_GRADIENT * scale, path


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("bfloat16", BFLOAT16_LOGITS), ("float16", FLOAT16_LOGITS)],
)
def test_narrow_dtypes_are_near_float32(
    params: dict[str, Any],
    tokens: jax.Array,
    logits: np.ndarray,
    dtype: Any,
    tolerance: float,
) -> None:
    runtime = Runtime(dtype=dtype)
    narrow = in_layout(params, runtime)
    actual, _ = forward(Llama(TINY, runtime), narrow, tokens)
    assert actual.dtype == jnp.float32
    error = np.abs(np.asarray(actual) - logits).max() / logits.std()
    assert error < tolerance
    # The logits are sums that nothing has rounded to the narrow dtype.
    assert np.any(np.asarray(actual) != np.asarray(actual.astype(dtype)))


def test_norm_softmax_and_rotation_are_float32_in_bfloat16(
    params: dict[str, Any], tokens: jax.Array
) -> None:
    runtime = Runtime(dtype="bfloat16")
    run = functools.partial(apply, Llama(TINY, runtime))
    jaxpr = jax.make_jaxpr(run)(in_layout(params, runtime), tokens)
    actual = dict.fromkeys(("rsqrt", "exp", "cos", "sin"), 0)
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in actual:
            actual[equation.primitive.name] += 1
            assert equation.invars[0].aval.dtype == jnp.float32, equation
    assert actual["rsqrt"] == 2 * TINY.num_layers + 1
    assert actual["exp"] >= TINY.num_layers
    assert actual["cos"] == actual["sin"] == 1


def equations(jaxpr: Any) -> Iterator[Any]:
    """All steps of a traced function, those of its inner functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_activations_have_the_runtimes_dtype(tokens: jax.Array) -> None:
    runtime = Runtime(dtype="bfloat16", param_dtype="float32")
    model = Llama(TINY, runtime)
    cache = init_cache(TINY, B, T, runtime.dtype)
    weights = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype("float32")}
    run = functools.partial(apply, model)
    logits, out = jax.eval_shape(run, weights, tokens, cache=cache)
    assert logits.dtype == jnp.float32
    assert isinstance(out, KVCache)
    assert out.layers[0].k.dtype == out.layers[0].v.dtype == jnp.bfloat16


# The scalar model, and initial weights


def test_scalar_model_shares_the_transformers_tree(
    params: dict[str, Any], tokens: jax.Array
) -> None:
    model = ScalarModel(SCALAR, Runtime())
    init = functools.partial(init_params, model)
    reward = jax.eval_shape(init, jax.random.key(0))
    assert set(reward) == {"transformer", "scalar_head"}
    assert jax.tree.structure(reward["transformer"]) == jax.tree.structure(
        params["transformer"]
    )
    head = params["lm_head"][:, 0]
    reward = {"transformer": params["transformer"], "scalar_head": head}
    actual, _ = forward(model, reward, tokens)
    assert actual.dtype == jnp.float32
    logits, _ = forward(MODEL, params, tokens)
    assert_near(actual, logits[..., 0], EQUAL_FORWARD)


def test_initial_weights_are_normal_and_norms_are_one() -> None:
    config = TINY.replace(vocab_size=500, num_layers=8)
    model = Llama(config, Runtime(layer_layout="stacked"))
    flat = flatten(init_params(model, jax.random.key(0)))
    for path, leaf in flat.items():
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
            continue
        into_stream = path.endswith(("o_proj", "down_proj"))
        expected = 0.02 / 4 if into_stream else 0.02
        # Five standard errors of a standard deviation, and of a mean.
        bound = 5 * expected / (2 * leaf.size) ** 0.5
        assert abs(float(leaf.std()) - expected) < bound, path
        assert abs(float(leaf.mean())) < 5 * expected / leaf.size**0.5, path
    layers = flat["transformer/layers/mlp/up_proj"]
    assert not np.array_equal(layers[0], layers[1])


def test_initial_weights_are_the_same_in_both_layouts() -> None:
    key = jax.random.key(3)
    unrolled = flatten(init_params(Llama(TINY, Runtime()), key))
    model = Llama(TINY, Runtime(layer_layout="stacked"))
    stacked = flatten(unstack_layers(init_params(model, key)))
    assert unrolled.keys() == stacked.keys()
    for path, leaf in unrolled.items():
        np.testing.assert_array_equal(leaf, stacked[path], path)
