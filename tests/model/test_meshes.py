"""The same code on meshes of eight devices: one device's numbers, in parts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.models import (
    TALKING,
    TINY,
    forward,
    in_layout,
    random_params,
    random_tokens,
    talking_model,
)
from support.tolerances import EQUAL_FORWARD, EQUAL_GRADIENT

from llama_jax.config import LlamaConfig
from llama_jax.data.batch import Batch
from llama_jax.generation.decode import decode_step, prefill
from llama_jax.generation.generate import generate
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.model.cache import NewCache
from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.params import flatten
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.sharding import make_mesh, param_shardings, parse_mesh
from llama_jax.train.losses import next_token_loss
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import TrainState, init_state
from llama_jax.train.step import make_train_step

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)

MESHES = (
    "data=8",
    "fsdp=8",
    "data=2,tensor=4",  # two key/value heads for four devices
    "data=2,fsdp=2,tensor=2",
    "sequence=8",
    "fsdp=2,sequence=2,tensor=2",
    "sequence=2,tensor=4",  # both
)
every_mesh = pytest.mark.parametrize("text", MESHES)
some_meshes = pytest.mark.parametrize(  # where each compiles for many seconds
    "text",
    [
        text if "tensor" in text else pytest.param(text, marks=pytest.mark.slow)
        for text in MESHES
    ],
)

SCALAR = TINY.replace(head="scalar")
B, T = 8, 16
FORWARD = Runtime()
TRAIN = Runtime(layer_layout="stacked", remat="block", rules=TRAINING_RULES)


def mesh_of(text: str) -> Any:
    return make_mesh(parse_mesh(text), jax.devices()[:8])


def placed(runtime: Runtime, mesh: Any, config: LlamaConfig = TINY) -> dict[str, Any]:
    params = in_layout(random_params(config), runtime)
    if mesh is None:
        return params
    return jax.device_put(params, param_shardings(config, runtime, mesh))


def batch(mesh: Any) -> Batch:
    """Rows of two packed records, of which the second half is learnt."""
    tokens = random_tokens(TINY, B, T)
    index = np.arange(T)
    ends = np.arange(4, 4 + B)[:, None]  # the first record's, row by row
    arrays = Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, axis=1),
        loss_mask=jnp.asarray((index[None] % 3 > 0) & (index[None] != ends - 1), float),
        segment_ids=jnp.asarray(1 + (index[None] >= ends), jnp.int32),
        positions=jnp.asarray(index - np.where(index[None] >= ends, ends, 0)),
    )
    if mesh is None:
        return arrays
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))
    return jax.device_put(arrays, rows)


def logits(mesh: Any) -> jax.Array:
    model, tokens = Llama(TINY, FORWARD, mesh), random_tokens(TINY, B, T)
    actual, _ = forward(model, placed(FORWARD, mesh), tokens)
    return actual  # type: ignore[no-any-return]


@functools.cache
def logits_alone() -> np.ndarray:
    return np.asarray(logits(None))


@every_mesh
def test_forward_equals_one_device(text: str) -> None:
    actual = logits(mesh_of(text))
    assert len(actual.sharding.device_set) == 8
    np.testing.assert_allclose(
        actual, logits_alone(), rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD
    )


def test_scalars_from_a_ring_are_in_the_order_of_the_sequence() -> None:
    tokens, mesh = random_tokens(TINY, B, T), mesh_of("sequence=4,tensor=2")
    actual, expected = (
        forward(
            ScalarModel(SCALAR, FORWARD, on),
            placed(FORWARD, on, SCALAR),
            tokens,
        )[0]
        for on in (mesh, None)
    )
    np.testing.assert_allclose(actual, expected, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD)


def test_logits_at_come_from_a_ring() -> None:
    mesh, indices = mesh_of("sequence=8"), jnp.tile(jnp.asarray([[15, 0, 7]]), (B, 1))
    actual, _ = forward(
        Llama(TINY, FORWARD, mesh),
        placed(FORWARD, mesh),
        random_tokens(TINY, B, T),
        logits_at=indices,
    )
    expected = logits_alone()[:, [15, 0, 7]]
    np.testing.assert_allclose(actual, expected, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD)


def trained(mesh: Any, accumulate: int = 1) -> tuple[TrainState, list[float]]:
    """Two steps of training, and their losses."""
    model = Llama(TINY, TRAIN, mesh)
    optimizer = make_optimizer(1e-2)
    step = make_train_step(
        lambda params, _, batch: next_token_loss(model, params, batch),
        optimizer,
        accumulate=accumulate,
    )
    state = init_state(placed(TRAIN, mesh), optimizer)
    losses = []
    for _ in range(2):
        state, metrics = step(state, {}, batch(mesh))
        losses.append(float(metrics.loss))
        assert not metrics.skipped
    return state, losses


@functools.cache
def trained_alone() -> tuple[TrainState, list[float]]:
    return trained(None)


@some_meshes
def test_training_equals_one_device(text: str) -> None:
    state, losses = trained(mesh_of(text))
    alone, expected = trained_alone()
    np.testing.assert_allclose(losses, expected, rtol=EQUAL_FORWARD)
    moments = [s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=has_moments)[:1]]
    first = [s.mu for s in jax.tree.leaves(alone.opt_state, is_leaf=has_moments)[:1]]
    # First moments are sums of gradients, which AdamW's division by their size is not.
    for path, leaf in flatten(first[0]).items():
        scale = float(jnp.abs(leaf).max())
        difference = np.abs(np.asarray(flatten(moments[0])[path]) - np.asarray(leaf))
        assert difference.max() < 2 * EQUAL_GRADIENT * scale, path


def has_moments(state: Any) -> bool:
    return hasattr(state, "mu")


@pytest.mark.parametrize(
    "text", ["fsdp=8", "fsdp=4,tensor=2", "data=2,tensor=4", "sequence=4,tensor=2"]
)
def test_weights_and_moments_are_sharded(text: str) -> None:
    mesh = mesh_of(text)
    ways = mesh.size // mesh.shape["data"]
    state = init_state(placed(TRAIN, mesh), make_optimizer(1e-3))
    for tree in (state.params, state.opt_state):
        matrices = [leaf for leaf in jax.tree.leaves(tree) if leaf.size > 500]
        assert matrices
        for leaf in matrices:
            here = leaf.addressable_shards[0].data.nbytes
            assert here * ways == leaf.nbytes, (leaf.shape, leaf.sharding)


def test_accumulated_micro_batches_equal_the_large_batch_on_a_mesh() -> None:
    _, losses = trained(mesh_of("data=2,fsdp=2,tensor=2"), accumulate=2)
    np.testing.assert_allclose(losses, trained_alone()[1], rtol=EQUAL_FORWARD)


@some_meshes
def test_decoding_equals_one_device(text: str) -> None:
    mesh = mesh_of(text)
    tokens = random_tokens(TINY, B, T)
    lengths = jnp.asarray([3, 16, 1, 8, 9, 15, 2, 4], jnp.int32)
    actual, expected = [], []
    for on, results in ((mesh, actual), (None, expected)):
        model, params = Llama(TINY, FORWARD, on), placed(FORWARD, on)
        logits, cache = prefill(model, params, tokens, lengths, 32)
        results.append(logits)
        if on is not None:
            keys = cache.layers[0].k
            assert keys.addressable_shards[0].data.nbytes * 8 == keys.nbytes
        for token in range(2):
            next_ids = jnp.full((B,), 5 + token, jnp.int32)
            logits, cache = decode_step(model, params, cache, next_ids)
            results.append(logits)
        if on is not None:
            keys = cache.layers[0].k
            assert keys.addressable_shards[0].data.nbytes * 8 == keys.nbytes
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD)


@pytest.mark.parametrize("text", ["data=2,tensor=4", "sequence=4,tensor=2"])
def test_several_tokens_are_written_into_cut_slots(text: str) -> None:
    tokens, mesh = random_tokens(TINY, B, T), mesh_of(text)
    model, params = Llama(TINY, FORWARD, mesh), placed(FORWARD, mesh)
    first, cache = forward(model, params, tokens[:, :5], cache=NewCache(32))
    then, _ = forward(model, params, tokens[:, 5:], cache=cache)
    joined = jnp.concatenate([first, then], axis=1)
    np.testing.assert_allclose(
        joined, logits_alone(), rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD
    )


@pytest.mark.parametrize("text", ["data=2,tensor=4", "fsdp=2,sequence=2,tensor=2"])
def test_generation_gives_the_same_tokens(text: str) -> None:
    config = TALKING.replace(num_layers=1)
    alone = talking_model(config)
    mesh = mesh_of(text)
    model = Llama(config, FORWARD, mesh)
    params = jax.device_put(alone.params, param_shardings(config, FORWARD, mesh))
    prompts = [[1, 50, 60], [1, 70], [1, 80, 90, 100, 110], [1, 300]]
    greedy = Sampling(temperature=0)
    requests = [Request(ids, max_new_tokens=6, sampling=greedy) for ids in prompts]
    expected = generate(alone, requests)
    actual = generate(alone._replace(model=model, params=params), requests)
    assert [c.token_ids for c in actual] == [c.token_ids for c in expected]
    assert all(len(c.token_ids) == 6 for c in actual)
