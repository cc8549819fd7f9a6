"""One step of training, held to float64: losses, gradients, updates, what it keeps."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.models import TINY, in_layout, random_params
from support.tolerances import TRAIN_GRADIENT, TRAIN_LOSS

from llama_jax.config import LlamaConfig
from llama_jax.data.batch import Batch
from llama_jax.errors import ConfigError
from llama_jax.model.lora import Lora, adapt, init_lora
from llama_jax.model.quantize import quantize_params
from llama_jax.model.transformer import Llama
from llama_jax.params import flatten, unflatten, unstack_layers
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, param_shardings, parse_mesh
from llama_jax.train.losses import LossSums, next_token_loss
from llama_jax.train.optimizer import (
    OptimizerName,
    decayed,
    make_optimizer,
    make_schedule,
)
from llama_jax.train.state import TrainState, init_state, state_shapes
from llama_jax.train.step import StepMetrics, make_train_step

B, T = 2, 12
STACKED = Runtime(layer_layout="stacked")
UNROLLED = Runtime(layer_layout="unrolled")
SHOWN = optax.trace(decay=0.0)
"""An optimizer whose state is the last gradient."""

TIED = TINY.replace(tied_embeddings=True)
FULL = TINY.replace(num_kv_heads=4)
SINGLE = TINY.replace(num_kv_heads=1)

every_optimizer = pytest.mark.parametrize(
    "name", ["adamw", "adafactor", "lion", "muon"]
)
every_layout = pytest.mark.parametrize("layout", ["unrolled", "stacked"])


def some_batch(config: LlamaConfig = TINY, rows: int = B, *, packed: bool) -> Batch:
    """Random rows; packed ones have three segments, the last of them empty."""
    draw = np.random.default_rng(rows)
    ids = draw.integers(config.vocab_size, size=(rows, T + 1)).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
    mask, segments = np.ones((rows, T), np.float32), np.ones((rows, T), np.int32)
    if packed:
        mask = draw.choice([0.0, 0.5, 1.0], size=(rows, T)).astype(np.float32)
        for row in range(rows):
            first, end = 3 + row % 4, 9 + row % 3
            segments[row, first:] = 2
            segments[row, end:] = 0
            positions[row, first:] -= first
            positions[row, end:] = mask[row, end:] = 0
    arrays: list[Any] = [ids[:, :-1], ids[:, 1:], mask, segments, positions]
    return Batch(*arrays)


def loss_of(config: LlamaConfig, runtime: Runtime, mesh: Any = None) -> Any:
    model = Llama(config, runtime, mesh)
    return lambda params, _, batch: next_token_loss(model, params, batch)


@functools.cache
def shown_step(config: LlamaConfig, runtime: Runtime, accumulate: int = 1) -> Any:
    """A step that leaves its gradient in the state, and no weight as it was."""
    return make_train_step(loss_of(config, runtime), SHOWN, accumulate=accumulate)


def first_step(
    config: LlamaConfig, runtime: Runtime, batch: Batch, accumulate: int = 1
) -> tuple[TrainState, StepMetrics]:
    state = init_state(in_layout(random_params(config), runtime), SHOWN)
    result: tuple[TrainState, StepMetrics]
    result = shown_step(config, runtime, accumulate)(state, {}, batch)
    return result


RATE = 3e-3


@functools.cache
def trainer(name: OptimizerName, accumulate: int = 1) -> tuple[Any, Any]:
    """An optimizer and its step, compiled for one kind of batch."""
    optimizer = make_optimizer(RATE, name=name)
    loss = loss_of(TINY, STACKED)
    return optimizer, make_train_step(loss, optimizer, accumulate=accumulate)


def judged(
    config: LlamaConfig, params: Mapping[str, Any], batch: Batch
) -> tuple[float, dict[str, Any]]:
    """Loss and gradient in float64, of unrolled weights."""
    tokens, targets, mask, segments, positions = map(np.asarray, batch)
    return oracle.loss_and_gradient(
        config,
        params,
        tokens.tolist(),
        targets.tolist(),
        mask,
        positions=positions.tolist(),
        segment_ids=segments.tolist(),
    )


def check_gradient(actual: Any, wanted: Any, runtime: Runtime | None = None) -> None:
    if runtime is not None and runtime.layer_layout == "stacked":
        actual = unstack_layers(actual)
    actual, wanted = flatten(actual), flatten(wanted)
    assert actual.keys() == wanted.keys()
    for path, leaf in wanted.items():
        exact = np.asarray(leaf, np.float64)
        difference = np.linalg.norm(np.asarray(actual[path], np.float64) - exact)
        assert difference <= TRAIN_GRADIENT * np.linalg.norm(exact), path


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("config", [TINY, TIED], ids=["plain", "tied"])
def test_the_oracles_gradient_is_the_slope_of_its_loss(
    config: LlamaConfig,
) -> None:
    batch = some_batch(config, packed=True)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params(config))
    loss, gradient = judged(config, params, batch)
    tokens, targets, mask, segments, positions = map(np.asarray, batch)

    def mean_of(params: Any) -> float:
        logits = oracle.logits(
            config,
            params,
            tokens.tolist(),
            positions=positions.tolist(),
            segment_ids=segments.tolist(),
        )
        logp = np.take_along_axis(oracle.log_softmax(logits), targets[..., None], -1)
        return float(-np.sum(logp[..., 0] * mask) / np.sum(mask))

    assert loss == pytest.approx(mean_of(params), rel=1e-12)
    draw = np.random.default_rng(0)
    for path, leaf in flatten(gradient).items():
        way = draw.normal(size=leaf.shape) * 1e-5
        there, back = (
            mean_of(unflatten({**flatten(params), path: flatten(params)[path] + turn}))
            for turn in (way, -way)
        )
        assert (there - back) / 2 == pytest.approx(
            np.sum(leaf * way), rel=1e-5, abs=1e-12
        ), path


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(
    ("config", "runtime"),
    [
        pytest.param(TINY, STACKED, id="grouped"),
        pytest.param(TINY, UNROLLED, id="unrolled"),
        pytest.param(FULL, STACKED, id="full", marks=pytest.mark.slow),
        pytest.param(SINGLE, STACKED, id="single", marks=pytest.mark.slow),
        pytest.param(TIED, STACKED, id="tied"),
    ],
)
def test_loss_and_gradient_of_a_step_are_those_in_float64(
    config: LlamaConfig, runtime: Runtime, packed: bool
) -> None:
    batch = some_batch(config, packed=packed)
    state, metrics = first_step(config, runtime, batch)
    loss, gradient = judged(config, random_params(config), batch)
    assert float(metrics.loss) == pytest.approx(loss, rel=TRAIN_LOSS)
    assert float(metrics.weight) == np.sum(batch.loss_mask)
    check_gradient(state.opt_state.trace, gradient, runtime)
    norm = math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=TRAIN_GRADIENT)
    assert not metrics.skipped


@pytest.mark.parametrize(
    ("remat", "layout"),
    [
        ("block", "stacked"),
        pytest.param("dots", "stacked", marks=pytest.mark.slow),
        pytest.param("block", "unrolled", marks=pytest.mark.slow),
        pytest.param("dots", "unrolled", marks=pytest.mark.slow),
    ],
)
def test_remat_changes_no_gradient(remat: Any, layout: Any) -> None:
    batch = some_batch(packed=True)
    runtime = Runtime(remat=remat, layer_layout=layout)
    state, _ = first_step(TINY, runtime, batch)
    check_gradient(state.opt_state.trace, judged_once()[1], runtime)


@functools.cache
def judged_once() -> tuple[float, dict[str, Any]]:
    return judged(TINY, random_params(TINY), some_batch(packed=True))


@pytest.mark.parametrize("parts", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_accumulated_parts_equal_the_whole_batch(parts: int) -> None:
    batch = some_batch(rows=32, packed=True)
    assert isinstance(batch.loss_mask, np.ndarray)
    batch.loss_mask[1::4] = 0  # so that parts weigh differently, and one nothing
    whole, wanted = first_step(TINY, STACKED, batch)
    state, metrics = first_step(TINY, STACKED, batch, accumulate=parts)
    assert float(metrics.loss) == pytest.approx(float(wanted.loss), rel=TRAIN_LOSS)
    assert float(metrics.weight) == float(wanted.weight)
    assert not metrics.skipped
    check_gradient(state.opt_state.trace, whole.opt_state.trace)


def test_a_batch_that_is_not_divisible_into_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 rows cannot be cut into 5 equal parts"):
        first_step(TINY, STACKED, some_batch(rows=32, packed=False), accumulate=5)


def test_accumulated_parts_report_the_metrics_of_a_custom_loss() -> None:
    def loss(params: Any, frozen: Any, batch: Any) -> LossSums:
        errors = (batch["x"] * params["w"] - frozen["y"]) ** 2
        return LossSums(
            jnp.sum(errors), jnp.float32(errors.size), {"x": batch["x"].sum()}
        )

    x = np.arange(8, dtype=np.float32)
    for parts in (1, 4):
        state = init_state({"w": jnp.float32(2)}, SHOWN)
        step = make_train_step(loss, SHOWN, accumulate=parts)
        state, metrics = step(state, {"y": jnp.float32(1)}, {"x": x})
        assert float(metrics.loss) == np.mean((2 * x - 1) ** 2)
        assert float(metrics.metrics["x"]) == np.mean(x)
        assert float(state.opt_state.trace["w"]) == np.mean(2 * x * (2 * x - 1))


def test_five_steps_of_adamw_are_those_in_float64() -> None:
    b1, b2, eps, decay = 0.9, 0.95, 1e-5, 0.1
    optimizer, step = trainer("adamw")
    state = init_state(in_layout(random_params(TINY), STACKED), optimizer)
    batch = some_batch(packed=True)
    weights = flatten(random_params(TINY))
    exact = {path: np.asarray(leaf, np.float64) for path, leaf in weights.items()}
    first, second = (dict.fromkeys(exact, 0.0) for _ in range(2))
    for number in range(1, 6):
        state, metrics = step(state, {}, batch)
        loss, tree = judged(TINY, unflatten(exact), batch)
        assert float(metrics.loss) == pytest.approx(loss, rel=TRAIN_LOSS)
        gradient = flatten(tree)
        norm = math.sqrt(sum(np.sum(leaf**2) for leaf in gradient.values()))
        for path, weight in exact.items():
            g = gradient[path] / max(norm, 1.0)
            first[path] = b1 * first[path] + (1 - b1) * g
            second[path] = b2 * second[path] + (1 - b2) * g**2
            root = np.sqrt(second[path] / (1 - b2**number))
            way = first[path] / (1 - b1**number) / (root + eps)
            pull = 0.0 if path.endswith("scale") else decay * weight
            exact[path] = weight - RATE * (way + pull)


@pytest.mark.parametrize("clip", [0.25, 1e3, None])
def test_gradients_are_clipped_by_their_global_norm(
    clip: float | None,
) -> None:
    optimizer = make_optimizer(1e-3, clip=clip)
    gradient = judged_once()[1]
    norm = math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    assert 0.25 < norm < 1e3
    params = random_params(TINY)
    given = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient)
    _, state = jax.jit(optimizer.update)(given, optimizer.init(params), params)
    short = min(1.0, (clip or math.inf) / norm)
    wanted = jax.tree.map(lambda g: 0.1 * short * g, gradient)
    check_gradient(moments_of(state).mu, wanted)


def moments_of(opt_state: Any) -> Any:
    (moments,) = (
        s for s in jax.tree.leaves(opt_state, is_leaf=has_moments) if has_moments(s)
    )
    return moments


def has_moments(state: Any) -> bool:
    return hasattr(state, "mu")


@every_optimizer
@every_layout
def test_decay_pulls_all_but_norms_by_the_learning_rate(
    name: OptimizerName, layout: Any
) -> None:
    params = in_layout(random_params(TINY), Runtime(layer_layout=layout))
    # Decay is applied after the step's direction, so the difference of two optimizers
    # with the same gradient is all that it does.
    gradient = jax.tree.map(lambda x: 0.01 * jnp.sin(7 * x), params)
    with_it, without = (
        make_optimizer(0.5, name=name, weight_decay=decay) for decay in (0.125, 0.0)
    )
    decaying, plain = (
        flatten(one.update(gradient, one.init(params), params)[0])
        for one in (with_it, without)
    )
    for path, weight in flatten(params).items():
        pull = 0.0 if path.endswith("scale") else -0.5 * 0.125 * np.asarray(weight)
        np.testing.assert_allclose(
            np.asarray(decaying[path]) - np.asarray(plain[path]), pull, atol=1e-6
        )
    marked = flatten(decayed(params))
    assert {path for path, on in marked.items() if not on} == {
        path for path in marked if path.endswith("norm/scale")
    }


@every_optimizer
def test_every_optimizer_lowers_the_loss(name: OptimizerName) -> None:
    batch = some_batch(packed=True)
    optimizer, step = trainer(name)
    state = init_state(in_layout(random_params(TINY), STACKED), optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step(state, {}, batch)
        assert not metrics.skipped
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.7 * losses[0]


@every_layout
def test_muon_moves_matrices_of_layers_by_orthogonal_steps(layout: Any) -> None:
    params = in_layout(random_params(TINY), Runtime(layer_layout=layout))
    gradient = jax.tree.map(lambda x: 0.01 * jnp.sin(7 * x), params)
    optimizer = make_optimizer(1.0, name="muon", weight_decay=0.0, clip=None)
    update, _ = optimizer.update(gradient, optimizer.init(params), params)
    for path, leaf in flatten(update).items():
        matrices = np.asarray(leaf)
        if "/layers/" not in path or path.endswith("scale"):
            # The first step of NAdam is as long for every number.
            np.testing.assert_allclose(
                np.abs(matrices), np.abs(matrices).max(), rtol=0.01
            )
            continue
        values = np.linalg.svd(matrices, compute_uv=False)
        wanted = 0.2 * max(matrices.shape[-2:]) ** 0.5
        # Five steps of its iteration bring singular values near one, not to it.
        assert values.max() < 1.3 * wanted, path
        assert values.mean() > 0.7 * wanted, path


def test_the_first_update_has_the_schedules_first_rate() -> None:
    def loss(params: Any, _: Any, batch: Any) -> LossSums:
        return LossSums(jnp.sum(params["w"] * batch), jnp.float32(1))

    schedule = make_schedule("cosine", 1e-2, steps=10, warmup=4)
    optimizer = make_optimizer(schedule, name="lion", weight_decay=0.0)
    step = make_train_step(loss, optimizer)
    state, before = init_state({"w": jnp.float32(0)}, optimizer), 0.0
    for number in range(6):
        state, _ = step(state, {}, jnp.float32(2))
        after = float(state.params["w"])
        # Lion's updates are as long as the rate.
        assert before - after == pytest.approx(float(schedule(number)), rel=1e-4)
        before = after


@given(
    name=st.sampled_from(["cosine", "linear", "constant"]),
    steps=st.integers(1, 500),
    part=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_schedules_rise_and_fall_as_their_formulas(
    name: Any, steps: int, part: float, final: float
) -> None:
    warmup = int(part * steps)
    schedule = make_schedule(name, 2.0, steps=steps, warmup=warmup, final=final)
    for step in {
        0,
        warmup // 2,
        max(warmup - 1, 0),
        warmup,
        (warmup + steps) // 2,
        steps,
    }:
        done = (step - warmup) / max(steps - warmup, 1)
        if step < warmup:
            wanted = 2 * (step + 1) / warmup
        elif name == "cosine":
            wanted = 2 * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
        else:
            wanted = 2 * (1 - (1 - final) * done) if name == "linear" else 2.0
        assert float(schedule(step)) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_cosine_ends_at_a_tenth_by_default() -> None:
    schedule = make_schedule("cosine", 3e-4, steps=100, warmup=10)
    assert float(schedule(9)) == pytest.approx(3e-4)
    assert float(schedule(10)) == pytest.approx(3e-4)
    assert float(schedule(100)) == pytest.approx(3e-5)
    assert float(schedule(1000)) == pytest.approx(3e-5)


@pytest.mark.parametrize(
    "numbers",
    [
        {"peak": 0.0, "steps": 5},
        {"peak": math.nan, "steps": 5},
        {"peak": 1.0, "steps": 0},
        {"peak": 1.0, "steps": 5, "warmup": 6},
        {"peak": 1.0, "steps": 5, "final": 1.5},
    ],
)
def test_a_schedule_with_values_out_of_range_is_refused(numbers: Any) -> None:
    with pytest.raises(ConfigError, match="the peak must be positive"):
        make_schedule("cosine", **numbers)


@pytest.mark.wrong_types
def test_an_unknown_optimizer_or_schedule_is_refused() -> None:
    wrong: Any = "adam"
    with pytest.raises(ConfigError, match="name is 'adam'; choose from adamw, "):
        make_optimizer(1e-3, name=wrong)
    with pytest.raises(ConfigError, match="name is 'adam'; choose from cosine, "):
        make_schedule(wrong, 1e-3, steps=5)


def broken(batch: Batch, how: str) -> Batch:
    mask = np.array(batch.loss_mask)
    if how == "no targets":
        mask[:] = 0
    else:
        mask[0, 2] = {"infinite": np.inf, "not a number": np.nan}[how]
    arrays: Any = batch._replace(loss_mask=mask)  # type: ignore[arg-type]
    return arrays


@pytest.mark.parametrize("how", ["infinite", "not a number", "no targets"])
@pytest.mark.parametrize(
    ("name", "accumulate"),
    [
        ("adamw", 1),
        pytest.param("adafactor", 1, marks=pytest.mark.slow),
        pytest.param("lion", 1, marks=pytest.mark.slow),
        pytest.param("adamw", 2, marks=pytest.mark.slow),
    ],
)
def test_a_batch_without_a_finite_loss_updates_only_the_step_number(
    name: OptimizerName, how: str, accumulate: int
) -> None:
    optimizer, step = trainer(name, accumulate)
    state = init_state(in_layout(random_params(TINY), STACKED), optimizer)
    good = some_batch(packed=True)
    state, metrics = step(state, {}, good)
    assert (int(state.step), bool(metrics.skipped)) == (1, False)
    before = bits(state[1:])
    state, metrics = step(state, {}, broken(good, how))
    assert (int(state.step), bool(metrics.skipped)) == (2, True)
    assert not np.isfinite(float(metrics.loss))
    assert bits(state[1:]) == before
    state, metrics = step(state, {}, good)
    assert (int(state.step), bool(metrics.skipped)) == (3, False)
    assert bits(state.params) != before[: len(jax.tree.leaves(state.params))]


def test_a_gradient_that_is_not_finite_is_skipped_even_if_the_loss_is_finite() -> None:
    def loss(params: Any, _: Any, batch: Any) -> LossSums:
        return LossSums(jnp.sqrt(params["w"] * batch), jnp.float32(1))

    optimizer = make_optimizer(1e-3)
    state = init_state({"w": jnp.float32(2)}, optimizer)
    before = bits(state[1:])
    state, metrics = make_train_step(loss, optimizer)(state, {}, jnp.float32(0))
    assert bool(metrics.skipped)
    assert np.isfinite(float(metrics.loss))
    assert bits(state[1:]) == before


HALF = Runtime(
    dtype="bfloat16", param_dtype="float32", layer_layout="stacked", remat="block"
)


def test_products_in_bfloat16_leave_weights_and_gradients_in_float32() -> None:
    batch = some_batch(packed=True)
    state, metrics = first_step(TINY, HALF, batch)
    for leaf in jax.tree.leaves((state.params, state.opt_state, metrics)):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)
    exact = judged_once()[0]
    assert float(metrics.loss) != exact
    assert float(metrics.loss) == pytest.approx(exact, rel=2**-7)


@every_optimizer
def test_a_step_keeps_every_dtype_of_its_state(name: OptimizerName) -> None:
    optimizer = make_optimizer(1e-2, name=name)
    step = make_train_step(loss_of(TINY, HALF), optimizer)
    params = jax.eval_shape(lambda: in_layout(random_params(TINY), HALF))
    given = state_shapes(params, optimizer)
    state, _ = jax.eval_shape(step, given, {}, some_batch(packed=True))
    assert state == given
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)


def test_first_moments_may_be_stored_in_bfloat16() -> None:
    optimizer = make_optimizer(1e-3, moment_dtype=jnp.bfloat16)
    step = make_train_step(loss_of(TINY, STACKED), optimizer)
    params = jax.eval_shape(lambda: in_layout(random_params(TINY), STACKED))
    given = state_shapes(params, optimizer)
    state, _ = jax.eval_shape(step, given, {}, some_batch(packed=True))
    assert state == given
    moments = moments_of(state.opt_state)
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mu)} == {
        jnp.dtype("bfloat16")
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.nu)} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        (None, "adamw"),
        pytest.param(None, "adafactor", marks=pytest.mark.slow),
        pytest.param(None, "lion", marks=pytest.mark.slow),
        pytest.param("fsdp=4,tensor=2", "adamw"),
        pytest.param("fsdp=4,tensor=2", "adafactor", marks=pytest.mark.slow),
        pytest.param("data=8", "lion", marks=pytest.mark.slow),
    ],
)
def test_a_step_compiles_once_and_donates_its_state(
    name: OptimizerName, mesh: str | None
) -> None:
    on = None
    params = in_layout(random_params(TINY), STACKED)
    if mesh is not None:
        if len(jax.devices()) < 8:
            pytest.skip("needs eight devices (tests/conftest.py)")
        on = make_mesh(parse_mesh(mesh), jax.devices()[:8])
        places = param_shardings(TINY, STACKED, on)
        params = jax.device_put(params, places)
    optimizer, step = trainer(name)
    if on is not None:
        step = make_train_step(loss_of(TINY, STACKED, on), optimizer)
    shapes = state_shapes(params, optimizer, on)
    state = init_state(params, optimizer)
    batch = some_batch(rows=2 if on is None else 8, packed=True)
    for _ in range(3):
        old = jax.tree.leaves(state)
        where = [leaf.sharding for leaf in old]
        state, metrics = step(state, {}, batch)
        assert not metrics.skipped
        assert all(leaf.is_deleted() for leaf in old)
        for leaf, sharding in zip(jax.tree.leaves(state), where, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert step.num_programs == 1  # as all uses had such a batch
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


LORA = Lora(rank=3, alpha=6)


@functools.cache
def some_adapters() -> Any:
    """Unrolled, as after a few steps: b is not zero."""
    first = init_lora(TINY, jax.random.key(1), LORA)
    draw = np.random.default_rng(1)
    return unstack_layers(
        jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype("f4"), first)
    )


def of_adapters(runtime: Runtime) -> Any:
    model = Llama(TINY, runtime)

    def loss(adapters: Any, frozen: Any, batch: Any) -> LossSums:
        return next_token_loss(model, adapt(frozen, adapters, LORA.scaling), batch)

    return loss


def test_the_gradient_of_adapters_is_that_of_the_merged_weights() -> None:
    runtime = STACKED
    base, adapters = random_params(TINY), flatten(some_adapters())
    merged = {**flatten(base)}
    pairs = {path.rpartition("/")[0] for path in adapters}
    exact = {path: np.asarray(leaf, np.float64) for path, leaf in adapters.items()}
    for path in pairs:
        product = LORA.scaling * exact[f"{path}/a"] @ exact[f"{path}/b"]
        merged[path] = np.asarray(merged[path], np.float64) + product
    batch = some_batch(packed=True)
    loss, tree = judged(TINY, unflatten(merged), batch)
    of_merged, wanted = flatten(tree), {}
    for path in pairs:
        g, a, b = of_merged[path], exact[f"{path}/a"], exact[f"{path}/b"]
        wanted |= {
            f"{path}/a": LORA.scaling * g @ b.T,
            f"{path}/b": LORA.scaling * a.T @ g,
        }
    step = make_train_step(of_adapters(runtime), SHOWN)
    state = init_state(in_layout(some_adapters(), runtime), SHOWN)
    state, metrics = step(state, in_layout(base, runtime), batch)
    assert float(metrics.loss) == pytest.approx(loss, rel=TRAIN_LOSS)
    check_gradient(state.opt_state.trace, unflatten(wanted), runtime)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(None, marks=pytest.mark.slow),
        "int4",
        pytest.param("int8", marks=pytest.mark.slow),
        pytest.param("nf4", marks=pytest.mark.slow),
    ],
)
def test_only_adapters_are_trained(kind: Any) -> None:
    frozen = in_layout(random_params(TINY), STACKED)
    if kind is not None:
        frozen = quantize_params(frozen, kind)
    optimizer = make_optimizer(1e-2)
    first = init_lora(TINY, jax.random.key(1), LORA)
    paths = set(flatten(first))
    count = TINY.num_layers * LORA.rank * (2 * 64 + 2 * 48 + 3 * 80)
    assert sum(leaf.size for leaf in jax.tree.leaves(first)) == count
    state, before = init_state(first, optimizer), bits(frozen)
    old = {path: np.asarray(leaf) for path, leaf in flatten(first).items()}
    step = make_train_step(of_adapters(STACKED.replace(remat="block")), optimizer)
    losses = []
    for _ in range(10):
        state, metrics = step(state, frozen, some_batch(packed=True))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.95 * losses[0]
    assert bits(frozen) == before
    assert set(flatten(state.params)) == paths
    for path, leaf in flatten(state.params).items():
        assert not np.array_equal(leaf, old[path]), path
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * count
