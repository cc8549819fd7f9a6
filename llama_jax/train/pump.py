"""`Pump`: dispatches training steps, and reads the metrics of each one step later."""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from llama_jax.distributed import to_host
from llama_jax.errors import DataError
from llama_jax.train.metrics import Record
from llama_jax.train.state import TrainState
from llama_jax.train.step import StepMetrics
from llama_jax.types import PyTree

StepFunction = Callable[[TrainState, PyTree, PyTree], tuple[TrainState, StepMetrics]]
"""Maps state, frozen leaves and a batch to the next state and metrics."""

Describe = Callable[[PyTree], Mapping[str, float]]
"""Maps a batch that was just read to numbers for its step's record."""


class _Dispatched(NamedTuple):
    """A step whose metrics have not been read yet."""

    step: int
    batch: PyTree
    facts: Mapping[str, float]
    data_seconds: float
    metrics: StepMetrics


class Pump:
    """Dispatch steps so that the device never waits for the host.

    `dispatch` starts step n and returns the record of step n - 1, whose metrics are
    read only then. `read` waits for the last step. A record has step, loss, grad_norm,
    targets, tokens, tokens_per_second, seconds, data_seconds (spent waiting for the
    batch), skipped, skipped_steps, the metrics of the loss, and learning_rate if that
    is given.

    Args:
      step: from `make_train_step`.
      state: donated by the first step; its step counts on.
      frozen: leaves that the loss takes besides the trained ones.
      device_put: puts a batch on the devices.
      describe: numbers of a batch for its record; defaults to `{"tokens": ...}`.
      learning_rate: rate of each update, from 0; skipped steps are not updates.
      skipped: skipped steps so far.
      folder: where skipped batches are saved, as `skipped-STEP.npz`; with several
        processes each saves its own rows, as `skipped-STEP-of-process-I.npz`.

    Attributes:
      state: after the last dispatched step.
      frozen: as given.
      number: of the last dispatched step.
      skipped: number of skipped steps among those that were read.
    """

    def __init__(
        self,
        step: StepFunction,
        state: TrainState,
        frozen: PyTree,
        *,
        device_put: Callable[[PyTree], PyTree] = lambda batch: batch,
        describe: Describe | None = None,
        learning_rate: Callable[[int], float] | None = None,
        skipped: int = 0,
        folder: pathlib.Path | None = None,
    ) -> None:
        self.state, self.number, self.skipped = state, int(state.step), skipped
        self._step, self.frozen, self._device_put = step, frozen, device_put
        self._describe = describe or (lambda batch: {"tokens": count_tokens(batch)})
        self._learning_rate, self._folder = learning_rate, folder
        self._clock = time.perf_counter()
        self._dispatched: _Dispatched | None = None

    def dispatch(self, batch: PyTree, *, data_seconds: float = 0.0) -> Record | None:
        """Start the next step.

        Args:
          batch: rows of this process, NumPy arrays.
          data_seconds: time spent waiting for the batch.

        Returns:
          The record of the step before; None if that has been read.

        Raises:
          DataError: the batch of the step before has no target.
        """
        facts = self._describe(batch)
        self.state, metrics = self._step(
            self.state, self.frozen, self._device_put(batch)
        )
        self.number += 1
        record = self.read()
        self._dispatched = _Dispatched(self.number, batch, facts, data_seconds, metrics)
        return record

    def read(self) -> Record | None:
        """Wait for the last step and return its record; None if it has been read.

        Raises:
          DataError: its batch has no target.
        """
        if self._dispatched is None:
            return None
        step, batch, facts, data_seconds, on_device = self._dispatched
        self._dispatched = None
        metrics = to_host(on_device)
        seconds = self.restart_clock()
        if not metrics.weight > 0 and np.isfinite(metrics.weight):
            raise DataError(
                f"step {step}: batch has no target tokens (the loss mask is all "
                "zeros); give records with answers, or a longer sequence length"
            )
        record: Record = {"step": step, "loss": float(metrics.loss)}
        if self._learning_rate is not None:
            record["learning_rate"] = self._learning_rate(step - 1 - self.skipped)
        skipped = bool(metrics.skipped)
        self.skipped += skipped
        record |= {
            "grad_norm": float(metrics.grad_norm),
            "targets": int(metrics.weight) if np.isfinite(metrics.weight) else 0,
            **{name: float(value) for name, value in metrics.metrics.items()},
            **facts,
            "tokens_per_second": facts.get("tokens", 0) / seconds,
            "seconds": seconds,
            "data_seconds": data_seconds,
            "skipped": skipped,
            "skipped_steps": self.skipped,
        }
        if skipped and self._folder is not None:
            several = jax.process_count() > 1
            suffix = f"-of-process-{jax.process_index()}" if several else ""
            save_batch(self._folder / f"skipped-{step:06d}{suffix}.npz", batch)
        return record

    def restart_clock(self) -> float:
        """Leave the time since the last step out of the next; return its seconds."""
        now = time.perf_counter()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        return seconds


def count_tokens(batch: PyTree) -> int:
    """Count the tokens of this process's rows: those in a segment, or all."""
    segments = getattr(batch, "segment_ids", None)
    if segments is None:
        return int(jax.tree.leaves(batch)[0].size)
    return int(np.count_nonzero(segments))


def save_batch(path: pathlib.Path, batch: PyTree) -> None:
    """Save the arrays of a batch by name, as one .npz."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    arrays = {
        jax.tree_util.keystr(keys).strip(".[]'"): np.asarray(leaf)
        for keys, leaf in leaves
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
