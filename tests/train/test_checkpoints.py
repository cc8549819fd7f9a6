"""Training checkpoints: bit for bit, on any mesh, the right ones kept and found."""

import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.errors import CheckpointError
from llama_jax.sharding import make_mesh
from llama_jax.train.checkpoints import TrainCheckpoints
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import TrainState, init_state, state_shapes


def state_of(name: Any, sizes: dict[str, int] | None = None) -> tuple[Any, Any]:
    """A state whose moments are not zero, and its shapes."""
    rng = np.random.default_rng(1)
    params: Any = {"w": rng.normal(size=(256, 128)), "scale": rng.normal(size=8)}
    mesh = None
    places: Any = {"w": None, "scale": None}
    if sizes:
        mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
        specs = {"w": PartitionSpec("fsdp", "tensor"), "scale": PartitionSpec()}
        places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {
        name: jax.device_put(np.float32(leaf), places[name])
        for name, leaf in params.items()
    }
    optimizer = make_optimizer(1e-3, name=name)
    state = init_state(params, optimizer)
    moments = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))(
        state.opt_state
    )
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding if mesh else None
        ),
        params,
    )
    state = TrainState(state.step + 5, state.params, moments)
    return state, state_shapes(shapes, optimizer, mesh)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * 0, tree)


def check_equal(actual: Any, wanted: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for one, other in zip(
        jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_a_state_is_restored_bit_for_bit(name: str, tmp_path: pathlib.Path) -> None:
    state, shapes = state_of(name)
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(state, {"data": {"epoch": 1}}, None)
        wanted = jax.device_get(state)
        # As the next step does: what was saved may be given away at once.
        jax.jit(
            lambda tree: jax.tree.map(lambda leaf: leaf * 0, tree), donate_argnums=0
        )(state)
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 5
        assert checkpoints.best() is None
        assert checkpoints.facts(5) == {"data": {"epoch": 1}}
        check_equal(checkpoints.restore(5, shapes), wanted)


@pytest.mark.parametrize(
    ("before", "after"),
    [({"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}), ({"tensor": 2}, None)],
)
def test_a_state_is_restored_onto_another_mesh(
    before: dict[str, int], after: dict[str, int] | None, tmp_path: pathlib.Path
) -> None:
    state, _ = state_of("adamw", before)
    other, shapes = state_of("adamw", after)
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {}, None)
        checkpoints.wait()
        restored = checkpoints.restore(5, shapes)
    check_equal(restored, jax.device_get(state))
    for one, wanted in zip(
        jax.tree.leaves(restored), jax.tree.leaves(other), strict=True
    ):
        assert one.sharding.is_equivalent_to(wanted.sharding, one.ndim)


def small(step: int) -> TrainState:
    params = {"x": jnp.full(3, float(step))}
    return TrainState(jnp.asarray(step, jnp.int32), params, ())


def steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_latest_and_the_best_are_kept(tmp_path: pathlib.Path) -> None:
    losses = [9.0, 4.0, None, 6.0, 5.0, None]
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            checkpoints.save(small(step), {}, loss)
        checkpoints.wait()
        assert steps(tmp_path) == [2, 5, 6]
        assert checkpoints.best() == 2
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.best() == 2
        assert checkpoints.latest() == 6
        checkpoints.save(small(7), {}, 1.0)
        checkpoints.wait()
        assert checkpoints.best() == 7
        assert steps(tmp_path) == [6, 7]


def test_an_incomplete_checkpoint_is_ignored_and_removed(
    tmp_path: pathlib.Path,
) -> None:
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1), {}, None)
        checkpoints.save(small(2), {}, None)
    half = tmp_path / "3.orbax-checkpoint-tmp"
    (tmp_path / "2").rename(half)  # as if the process had been killed before this
    with TrainCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(small(2), {}, None)
        checkpoints.wait()
    assert not half.exists()
    assert steps(tmp_path) == [1, 2]


def test_a_partly_removed_checkpoint_is_ignored(
    tmp_path: pathlib.Path,
) -> None:
    with TrainCheckpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(small(step), {}, float(step))
    for file in [*tmp_path.glob("1/*/*"), *tmp_path.glob("1/*")]:
        if file.is_file():
            file.unlink()  # and there the process was killed
    with TrainCheckpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        assert float(checkpoints.restore(3, shapes_of(small(3))).params["x"][0]) == 3.0
        checkpoints.save(small(4), {}, None)
        checkpoints.save(small(5), {}, None)
        checkpoints.wait()
        assert checkpoints.best() == 2
    assert steps(tmp_path) == [2, 4, 5]


def shapes_of(state: TrainState) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def test_a_damaged_checkpoint_is_refused_in_one_sentence(
    tmp_path: pathlib.Path,
) -> None:
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1), {"data": 1}, None)
    for file in tmp_path.glob("1/state/d/*"):
        file.write_bytes(b"")
    (facts,) = (tmp_path / "1" / "run").glob("metadata*")
    facts.write_text("{")
    with TrainCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="step 1 cannot be restored") as error:
            checkpoints.restore(1, shapes_of(small(1)))
        assert len(str(error.value).splitlines()) == 1
        with pytest.raises(CheckpointError, match="step 1 cannot be read"):
            checkpoints.facts(1)


def test_facts_are_json(tmp_path: pathlib.Path) -> None:
    facts = {"data": {"waiting": [[1, 0, 0]], "why": "é"}, "best": None, "seed": 0}
    with TrainCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(small(1), facts, 0.5)
        checkpoints.wait()
        assert checkpoints.facts(1) == facts == json.loads(json.dumps(facts))
