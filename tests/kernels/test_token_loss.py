"""The chunked loss: the plain one's values and gradients, in a part of its memory."""

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


def judged(losses: Any, x: Any, head: Any, targets: Any, weights: Any) -> Any:
    """Losses, and the gradients of their weighted sum."""

    def total(x: Any, head: Any) -> Any:
        found = losses(x, head, targets)
        return jnp.sum(weights * found), found

    (_, found), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
        x, head
    )
    return found, *gradients


@settings(max_examples=8)  # each compiles two programs
@given(b=st.integers(1, 3), t=st.integers(1, 9), chunk=st.integers(1, 10))
def test_values_and_gradients_are_those_of_the_plain_loss(
    b: int, t: int, chunk: int
) -> None:
    arrays = inputs(b, t)
    found = judged(functools.partial(token_losses, chunk=chunk), *arrays)
    for one, other in zip(found, judged(plain, *arrays), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=CLOSE)


def test_losses_are_float32_and_gradients_have_the_weights_dtype() -> None:
    x, head, targets, weights = inputs(2, 7)
    half = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    losses, of_x, of_head = judged(token_losses, *half, targets, weights)
    assert losses.dtype == jnp.float32
    assert of_x.dtype == of_head.dtype == jnp.bfloat16
    exact = judged(plain, x, head, targets, weights)
    # bfloat16 has eight bits; a sum of eight products of size one.
    np.testing.assert_allclose(losses, exact[0], atol=0.1)
    np.testing.assert_allclose(of_head.astype(jnp.float32), exact[2], atol=0.1)
    kept = x.astype(jnp.bfloat16), head
    assert judged(token_losses, *kept, targets, weights)[2].dtype == jnp.float32


def test_a_tied_embedding_in_float32_has_a_gradient_from_bfloat16_rows() -> None:
    """Once more turned round, its product over two axes is one XLA:CPU cannot do."""
    x, head, targets, weights = inputs(1, 64, d=64, v=512)

    def tied(x: Any, embedding: Any, targets: Any) -> Any:
        return token_losses(x, embedding.T, targets)

    found = judged(tied, x.astype(jnp.bfloat16), head.T, targets, weights)[2]
    exact = judged(plain, x, head, targets, weights)[2]
    assert found.dtype == jnp.float32
    # bfloat16 has eight bits; numbers of size one.
    np.testing.assert_allclose(found.T, exact, atol=0.1)


def test_large_logits_do_not_overflow() -> None:
    x, head, targets, weights = inputs(2, 7)
    found = judged(token_losses, x * 1e4, head, targets, weights)
    assert all(bool(jnp.isfinite(array).all()) for array in found)


def test_a_token_without_weight_has_no_gradient() -> None:
    x, head, targets, _ = inputs(1, 6)
    weights = jnp.asarray([[1.0, 0, 1, 0, 0, 1]])
    _, of_x, _ = judged(token_losses, x, head, targets, weights)
    silent = np.asarray(weights[0]) == 0
    assert (np.asarray(of_x[0])[silent] == 0).all()
    assert (np.abs(np.asarray(of_x[0])[~silent]).max(-1) > 0).all()


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
    # Those of a chunk and their gradient, once or twice each.
    chunked = temporaries(functools.partial(token_losses, chunk=64))
    assert chunked < 4 * everything * 64 // t


def test_the_loss_on_a_mesh_is_that_of_one_device() -> None:
    arrays = inputs(4, 8)
    mesh = make_mesh({"data": 2, "tensor": 4})
    places = P("data"), P(None, "tensor"), P("data"), P("data")
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, places, strict=True)
    ]
    losses = functools.partial(token_losses, chunk=4)
    found, wanted = judged(losses, *placed), judged(losses, *arrays)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=CLOSE)


def test_a_chunk_of_nothing_is_refused() -> None:
    x, head, targets, _ = inputs(1, 6)
    with pytest.raises(ValueError, match="chunk is 0"):
        token_losses(x, head, targets, chunk=0)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
def test_the_loss_of_a_large_batch_fits_a_tpu_chip() -> None:
    place = SingleDeviceSharding(tpu_devices("v5e:2x2")[0])

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

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
    # The head's gradient in float32, 256 tokens' logits of each row, and x in parts.
    logits, of_head, stream = 4 * b * 256 * v, 4 * d * v, 2 * b * t * d
    assert analysis.temp_size_in_bytes < of_head + 2 * logits + 3 * stream
    assert of_head + 2 * logits + 3 * stream < 4 * b * t * v


@settings(max_examples=8)
@given(b=st.integers(1, 3), t=st.integers(1, 9), chunk=st.integers(1, 10))
def test_greedy_tokens_are_those_of_the_whole_logits(
    b: int, t: int, chunk: int
) -> None:
    x, head, _, _ = inputs(b, t)
    logits = jnp.matmul(x, head, precision="highest")
    tokens = greedy_tokens(x, head, chunk=chunk)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


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
    tokens = jax.jit(cut)(x, head)
    np.testing.assert_array_equal(tokens, greedy_tokens(x, head))
    assert tokens.max() < 20
    with pytest.raises(ValueError, match="chunk must be positive, got 0"):
        greedy_tokens(x, head, chunk=0)
