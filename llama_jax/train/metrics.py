"""Writers of a run's records, one per step: `metrics.jsonl`, TensorBoard and W&B."""

import json
import math
import os
import pathlib
from typing import Any, Protocol, TextIO, runtime_checkable

from llama_jax.checkpoint.atomic_write import write_file
from llama_jax.errors import TrainError
from llama_jax.types import JsonObject, Path

Record = dict[str, Any]

FILE_NAME = "metrics.jsonl"


@runtime_checkable
class Writer(Protocol):
    """Writes records."""

    def write(self, record: Record) -> None:
        """Write the record of a step."""

    def close(self) -> None:
        """Write no more."""


class MetricsFile:
    """A file of JSON lines with each step once, however the process ends.

    Opening it drops lines after `step`, and one that was cut off. Writing a record of
    the last step replaces its line.

    Args:
      path: of the file, which need not exist.
      step: of the checkpoint that is resumed; 0 for a new run.
    """

    def __init__(self, path: Path, *, step: int = 0) -> None:
        self._path = pathlib.Path(path)
        records = [record for record in read_metrics(path) if record["step"] <= step]
        write_file(self._path, "".join(map(_line, records)))
        self._file = self._path.open("r+", encoding="utf-8", newline="\n")
        self._file.seek(0, os.SEEK_END)
        self._last = (0, 0)  # step and offset of the last line
        if records:
            end = self._file.tell()
            self._last = (records[-1]["step"], end - len(_line(records[-1]).encode()))

    def write(self, record: Record) -> None:
        """Append the line of a step; the system has it when this returns."""
        step, offset = self._last
        if record["step"] == step:
            self._file.seek(offset)
            self._file.truncate()
        self._last = (record["step"], self._file.tell())
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Return when all lines are on disk."""
        _sync(self._file)

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def __enter__(self) -> "MetricsFile":
        """The file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a `metrics.jsonl`, by step; incomplete lines are skipped.

    Returns:
      The records; none if there is no file.
    """
    file = pathlib.Path(path)
    records: dict[int, Record] = {}
    if not file.is_file():
        return []
    for line in file.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(step) is int:
            records[step] = record
    return [records[step] for step in sorted(records)]


class TensorBoard:
    """An event file for TensorBoard; needs `llama-jax[tensorboard]`.

    Args:
      folder: of the file.
      step: of the checkpoint that is resumed; TensorBoard drops later events.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise TrainError(
                "tensorboard: the package is not installed; "
                'pip install "llama-jax[tensorboard]"'
            ) from error
        self._event, self._summary = event_pb2, summary_pb2
        self._writer = EventFileWriter(os.fspath(folder))
        if step:
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(
                event_pb2.Event(step=step + 1, session_log=started, wall_time=0.0)
            )

    def write(self, record: Record) -> None:
        """Write the numbers of a step."""
        values = [
            self._summary.Summary.Value(tag=name, simple_value=number)
            for name, number in _numbers(record).items()
        ]
        summary = self._summary.Summary(value=values)
        event = self._event.Event(step=record["step"], summary=summary)
        event.wall_time = record.get("time", 0.0)
        self._writer.add_event(event)

    def close(self) -> None:
        """Write buffered events."""
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; needs `llama-jax[wandb]` and an account.

    Args:
      project: name of the project.
      folder: of the run; its name is the run's, which is resumed if it exists.
      settings: of the run.
    """

    def __init__(self, project: str, folder: Path, settings: JsonObject) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TrainError(
                'wandb: the package is not installed; pip install "llama-jax[wandb]"'
            ) from error
        name = pathlib.Path(folder).resolve().name
        self._run = wandb.init(
            project=project,
            name=name,
            id=name,
            resume="allow",
            dir=os.fspath(folder),
            config=dict(settings),
        )

    def write(self, record: Record) -> None:
        """Write the numbers of a step."""
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Send buffered records."""
        self._run.finish()


def _numbers(record: Record) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("step", "time")
    }


def _line(record: Record) -> str:
    """A record as a line; NaN and infinity, which JSON lacks, become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


def _sync(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
