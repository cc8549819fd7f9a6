"""`run`: train a method on batches, with checkpoints, metrics and a report in a folder.

The commands, the stages of RLHF and notebooks use it. It neither prints nor reads
arguments or environment, nor handles signals: what it reports goes to a `Reporter`.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import optax

from llama_jax.arguments import checked
from llama_jax.distributed import barrier, broadcast_from_main, from_host_rows
from llama_jax.distributed import is_main as is_main_process
from llama_jax.errors import ConfigError, TrainError
from llama_jax.params import count_params
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.checkpoints import TrainCheckpoints
from llama_jax.train.evaluate import evaluate, make_evaluate
from llama_jax.train.loop import Callbacks, FitResult, fit
from llama_jax.train.methods import Method
from llama_jax.train.metrics import Record, read_metrics
from llama_jax.train.pump import Describe
from llama_jax.train.report import Table, peak_memory_bytes, write_report
from llama_jax.train.reporter import Quiet, Reporter, RunStart, Sample
from llama_jax.train.run_config import RunConfig
from llama_jax.train.run_folder import (
    SAMPLES_FILE,
    RunWriters,
    SavedRun,
    check_resumes,
    find_run,
    start_run,
)
from llama_jax.train.state import TrainState, init_state, state_shapes
from llama_jax.train.stopping import Stop
from llama_jax.types import JsonObject, Path, PyTree


@runtime_checkable
class BatchSource(Protocol):
    """Batches whose position can be saved, as `Loader` has them.

    An iteration goes on after the last batch that was read. Batches are trees of NumPy
    arrays [B, T] or [B], this process's rows.
    """

    def __iter__(self) -> Iterator[PyTree]:
        """Iterate from the current position."""

    def state(self) -> JsonObject:
        """The position after the last batch that was read, for JSON."""

    def restore(self, state: JsonObject) -> None:
        """Go to a position."""


class RunResult(NamedTuple):
    """The result of `run`.

    Attributes:
      status: "finished"; "stopped" early, to be resumed; or "complete" if there was
        nothing left to do.
      step: steps done.
      path: folder of the model (or adapter), absent if the run was stopped.
      report: files of the report.
    """

    status: Literal["finished", "stopped", "complete"]
    step: int
    path: pathlib.Path
    report: Sequence[pathlib.Path] = ()


@checked(TrainError)
def run(
    config: RunConfig,
    method: Method,
    batches: BatchSource,
    folder: Path,
    *,
    resume: bool = False,
    total_steps: int | None = None,
    eval_batches: BatchSource | None = None,
    tokenizer: Tokenizer | None = None,
    sample: Callable[[TrainState], Sequence[Sample]] | None = None,
    describe: Describe | None = None,
    reporter: Reporter | None = None,
    stop: Stop | None = None,
    signals: Callable[[Stop], contextlib.AbstractContextManager[object]] | None = None,
    flops_per_step: float = 0.0,
    peak_flops: float = 0.0,
    report_facts: Callable[[], Mapping[str, str]] = dict,
    report_tables: Callable[[], Mapping[str, Table]] = dict,
) -> RunResult:
    """Train, evaluate, sample, save and report; with several processes all call this.

    Args:
      config: settings.
      method: what is trained, from `train_weights` or `train_adapters`.
      batches: training data.
      folder: new folder for the run; to resume, that of the run.
      resume: continue the run in `folder` from its last checkpoint; start one if the
        folder is empty.
      total_steps: steps of the whole run, if `config.steps` is None.
      eval_batches: held-out data, evaluated before the first step, every
        `config.eval_every` steps and at the end.
      tokenizer: saved with the model.
      sample: completes prompts, every `config.sample_every` steps and at the end.
      describe: numbers of a batch for its record; defaults to its number of tokens.
      reporter: receives what happens; defaults to none.
      stop: can be requested to end the run early, from any thread.
      signals: context in which signals request a stop, while training.
      flops_per_step: FLOPs of a step, for the reported model FLOP utilization.
      peak_flops: peak FLOP/s of all devices together; 0 if unknown.
      report_facts: called for facts that the report adds, when the result is saved.
      report_tables: called for tables that it adds, after that.

    Returns:
      The result; the trained leaves are in its `path`, for `load`.

    Raises:
      TrainError: `folder` is in use or has another run, or too many steps were skipped.
      ConfigError: the number of steps is not given.

    >>> import pathlib, tempfile, llama_jax
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> (folder / "data.txt").write_text("Once upon a time there was a cat.")
    33
    >>> opened = llama_jax.open_model()
    >>> runtime = llama_jax.default_runtime()
    >>> method = llama_jax.train_weights(opened.config, runtime, opened=opened)
    >>> loader = llama_jax.Loader(
    ...     [folder / "data.txt"], opened.tokenizer, format="text", batch_size=1,
    ...     length=16,
    ... )
    >>> config = llama_jax.RunConfig(steps=2, batch_size=1)
    >>> result = llama_jax.run(config, method, loader, folder / "run")
    >>> result.status, result.step, result.path.name
    ('finished', 2, 'model')
    """
    folder = pathlib.Path(folder)
    saved = find_run(folder, resume=resume)
    barrier("the run's folder is checked")  # before process 0 writes there
    steps = total_steps or config.steps
    if saved is not None:
        steps = saved.steps
    if steps is None:
        raise ConfigError(
            "steps: is None, so the length of the run is unknown; give config.steps or "
            "total_steps"
        )
    started = SavedRun({}, steps, method.model.config.to_dict(), method.fingerprint)
    if saved is None:
        start_run(folder, config, started)
    else:
        check_resumes(folder, saved, started)
        config.check_resumes(saved.settings)
    with TrainCheckpoints(folder / "checkpoints", keep=config.keep) as checkpoints:
        session = _Session(
            config=config,
            method=method,
            batches=batches,
            folder=folder,
            steps=steps,
            optimizer=config.make_optimizer(steps),
            checkpoints=checkpoints,
            eval_batches=eval_batches,
            tokenizer=tokenizer,
            sampler=sample,
            reporter=reporter or Quiet(),
            mfu_per_second=flops_per_step / peak_flops if peak_flops else 0.0,
        )
        return session.run(
            stop or Stop(), signals, describe, report_facts, report_tables
        )


@dataclasses.dataclass(kw_only=True)
class _Session:
    """One call of `run`."""

    config: RunConfig
    method: Method
    batches: BatchSource
    folder: pathlib.Path
    steps: int
    optimizer: optax.GradientTransformation
    checkpoints: TrainCheckpoints
    eval_batches: BatchSource | None
    tokenizer: Tokenizer | None
    sampler: Callable[[TrainState], Sequence[Sample]] | None
    reporter: Reporter
    mfu_per_second: float

    def __post_init__(self) -> None:
        self.rates = self.config.learning_rates(self.steps)
        self.sums = make_evaluate(self.method.loss)
        self.best = math.inf
        self.initial_evaluation: Record = {}
        self.sampled_step = -1
        if self.eval_batches is not None:
            self.eval_start = self.eval_batches.state()

    @property
    def path(self) -> pathlib.Path:
        return self.folder / self.method.result_name

    def run(
        self,
        stop: Stop,
        signals: Callable[[Stop], contextlib.AbstractContextManager[object]] | None,
        describe: Describe | None,
        report_facts: Callable[[], Mapping[str, str]],
        report_tables: Callable[[], Mapping[str, Table]],
    ) -> RunResult:
        """Train from the start or the last checkpoint to the end."""
        method, checkpoints = self.method, self.checkpoints
        shapes = state_shapes(method.shapes, self.optimizer, method.model.mesh)
        first = checkpoints.latest()
        facts: JsonObject = {}
        if first is None:
            state = init_state(method.init(), self.optimizer)
        else:
            facts = checkpoints.facts(first)
            self.batches.restore(facts["data"])
            if facts["best"] is not None:
                self.best = facts["best"]
            state = checkpoints.restore(first, shapes)
        if broadcast_from_main(
            self.path.exists() and (self.folder / "report.html").exists()
        ):
            return RunResult("complete", first or 0, self.path)
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            self.writers = stack.enter_context(
                RunWriters(self.folder, self.config, first or 0)
            )
            if signals is not None:
                stack.enter_context(signals(stop))
            adapters = method.lora is not None
            count = count_params(method.shapes)
            self.reporter.start(RunStart(count, adapters, first or 0, self.steps))
            stack.callback(self.reporter.close)
            if self.eval_batches is not None and first is None:
                metrics = self.evaluate(state)
                self.initial_evaluation = {"eval_loss_before": metrics["eval_loss"]}
                self.reporter.initial_evaluation(metrics)
            try:
                result = self.fit(state, stop, int(facts.get("skipped", 0)), describe)
            except TrainError:
                # All processes raise it; the first to exit would end the others.
                checkpoints.wait()
                barrier("the state is saved")
                raise
            del state
            step = int(result.state.step)
            if result.stopped:
                checkpoints.wait()
                return RunResult("stopped", step, self.path)
            if self.sampler is not None and self.sampled_step != step:
                self.sample(result.state, {"step": step})
        checkpoints.wait()
        self.save_result(self.path, result.state)
        del result
        best = checkpoints.best()
        if best is not None and best != step:
            self.save_result(self.folder / "best", checkpoints.restore(best, shapes))
        seconds = time.perf_counter() - start
        files: list[pathlib.Path] = []
        if is_main_process():
            files = self.write_report(seconds, report_facts(), report_tables())
        return RunResult("finished", step, self.path, files)

    def fit(
        self, state: TrainState, stop: Stop, skipped: int, describe: Describe | None
    ) -> FitResult:
        config, last = self.config, len(self.rates) - 1
        return fit(
            self.method.make_step(self.optimizer, config.accumulate),
            state,
            self.method.frozen,
            self.batches,
            Callbacks(
                record=self.record,
                evaluate=None if self.eval_batches is None else self.evaluate,
                sample=None if self.sampler is None else self.sample,
                save=self.save,
                stop=stop,
                eval_every=config.eval_every,
                sample_every=config.sample_every,
                save_every=config.save_every,
            ),
            # With epochs the data ends the run; their steps are an estimate.
            steps=self.steps if config.epochs is None else None,
            device_put=self.device_put,
            describe=describe,
            learning_rate=lambda update: float(self.rates[min(update, last)]),
            max_skipped=config.max_skipped,
            skipped=skipped,
            best=self.best,
            folder=self.folder,
        )

    def device_put(self, batch: PyTree) -> PyTree:
        model = self.method.model
        return from_host_rows(batch, model.mesh, model.runtime.rules)

    def record(self, record: Record) -> None:
        if record["step"] == 1:
            record |= self.initial_evaluation
        record["time"] = round(time.time(), 3)
        if self.mfu_per_second:
            record["mfu"] = self.mfu_per_second / record["seconds"]
        self.writers.write(record)
        self.reporter.step(record)

    def evaluate(self, state: TrainState) -> Record:
        assert self.eval_batches is not None
        self.eval_batches.restore(self.eval_start)
        return evaluate(
            self.sums,
            state.params,
            self.method.frozen,
            self.eval_batches,
            device_put=self.device_put,
        ).record()

    def sample(self, state: TrainState, record: Record) -> None:
        assert self.sampler is not None
        step = self.sampled_step = record["step"]
        samples = self.sampler(state)
        self.writers.write_samples(step, samples)
        self.reporter.samples(step, samples)

    def save(self, state: TrainState, record: Record) -> None:
        self.writers.sync()
        self.best = min(self.best, record.get("eval_loss", math.inf))
        facts = {
            "data": self.batches.state(),
            "skipped": record["skipped_steps"],
            "best": self.best if math.isfinite(self.best) else None,
            "seed": self.config.seed,
        }
        self.checkpoints.save(state, facts, record.get("eval_loss"))

    def save_result(self, path: pathlib.Path, state: TrainState) -> None:
        # It exists if the run was killed after this. All look before one writes.
        if not broadcast_from_main(path.exists()):
            self.method.save(
                path,
                state.params,
                tokenizer=self.tokenizer,
                dtype=self.config.save_dtype,
            )

    def write_report(
        self,
        seconds: float,
        more_facts: Mapping[str, str],
        tables: Mapping[str, Table],
    ) -> list[pathlib.Path]:
        facts = {"time of this call": f"{seconds:,.1f} s"}
        if memory := peak_memory_bytes():
            facts["peak memory of a device"] = f"{memory / 1e9:.2f} GB"
        return write_report(
            self.folder,
            self.config.to_dict(),
            facts=facts | dict(more_facts),
            tables=tables,
            samples=read_metrics(self.folder / SAMPLES_FILE),
        )
