"""`fit`: a training loop with evaluation, samples and checkpoints.

    read batch n ─▶ dispatch step n ─▶ read metrics of n - 1 ─▶ record n - 1
                                             │ if a callback is due at n
                                             ▼
            read n ─▶ evaluate ─▶ record n ─▶ sample ─▶ save, before batch n + 1

The device has its next step before the host looks at the last one, and what is saved
at n is consistent: weights, records and the position in the data.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from llama_jax.arguments import checked
from llama_jax.checkpoint.finite import find_non_finite
from llama_jax.errors import TrainError
from llama_jax.train.metrics import Record
from llama_jax.train.pump import Describe, Pump, StepFunction
from llama_jax.train.state import TrainState
from llama_jax.types import PyTree


@checked(TrainError)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Optional callbacks of `fit` and their step intervals.

    Attributes:
      record: gets the record of each step, in order. That of the last step may come
        again, with the final evaluation.
      evaluate: maps a state to numbers for the record; `eval_loss` decides which state
        is the best. Called every `eval_every` steps and at the end.
      sample: gets a state and its record, every `sample_every` steps.
      save: gets a state and its record, every `save_every` steps, when `eval_loss` is
        the best so far, and at the end.
      stop: called after each step; true saves and returns.

    >>> steps = []
    >>> callbacks = Callbacks(record=lambda record: steps.append(record["step"]))
    """

    record: Callable[[Record], None] | None = None
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None
    sample: Callable[[TrainState, Record], None] | None = None
    save: Callable[[TrainState, Record], None] | None = None
    stop: Callable[[], bool] | None = None
    eval_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None


class FitResult(NamedTuple):
    """The result of `fit`.

    Attributes:
      state: after the last step.
      stopped: whether `Callbacks.stop` ended training early.
      best: best `eval_loss`.
    """

    state: TrainState
    stopped: bool
    best: float


@checked(TrainError)
def fit(
    step: StepFunction,
    state: TrainState,
    frozen: PyTree,
    batches: Iterable[PyTree],
    callbacks: Callbacks = Callbacks(),
    *,
    steps: int | None = None,
    device_put: Callable[[PyTree], PyTree] = lambda batch: batch,
    describe: Describe | None = None,
    learning_rate: Callable[[int], float] | None = None,
    max_skipped: int = 10,
    skipped: int = 0,
    best: float = float("inf"),
    folder: pathlib.Path | None = None,
) -> FitResult:
    """Train until the batches end, or for a number of steps.

    Args:
      step: from `make_train_step`.
      state: donated; its step says how many steps have been done.
      frozen: leaves that the loss takes besides the trained ones.
      batches: NumPy arrays, this process's rows. Each step reads one, after all
        callbacks of the step before.
      callbacks: called during training.
      steps: total number of steps, including those done before; None has no limit.
      device_put: puts a batch on the devices.
      describe: see `Pump`, as are `learning_rate`, `skipped` and `folder`; it also says
        what a record has.
      learning_rate: rate of each update, from 0.
      max_skipped: skipped steps (loss or gradient not finite) after which training
        ends.
      skipped: skipped steps so far.
      best: best `eval_loss` so far.
      folder: where skipped batches are saved.

    Raises:
      DataError: a batch has no target.
      TrainError: more than `max_skipped` steps were skipped, or all of them; the state
        has been saved. Or a step was skipped because a weight is not finite.

    >>> import jax.numpy as jnp, numpy as np, optax, llama_jax
    >>> from llama_jax.train.losses import LossSums
    >>> def loss(params, frozen, batch):
    ...     return LossSums(jnp.sum((params["x"] - batch) ** 2), jnp.float32(4))
    >>> optimizer = optax.sgd(0.5)
    >>> state = llama_jax.init_state({"x": jnp.zeros(())}, optimizer)
    >>> step = llama_jax.make_train_step(loss, optimizer)
    >>> result = fit(step, state, {}, [np.full(4, 3.0, np.float32)])
    >>> float(result.state.params["x"])
    3.0
    """
    pump = Pump(
        step,
        state,
        frozen,
        device_put=device_put,
        describe=describe,
        learning_rate=learning_rate,
        skipped=skipped,
        folder=folder,
    )
    loop = _Loop(pump, callbacks, max_skipped, folder, best)
    source = iter(batches)
    while steps is None or pump.number < steps:
        start = time.perf_counter()
        batch = next(source, None)
        if batch is None:
            break
        data_seconds = time.perf_counter() - start
        loop.publish(pump.dispatch(batch, data_seconds=data_seconds))
        stopping = callbacks.stop is not None and callbacks.stop()
        loop.run_due_callbacks(ending=stopping or loop.too_many_skipped)
        loop.check_skipped()
        if stopping:
            return FitResult(pump.state, True, loop.best)
    loop.finish()
    loop.check_skipped()
    loop.check_stepped()
    return FitResult(pump.state, False, loop.best)


class _Loop:
    """The callbacks' side of `fit`: the last record, the best loss, what is saved."""

    def __init__(
        self,
        pump: Pump,
        callbacks: Callbacks,
        max_skipped: int,
        folder: pathlib.Path | None,
        best: float,
    ) -> None:
        self.pump, self.callbacks = pump, callbacks
        self.max_skipped, self.folder, self.best = max_skipped, folder, best
        self.last_record: Record | None = None
        self.saved_step = -1
        self.searched = False  # the weights, for those that are not finite

    def run_due_callbacks(self, *, ending: bool) -> None:
        """Evaluate, sample and save after the step that was just dispatched."""
        calls, number = self.callbacks, self.pump.number
        saves = _is_due(number, calls.save, calls.save_every)
        evaluates = _is_due(number, calls.evaluate, calls.eval_every)
        samples = _is_due(number, calls.sample, calls.sample_every)
        if not (saves or evaluates or samples or ending):
            return
        record = self.pump.read()
        assert record is not None, "a step was just dispatched"
        better = evaluates and self.evaluate(record)
        self.publish(record)
        if samples and calls.sample is not None:
            calls.sample(self.pump.state, record)
        if saves or better or ending or self.too_many_skipped:
            self.save(record)
        self.pump.restart_clock()

    def finish(self) -> None:
        """Evaluate and save after the last step, unless that has been done."""
        unread = self.pump.read()
        record = unread or self.last_record
        if record is None:
            return  # there was no step to do
        evaluates = self.callbacks.evaluate is not None and "eval_loss" not in record
        if evaluates:
            self.evaluate(record)
        if unread or evaluates:
            self.publish(record)
        if self.saved_step != self.pump.number:
            self.save(record)

    def publish(self, record: Record | None) -> None:
        """Pass a record on, if there is one."""
        if record is None:
            return
        self.last_record = record
        if self.callbacks.record is not None:
            self.callbacks.record(record)
        if record["skipped"] and not self.searched:
            self.check_weights(record["step"])

    def evaluate(self, record: Record) -> bool:
        """Add an evaluation to the record; return whether it is the best so far."""
        assert self.callbacks.evaluate is not None
        record |= self.callbacks.evaluate(self.pump.state)
        loss = record.get("eval_loss", float("inf"))
        better = loss < self.best
        self.best = min(loss, self.best) if loss == loss else self.best
        return bool(better)

    def save(self, record: Record) -> None:
        self.saved_step = record["step"]
        if self.callbacks.save is not None:
            self.callbacks.save(self.pump.state, record)

    @property
    def skipped_files(self) -> str:
        return f" (skipped-*.npz in {self.folder})" if self.folder else ""

    @property
    def too_many_skipped(self) -> bool:
        return self.pump.skipped > self.max_skipped

    def check_weights(self, step: int) -> None:
        """Raise a `TrainError` if a weight is the reason for a skipped step."""
        self.searched = True
        for params in (self.pump.state.params, self.pump.frozen):
            if name := find_non_finite(params):
                raise TrainError(
                    f"step {step}: the loss or gradient is not finite, because {name} "
                    "has numbers that are NaN or infinite; start from another "
                    "checkpoint, or use a wider dtype"
                )

    def check_stepped(self) -> None:
        """Raise a `TrainError` if all steps were skipped."""
        if self.pump.number and self.pump.skipped == self.pump.number:
            raise TrainError(
                f"step {self.pump.number}: every step was skipped, because loss or "
                "gradient was not finite, so there is no result; look at the batches"
                f"{self.skipped_files}, lower the learning rate, or use a wider dtype"
            )

    def check_skipped(self) -> None:
        """Raise a `TrainError` if too many steps were skipped."""
        if not self.too_many_skipped:
            return
        raise TrainError(
            f"step {self.pump.number}: {self.pump.skipped} steps had a loss or a "
            f"gradient that was not finite, more than max_skipped {self.max_skipped}; "
            f"look at their batches{self.skipped_files}, lower the learning rate, or "
            "raise max_skipped"
        )


def _is_due(number: int, callback: object, every: int | None) -> bool:
    return callback is not None and bool(every) and number % (every or 1) == 0
