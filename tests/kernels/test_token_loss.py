"""The chunked loss equals the plain loss and its gradients, in less memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from support.attention_inputs import newest_only, no_bfloat16_product, quick_jit
from support.programs import needs_tpu_compiler

from llama_jax.kernels import greedy_tokens, token_losses
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.sharding import make_mesh

CLOSE = 1e-5  # absolute, of nats and their gradients in float32


def inputs(b: int, t: int, d: int = 8, v: int = 40, seed: int = 0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    x, head = rng.normal(size=(b, t, d)), rng.normal(size=(d, v))
    targets = rng.integers(v, size=(b, t))
    weights = rng.normal(size=(b, t)) * (rng.random((b, t)) < 0.7)
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, head, weights)]
    return arrays[0], arrays[1], jnp.asarray(targets), arrays[2]


def plain(x: Any, head: Any, targets: Any) -> Any:
    logits = jnp.matmul(x, head, precision="highest").astype(jnp.float32)
    scores = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


def with_gradient(losses: Any, x: Any, head: Any, targets: Any, weights: Any) -> Any:
    """Losses, and the gradients of their weighted sum."""

    def total(x: Any, head: Any) -> Any:
        per_token = losses(x, head, targets)
        return jnp.sum(weights * per_token), per_token

    both = quick_jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, per_token), gradients = both(x, head)
    return per_token, *gradients


@pytest.mark.parametrize(("b", "t", "chunk"), [(3, 8, 4), (2, 9, 4), (1, 5, 10)])
def test_losses_and_gradients_equal_those_of_the_plain_loss(
    b: int, t: int, chunk: int
) -> None:
    arrays = inputs(b, t)
    actual = with_gradient(functools.partial(token_losses, chunk=chunk), *arrays)
    for one, other in zip(actual, with_gradient(plain, *arrays), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=CLOSE)


@pytest.mark.slow
@settings(max_examples=8)  # each compiles two programs
@given(b=st.integers(1, 3), t=st.integers(1, 9), chunk=st.integers(1, 10))
def test_any_chunk_equals_the_plain_loss(b: int, t: int, chunk: int) -> None:
    test_losses_and_gradients_equal_those_of_the_plain_loss(b, t, chunk)


def test_losses_are_float32_and_gradients_have_the_weights_dtype() -> None:
    x, head, targets, weights = inputs(2, 7)
    half = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    losses, d_x, d_head = with_gradient(token_losses, *half, targets, weights)
    assert losses.dtype == jnp.float32
    assert d_x.dtype == d_head.dtype == jnp.bfloat16
    exact = with_gradient(plain, x, head, targets, weights)
    # bfloat16 has eight bits; a sum of eight products of size one.
    np.testing.assert_allclose(losses, exact[0], atol=0.1)
    np.testing.assert_allclose(d_head.astype(jnp.float32), exact[2], atol=0.1)
    mixed = x.astype(jnp.bfloat16), head
    assert with_gradient(token_losses, *mixed, targets, weights)[2].dtype == jnp.float32


@no_bfloat16_product
def test_a_tied_embedding_in_float32_has_a_gradient_from_bfloat16_rows() -> None:
    """Its transposed product over two axes would not be supported by XLA:CPU."""
    x, head, targets, weights = inputs(1, 64, d=64, v=512)

    def tied(x: Any, embedding: Any, targets: Any) -> Any:
        return token_losses(x, embedding.T, targets)

    d_embedding = with_gradient(tied, x.astype(jnp.bfloat16), head.T, targets, weights)[
        2
    ]
    exact = with_gradient(plain, x, head, targets, weights)[2]
    assert d_embedding.dtype == jnp.float32
    # bfloat16 has eight bits; numbers of size one.
    np.testing.assert_allclose(d_embedding.T, exact, atol=0.1)


def test_large_logits_do_not_overflow() -> None:
    x, head, targets, weights = inputs(2, 7)
    arrays = with_gradient(token_losses, x * 1e4, head, targets, weights)
    assert all(bool(jnp.isfinite(array).all()) for array in arrays)


def test_a_token_without_weight_has_no_gradient() -> None:
    x, head, targets, _ = inputs(1, 6)
    weights = jnp.asarray([[1.0, 0, 1, 0, 0, 1]])
    _, d_x, _ = with_gradient(token_losses, x, head, targets, weights)
    unweighted = np.asarray(weights[0]) == 0
    assert (np.asarray(d_x[0])[unweighted] == 0).all()
    assert (np.abs(np.asarray(d_x[0])[~unweighted]).max(-1) > 0).all()


@newest_only
def test_the_logits_of_a_batch_never_exist() -> None:
    b, t, d, v = 2, 1024, 32, 4096
    x, head, targets, weights = inputs(b, t, d, v)
    everything = 4 * b * t * v

    def temporaries(losses: Any) -> int:
        def total(x: Any, head: Any) -> Any:
            return jnp.sum(weights * losses(x, head, targets))

        compiled = jax.jit(jax.grad(total, (0, 1))).lower(x, head).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return int(analysis.temp_size_in_bytes)

    assert temporaries(plain) >= everything
    # The logits of a chunk and their gradient, once or twice each.
    chunked = temporaries(functools.partial(token_losses, chunk=64))
    assert chunked < 4 * everything * 64 // t


def test_the_loss_on_a_mesh_equals_that_on_one_device() -> None:
    arrays = inputs(4, 8)
    mesh = make_mesh({"data": 2, "tensor": 4})
    specs = P("data"), P(None, "tensor"), P("data"), P("data")
    sharded = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]
    losses = functools.partial(token_losses, chunk=4)
    actual, expected = with_gradient(losses, *sharded), with_gradient(losses, *arrays)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=CLOSE)


def test_an_empty_chunk_is_rejected() -> None:
    x, head, targets, _ = inputs(1, 6)
    with pytest.raises(ValueError, match="chunk must be positive, got 0"):
        token_losses(x, head, targets, chunk=0)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
def test_the_loss_of_a_large_batch_fits_a_tpu_chip() -> None:
    sharding = SingleDeviceSharding(tpu_devices("v5e:2x2")[0])

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def total(x: Any, head: Any, targets: Any) -> Any:
        return jnp.mean(token_losses(x, head, targets))

    b, t, d, v = 4, 4096, 4096, 32000  # Llama 2 7B's: 2.1 GB of logits
    shapes = (
        array((b, t, d), jnp.bfloat16),
        array((d, v), jnp.bfloat16),
        array((b, t), jnp.int32),
    )
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    # The head's gradient in float32, logits of 256 tokens of each row, and x in parts.
    logits, d_head, stream = 4 * b * 256 * v, 4 * d * v, 2 * b * t * d
    assert analysis.temp_size_in_bytes < d_head + 2 * logits + 3 * stream
    assert d_head + 2 * logits + 3 * stream < 4 * b * t * v


@settings(max_examples=4)
@given(b=st.integers(1, 3), t=st.integers(1, 9), chunk=st.integers(1, 10))
def test_greedy_tokens_are_those_of_the_whole_logits(
    b: int, t: int, chunk: int
) -> None:
    x, head, _, _ = inputs(b, t)
    logits = jnp.matmul(x, head, precision="highest")
    tokens, losses = greedy_tokens(x, head, chunk=chunk)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    best = jax.nn.log_softmax(logits).max(-1)
    np.testing.assert_allclose(losses, -best, rtol=1e-5, atol=1e-6)


def test_greedy_tokens_of_a_cut_vocabulary_take_the_lowest_of_equals() -> None:
    mesh = make_mesh({"tensor": 8}, jax.devices()[:8])
    x, head, _, _ = inputs(2, 5)
    head = head.at[:, 20:].set(head[:, :20])  # every id twice, on different devices
    cut = jax.shard_map(
        functools.partial(greedy_tokens, chunk=2, axis_name="tensor"),
        mesh=mesh,
        in_specs=(P(), P(None, "tensor")),
        out_specs=P(),
        check_vma=False,
    )
    tokens, losses = jax.jit(cut)(x, head)
    whole = greedy_tokens(x, head)
    np.testing.assert_array_equal(tokens, whole.tokens)
    np.testing.assert_allclose(losses, whole.losses, rtol=1e-6)
    assert tokens.max() < 20
    with pytest.raises(ValueError, match="chunk must be positive, got 0"):
        greedy_tokens(x, head, chunk=0)
