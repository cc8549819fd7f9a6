"""The files of a run: settings, metrics and samples."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from llama_jax.checkpoint.json_files import read_json, write_json
from llama_jax.config import LlamaConfig
from llama_jax.distributed import barrier, is_main
from llama_jax.errors import TrainError
from llama_jax.train import metrics
from llama_jax.train.metrics import MetricsFile, Record
from llama_jax.train.reporter import Sample
from llama_jax.train.run_config import RunConfig
from llama_jax.types import JsonObject

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
_VERSION = 1
_Writer = TypeVar("_Writer", bound=metrics.Writer)


class SavedRun(NamedTuple):
    """What run.json says.

    Attributes:
      settings: of the `RunConfig`, by name.
      steps: total steps.
      model: configuration of the model, by field.
      fingerprint: of the initial weights; None if they were random.
    """

    settings: JsonObject
    steps: int
    model: JsonObject
    fingerprint: str | None


def find_run(folder: pathlib.Path, *, resume: bool) -> SavedRun | None:
    """Read the run to resume in a folder; None if the folder is absent or empty.

    Raises:
      TrainError: the folder has files, and `resume` is false or they are not a run's.
    """
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if not used:
        return None
    if not resume:
        raise TrainError(
            f"{folder}: already exists and is not empty; name a new folder, or resume "
            "the run in it (--resume)"
        )
    if not (folder / RUN_FILE).is_file():
        raise TrainError(f"{folder}: has no {RUN_FILE}; name the folder of a run")
    run = read_json(folder / RUN_FILE, remedy="start a new run in another --output")
    if missing := {"arguments", "steps", "model", "weights"} - run.keys():
        raise TrainError(
            f"{folder / RUN_FILE}: has no {', '.join(sorted(missing))}; start a new "
            "run in another folder"
        )
    return SavedRun(run["arguments"], int(run["steps"]), run["model"], run["weights"])


def start_run(folder: pathlib.Path, config: RunConfig, run: SavedRun) -> None:
    """Write the run.json of a new run; with several processes all must call this."""
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "version": _VERSION,
            "arguments": config.to_dict(),
            "steps": run.steps,
            "model": run.model,
            "weights": run.fingerprint,
        }
        write_json(folder / RUN_FILE, content)
    barrier("the run has started")


def check_resumes(folder: pathlib.Path, saved: SavedRun, run: SavedRun) -> None:
    """Raise a `TrainError` if a run was started from another model."""
    same_model = LlamaConfig.from_dict(dict(saved.model)) == LlamaConfig.from_dict(
        dict(run.model)
    )
    if not same_model or saved.fingerprint != run.fingerprint:
        raise TrainError(
            f"{folder}: the run was started from another model; resume it with that "
            "one (--checkpoint), or start a new run in another folder (--output)"
        )


class RunWriters(contextlib.ExitStack):
    """Writers of records and samples; process 0 writes.

    Args:
      folder: of the run.
      config: its settings.
      step: of the checkpoint that is resumed; later records are dropped.
    """

    def __init__(self, folder: pathlib.Path, config: RunConfig, step: int) -> None:
        super().__init__()
        self._writers: list[metrics.Writer] = []
        self._samples: MetricsFile | None = None
        self._folder, self._step = folder, step
        if not is_main():
            return
        try:
            self._open(config)
        except BaseException:
            self.close()
            raise

    def _open(self, config: RunConfig) -> None:
        folder, step = self._folder, self._step
        self._metrics = self._add(MetricsFile(folder / metrics.FILE_NAME, step=step))
        if config.tensorboard:
            self._add(metrics.TensorBoard(folder / "tensorboard", step=step))
        if config.wandb:
            settings = config.to_dict()
            self._add(metrics.WeightsAndBiases(config.wandb, folder, settings))

    def _add(self, writer: _Writer) -> _Writer:
        self._writers.append(writer)
        self.callback(writer.close)
        return writer

    def write(self, record: Record) -> None:
        """Write the record of a step."""
        for writer in self._writers:
            writer.write(record)

    def sync(self) -> None:
        """Return when metrics.jsonl is on disk."""
        if self._writers:
            self._metrics.sync()

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write the samples after a step."""
        if not self._writers:
            return
        if self._samples is None:
            file = MetricsFile(self._folder / SAMPLES_FILE, step=self._step)
            self._samples = file
            self.callback(file.close)
        self._samples.write({"step": step, "samples": list(samples)})
