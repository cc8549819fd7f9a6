"""`fit`: step after step, with what people watch and what must not be lost.

    take batch n ─▶ dispatch step n ─▶ read the metrics of n - 1 ─▶ record n - 1
                                              │ where something is due at n
                                              ▼
             read n ─▶ evaluate ─▶ record n ─▶ sample ─▶ save, before batch n + 1

So the device has its next step before the host looks at the last one, and whatever is
saved at n belongs together: weights, records and the place in the data.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.distributed import place as place_of_process
from llama_jax.distributed import to_host
from llama_jax.errors import DataError, TrainError
from llama_jax.train.metrics import Record
from llama_jax.train.state import TrainState
from llama_jax.train.step import Step, StepMetrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calls:
    """What `fit` calls, and every how many steps; each may be left out.

    Attributes:
      record: with the numbers of each step, in order. A record of the last step may
        come once more, with the evaluation at the end in it.
      evaluate: a state to numbers for the record, of which `eval_loss` decides what is
        best; every `eval_every` steps and at the end.
      sample: with a state and its record, every `sample_every` steps.
      save: with a state and its record, every `save_every` steps, where `eval_loss` is
        the best so far, and at the end.
      stop: asked behind each step whether to save and return.
    """

    record: Callable[[Record], None] | None = None
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None
    sample: Callable[[TrainState, Record], None] | None = None
    save: Callable[[TrainState, Record], None] | None = None
    stop: Callable[[], bool] | None = None
    eval_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None


class Fitted(NamedTuple):
    """What a run came to.

    Attributes:
      state: behind the last step.
      stopped: it was asked to stop, and could go on.
      best: the least `eval_loss`.
    """

    state: TrainState
    stopped: bool
    best: float


class _Pending(NamedTuple):
    """A step that was dispatched, and whose metrics were not read."""

    step: int
    batch: Any
    facts: Mapping[str, Any]
    data_seconds: float
    metrics: StepMetrics


def fit(
    step: Step,
    state: TrainState,
    frozen: Any,
    batches: Iterable[Any],
    calls: Calls = Calls(),
    *,
    steps: int | None = None,
    place: Callable[[Any], Any] = lambda batch: batch,
    describe: Callable[[Any], Mapping[str, Any]] | None = None,
    learning_rate: Callable[[int], float] | None = None,
    max_skipped: int = 10,
    skipped: int = 0,
    best: float = float("inf"),
    folder: pathlib.Path | None = None,
) -> Fitted:
    """Train until the batches end, or `steps` are done.

    A record has step, loss, grad_norm, targets, tokens, tokens_per_second, seconds,
    data_seconds (of waiting for the batch), skipped, what the loss reports, and
    learning_rate where that is given.

    Args:
      step: of `make_train_step`.
      state: which is donated; its step says where the run stands.
      frozen: leaves that the loss gets besides.
      batches: of NumPy arrays, this process's rows; one is taken for each step, and
        none before what is due behind the last one was done.
      calls: what is to be done besides, and when.
      steps: in all, those of before included.
      place: brings a batch to the devices.
      describe: of a batch that was just taken, what its record should say; by default
        `{"tokens": ...}`, how many there are.
      learning_rate: of the update with this number, from 0; skipped steps update
        nothing.
      max_skipped: how many steps may be skipped, in all, before the run ends.
      skipped: how many were before.
      best: the least `eval_loss` of before.
      folder: where a batch that was skipped is left, as `skipped-STEP.npz`; of several
        processes each leaves its own rows, `skipped-STEP-of-process-I.npz`.

    Raises:
      DataError: a batch has no target.
      TrainError: more than `max_skipped` steps had a loss or gradient that was not
        finite. What is to be saved was saved.
    """
    loop = _Loop(calls, describe, learning_rate, max_skipped, folder, skipped, best)
    return loop.run(step, state, frozen, batches, steps, place)


class _Loop:
    """The state of a run on the host."""

    def __init__(
        self,
        calls: Calls,
        describe: Callable[[Any], Mapping[str, Any]] | None,
        learning_rate: Callable[[int], float] | None,
        max_skipped: int,
        folder: pathlib.Path | None,
        skipped: int,
        best: float,
    ) -> None:
        self.calls, self.learning_rate = calls, learning_rate
        self.describe = describe or (lambda batch: {"tokens": count_tokens(batch)})
        self.max_skipped, self.skipped = max_skipped, skipped
        self.folder, self.best = folder, best
        self.clock = time.perf_counter()
        self.pending: _Pending | None = None
        self.record: Record | None = None  # of the last step that was read
        self.saved = -1

    def run(
        self,
        step: Step,
        state: TrainState,
        frozen: Any,
        batches: Iterable[Any],
        steps: int | None,
        place: Callable[[Any], Any],
    ) -> Fitted:
        number, source = int(state.step), iter(batches)
        while steps is None or number < steps:
            began = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                break
            waited, facts = time.perf_counter() - began, self.describe(batch)
            state, metrics = step(state, frozen, place(batch))
            number += 1
            if self.pending is not None:
                self.tell(self.read())
            self.pending = _Pending(number, batch, facts, waited, metrics)
            stopping = self.calls.stop is not None and self.calls.stop()
            self.do_what_is_due(state, number, stopping or self.is_over)
            if self.is_over:
                raise TrainError(self.why_over(number))
            if stopping:
                return Fitted(state, True, self.best)
        self.finish(state, number)
        if self.is_over:
            raise TrainError(self.why_over(number))
        return Fitted(state, False, self.best)

    def do_what_is_due(self, state: TrainState, number: int, ends: bool) -> None:
        """Whatever has its turn behind this step."""
        calls = self.calls
        saves = _is_due(number, calls.save and calls.save_every)
        evaluates = _is_due(number, calls.evaluate and calls.eval_every)
        samples = _is_due(number, calls.sample and calls.sample_every)
        if not (saves or evaluates or samples or ends):
            return
        record = self.read()
        better = evaluates and self.evaluate(state, record)
        self.tell(record)
        if samples and calls.sample is not None:
            calls.sample(state, record)
        if saves or better or ends or self.is_over:
            self.save(state, record)
        self.clock = time.perf_counter()

    def finish(self, state: TrainState, number: int) -> None:
        """What is due at the end, where it was not done behind the last step."""
        if self.pending is not None:
            self.record = self.read()
            again = True
        else:
            again = False
        record = self.record
        if record is None:
            return  # nothing was left to do
        calls = self.calls
        if calls.evaluate is not None and "eval_loss" not in record:
            self.evaluate(state, record)
            again = True
        if again:
            self.tell(record)
        if self.saved != number:
            self.save(state, record)

    def read(self) -> Record:
        """The numbers of the step that was dispatched, when it is done."""
        assert self.pending is not None
        number, batch, facts, waited, on_device = self.pending
        self.pending = None
        found = to_host(on_device)
        now = time.perf_counter()
        seconds, self.clock = max(now - self.clock, 1e-9), now
        if not found.weight > 0 and np.isfinite(found.weight):
            raise DataError(
                f"step {number}: no token of its batch is a target, so there is "
                "nothing to learn; give records with answers, or a longer sequence "
                "length"
            )
        record: Record = {"step": number, "loss": float(found.loss)}
        if self.learning_rate is not None:
            record["learning_rate"] = self.learning_rate(number - 1 - self.skipped)
        record |= {
            "grad_norm": float(found.grad_norm),
            "targets": int(found.weight) if np.isfinite(found.weight) else 0,
            **{name: float(value) for name, value in found.metrics.items()},
            **facts,
            "tokens_per_second": facts.get("tokens", 0) / seconds,
            "seconds": seconds,
            "data_seconds": waited,
            "skipped": bool(found.skipped),
            "skipped_steps": self.skipped + bool(found.skipped),
        }
        if found.skipped:
            self.skipped += 1
            if self.folder is not None:
                index, count = place_of_process()
                own = f"-of-process-{index}" if count > 1 else ""
                save_batch(self.folder / f"skipped-{number:06d}{own}.npz", batch)
        return record

    def tell(self, record: Record) -> None:
        self.record = record
        if self.calls.record is not None:
            self.calls.record(record)

    def evaluate(self, state: TrainState, record: Record) -> bool:
        """Put an evaluation into the record; whether it is the best so far."""
        assert self.calls.evaluate is not None
        record |= self.calls.evaluate(state)
        loss = record.get("eval_loss", float("inf"))
        better = loss < self.best
        self.best = min(loss, self.best) if loss == loss else self.best
        return bool(better)

    def save(self, state: TrainState, record: Record) -> None:
        self.saved = record["step"]
        if self.calls.save is not None:
            self.calls.save(state, record)

    @property
    def is_over(self) -> bool:
        return self.skipped > self.max_skipped

    def why_over(self, number: int) -> str:
        where = f" (skipped-*.npz in {self.folder})" if self.folder else ""
        return (
            f"step {number}: {self.skipped} steps had a loss or a gradient that was "
            f"not finite, more than the {self.max_skipped} that are allowed; look at "
            f"their batches{where}, lower the learning rate, or allow more"
        )


def _is_due(number: int, every: Any) -> bool:
    return bool(every) and number % every == 0


def count_tokens(batch: Any) -> int:
    """Tokens of this process's rows: those in a segment, or all without segments."""
    segments = getattr(batch, "segment_ids", None)
    if segments is None:
        return int(jax.tree.leaves(batch)[0].size)
    return int(np.count_nonzero(segments))


def save_batch(path: pathlib.Path, batch: Any) -> None:
    """The arrays of a batch under their names, as one .npz."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    arrays = {
        jax.tree_util.keystr(names).strip(".[]'"): np.asarray(leaf)
        for names, leaf in leaves
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
