"""The loop around a step: what is read when, what is called, what ends it."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.batch import Batch
from llama_jax.errors import DataError, TrainError
from llama_jax.train.evaluate import evaluate, make_evaluate
from llama_jax.train.loop import Callbacks, fit
from llama_jax.train.losses import LossSums
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.pump import count_tokens
from llama_jax.train.state import TrainState, init_state
from llama_jax.train.step import StepMetrics, make_train_step


def squares(params: Any, frozen: Any, batch: Any) -> LossSums:
    """How far a number is from those of the batch, of which some count."""
    errors = (params["x"] - batch["wanted"]) ** 2
    weights = batch["weights"]
    counted = jnp.where(weights > 0, errors * weights, 0.0)
    return LossSums(jnp.sum(counted), jnp.sum(weights), {"most": jnp.max(errors)})


STEP = make_train_step(squares, make_optimizer(0.1, weight_decay=0.0, clip=None))


def start(x: float = 5.0) -> TrainState:
    optimizer = make_optimizer(0.1, weight_decay=0.0, clip=None)
    return init_state({"x": jnp.asarray(x, jnp.float32)}, optimizer)


def batches(count: int, *, empty: int = 0, broken: tuple[int, ...] = ()) -> Any:
    """Numbers; a batch may have nothing that counts, or something not finite."""
    for number in range(1, count + 1):
        wanted = np.arange(4, dtype=np.float32) + number / 8
        if number in broken:
            wanted[2] = np.nan
        weights = np.full(4, float(number != empty), np.float32)
        yield {"wanted": wanted, "weights": weights}


def train(count: int, calls: Callbacks | None = None, **options: Any) -> Any:
    made = {key: options.pop(key) for key in ("empty", "broken") if key in options}
    return fit(
        STEP, start(), {}, batches(count, **made), calls or Callbacks(), **options
    )


def test_every_step_is_recorded_once_with_its_numbers() -> None:
    records: list[dict[str, Any]] = []
    fitted = train(
        7, Callbacks(record=records.append), learning_rate=lambda update: 10.0 + update
    )
    assert [record["step"] for record in records] == list(range(1, 8))
    assert [record["learning_rate"] for record in records] == [
        10.0 + n for n in range(7)
    ]
    assert records[-1]["loss"] < records[0]["loss"]
    assert int(fitted.state.step) == 7
    assert not fitted.stopped
    for record in records:
        assert record["targets"] == record["tokens"] == 4
        assert record["tokens_per_second"] == pytest.approx(4 / record["seconds"])
        assert record["data_seconds"] >= 0
        assert record["grad_norm"] > 0
        assert record["most"] > 0
        assert record["skipped"] is False
    # A batch is waited for while the step before it runs, in that one's seconds.
    waited, took = (
        sum(record[name] for record in records) for name in ("data_seconds", "seconds")
    )
    assert waited <= took


def test_a_step_is_dispatched_before_the_last_ones_metrics_are_read() -> None:
    events: list[str] = []

    class Later:
        """A number that tells when it is read."""

        def __init__(self, step: int) -> None:
            self.step = step

        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            events.append(f"read {self.step}")
            return np.ones(())

    def step(state: TrainState, _: Any, batch: Any) -> Any:
        number = int(state.step) + 1
        events.append(f"dispatch {number}")
        one = np.ones(())
        metrics = StepMetrics(Later(number), one, one, np.zeros((), bool), {})  # type: ignore[arg-type]
        return state._replace(step=number), metrics  # type: ignore[arg-type]

    fit(step, TrainState(0, None, None), {}, batches(3))  # type: ignore[arg-type]
    assert events == [
        "dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "read 3",
    ]  # fmt: skip


def test_due_callbacks_run_before_the_next_batch_is_read() -> None:
    events: list[str] = []

    def taken() -> Any:
        for number, batch in enumerate(batches(4), start=1):
            events.append(f"batch {number}")
            yield batch

    def evaluation(state: TrainState) -> dict[str, float]:
        events.append(f"evaluate {int(state.step)}")
        return {"eval_loss": 9.0 - int(state.step)}

    calls = Callbacks(
        record=lambda record: events.append(f"record {record['step']}"),
        evaluate=evaluation,
        sample=lambda _, record: events.append(f"sample {record['step']}"),
        save=lambda _, record: events.append(f"save {record['step']}"),
        eval_every=2,
        sample_every=2,
        save_every=2,
    )
    fit(STEP, start(), {}, taken(), calls)
    assert events == [
        "batch 1", "batch 2", "record 1",
        "evaluate 2", "record 2", "sample 2", "save 2",
        "batch 3", "batch 4", "record 3",
        "evaluate 4", "record 4", "sample 4", "save 4",
    ]  # fmt: skip


def test_the_last_step_is_evaluated_and_saved_even_if_not_due() -> None:
    saved: list[dict[str, Any]] = []
    calls = Callbacks(
        evaluate=lambda state: {"eval_loss": float(state.params["x"])},
        save=lambda state, record: saved.append(dict(record)),
        eval_every=100,
        save_every=100,
    )
    fitted = train(3, calls)
    assert [record["step"] for record in saved] == [3]
    assert saved[0]["eval_loss"] == fitted.best == float(fitted.state.params["x"])


def test_a_better_evaluation_is_saved_at_once() -> None:
    values = iter([3.0, 5.0, 1.0, 2.0])
    saved: list[int] = []
    calls = Callbacks(
        evaluate=lambda _: {"eval_loss": next(values)},
        save=lambda _, record: saved.append(record["step"]),
        eval_every=1,
    )
    assert train(4, calls).best == 1.0
    assert saved == [1, 3, 4]  # the last one because it is the last


def test_a_step_that_is_not_finite_updates_nothing_and_saves_its_batch(
    tmp_path: pathlib.Path,
) -> None:
    records: list[dict[str, Any]] = []
    calls = Callbacks(record=records.append)
    fitted = train(
        4, calls, broken=(2,), folder=tmp_path, learning_rate=lambda update: update
    )
    assert [record["skipped"] for record in records] == [False, True, False, False]
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1]
    assert [record["learning_rate"] for record in records] == [0, 1, 1, 2]
    assert math.isnan(records[1]["loss"])
    with np.load(tmp_path / "skipped-000002.npz") as saved:
        assert np.isnan(saved["wanted"]).sum() == 1
    good = [batch for n, batch in enumerate(batches(4), start=1) if n != 2]
    without = fit(STEP, start(), {}, good)
    assert float(fitted.state.params["x"]) == float(without.state.params["x"])


def test_too_many_skipped_steps_save_and_end_the_run() -> None:
    saved: list[int] = []
    calls = Callbacks(save=lambda state, _: saved.append(int(state.step)))
    with pytest.raises(
        TrainError, match=r"3 steps had a loss.* more than max_skipped 2"
    ):
        train(20, calls, broken=(2, 3, 5, 9), max_skipped=2)
    assert len(saved) == 1
    assert saved[0] >= 5
    with pytest.raises(TrainError, match="1 steps"):
        train(3, broken=(3,), max_skipped=0)
    with pytest.raises(TrainError, match="8 steps"):
        train(9, broken=(3,), max_skipped=7, skipped=7)


def test_a_batch_without_a_target_ends_the_run() -> None:
    with pytest.raises(DataError, match="step 3: batch has no target tokens"):
        train(9, empty=3)


def test_a_requested_stop_saves_and_returns() -> None:
    saved: list[int] = []
    steps: list[int] = []
    answers = iter([False, False, True])
    calls = Callbacks(
        record=lambda record: steps.append(record["step"]),
        save=lambda _, record: saved.append(record["step"]),
        stop=lambda: next(answers),
    )
    fitted = train(9, calls)
    assert fitted.stopped
    assert saved == [3]
    assert steps == [1, 2, 3]


def test_fit_continues_from_the_step_of_its_state() -> None:
    whole = train(8)
    half = train(8, steps=5)
    assert int(half.state.step) == 5
    rest = list(batches(8))[5:]
    resumed = fit(STEP, half.state, {}, rest)
    assert float(resumed.state.params["x"]) == float(whole.state.params["x"])
    assert int(resumed.state.step) == 8


def test_fit_without_batches_does_nothing() -> None:
    calls = Callbacks(record=lambda _: pytest.fail("a step was made"))
    assert int(fit(STEP, start(), {}, [], calls).state.step) == 0


def test_an_evaluation_weighs_every_target_the_same() -> None:
    held_out = [
        {"wanted": np.asarray([1.0, 2.0]), "weights": np.asarray([1.0, 1.0])},
        {"wanted": np.asarray([9.0, 3.0]), "weights": np.asarray([0.0, 1.0])},
    ]
    sums = make_evaluate(squares)
    evaluation = evaluate(sums, {"x": jnp.zeros(())}, {}, held_out)
    assert evaluation.loss == pytest.approx((1 + 4 + 9) / 3)
    assert evaluation.targets == 3
    with pytest.raises(DataError, match="no target"):
        evaluate(sums, {"x": jnp.zeros(())}, {}, [])


def test_tokens_are_counted_without_padding() -> None:
    ids = np.zeros((2, 4), np.int32)
    segments = np.asarray([[1, 1, 2, 0], [1, 0, 0, 0]], np.int32)
    batch: Any = Batch(ids, ids, ids, segments, ids)  # type: ignore[arg-type]
    assert count_tokens(batch) == 4
    assert count_tokens({"rows": jnp.zeros((3, 5))}) == 15


def test_the_step_is_compiled_once() -> None:
    before = STEP.num_programs
    train(3)
    train(4, Callbacks(save=lambda *_: None, save_every=1))
    assert STEP.num_programs <= max(before, 1)
    assert jax.tree.leaves(start().params)


@pytest.mark.parametrize(("params", "frozen"), [(math.nan, 1.0), (5.0, math.inf)])
def test_a_weight_that_is_not_a_number_ends_training(
    params: float, frozen: float
) -> None:
    def loss(params: Any, frozen: Any, batch: Any) -> LossSums:
        return squares({"x": params["x"] * frozen["base"]}, {}, batch)

    saved: list[int] = []
    calls = Callbacks(save=lambda _, record: saved.append(record["step"]))
    step = make_train_step(loss, make_optimizer(0.1, weight_decay=0.0, clip=None))
    name = "x" if math.isnan(params) else "base"
    for count in (1, 3):
        with pytest.raises(TrainError, match=f"^step 1: .*because {name} has numbers"):
            fit(
                step,
                start(params),
                {"base": jnp.float32(frozen)},
                batches(count),
                calls,
            )
    assert not saved


def test_a_run_that_never_made_a_step_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TrainError, match=r"^step 2: every step .*skipped-\*\.npz in /"):
        train(2, broken=(1, 2), folder=tmp_path)
    state = start()._replace(step=jnp.int32(2))
    with pytest.raises(TrainError, match="every step"):  # resumed after its last step
        fit(STEP, state, {}, [], steps=2, skipped=2)
    assert int(train(2, broken=(1,)).state.step) == 2
