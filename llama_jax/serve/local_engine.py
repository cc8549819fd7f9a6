"""The engine of this process: one thread does all device work."""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, TypeVar

from llama_jax.arguments import checked
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import ConfigError, PromptError, PromptTooLong, ServeError
from llama_jax.generation.batching import bucket
from llama_jax.generation.generate import check_request
from llama_jax.generation.request import Request
from llama_jax.generation.scoring import Score, score
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.serve.jobs import QueuedJob, Stats
from llama_jax.serve.scheduler import Scheduler

SCORE_ROWS = 8
"""Rows of every batch of `score`, as in the library."""

T = TypeVar("T")


class Task(NamedTuple, Generic[T]):
    """A function to run in the engine's thread, and its result."""

    future: "Future[T]"
    function: Callable[[], T]

    def run(self) -> None:
        """Run it."""
        try:
            result = self.function()
        except Exception as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


@checked(ServeError)
class LocalEngine:
    """Runs requests on this process's devices; see `jobs.Engine`.

    Args:
      loaded: model with unrolled layers, weights and tokenizer.
      config: of the engine; defaults to `EngineConfig()`, without pages on a mesh.

    Raises:
      ConfigError: the configuration does not fit the model.

    >>> import llama_jax
    >>> from llama_jax.serve.engine_config import EngineConfig
    >>> loaded = llama_jax.load()
    >>> engine = LocalEngine(loaded, EngineConfig(lanes=2))
    >>> greedy = llama_jax.Sampling(temperature=0)
    >>> request = llama_jax.text_request(
    ...     loaded.tokenizer, "Once upon a time", max_new_tokens=3, sampling=greedy
    ... )
    >>> "".join(delta.text for delta in engine.submit(request).deltas())
    ', there was'
    >>> engine.close()
    """

    def __init__(self, loaded: Loaded, config: EngineConfig | None = None) -> None:
        model = loaded.language_model
        on_mesh = model.mesh is not None and model.mesh.size > 1
        config = config or EngineConfig(pages=0 if on_mesh else None)
        if on_mesh and config.pages != 0:
            raise ConfigError("engine: a mesh needs dense slots; set pages=0")
        if model.runtime.layer_layout != "unrolled":
            raise ConfigError("runtime: serving needs layer_layout='unrolled'")
        self.config, self._loaded = config, loaded
        self._scheduler = Scheduler(loaded, config)
        self._changed = threading.Condition()
        self._tasks: list[Task[Any]] = []
        self._jobs: set[QueuedJob] = set()
        self._state = "open"
        self._thread = threading.Thread(
            target=self._run, name="llama_jax engine", daemon=True
        )
        self._thread.start()

    def submit(self, request: Request, *, client: str = "") -> QueuedJob:
        """See `jobs.Engine`."""
        facts, sizes = self._loaded.model.config, self._scheduler.sizes
        if len(request.prompt_ids) >= sizes.context:
            raise PromptTooLong(len(request.prompt_ids), sizes.context)
        check_request(request, facts)
        if request.echo:
            raise PromptError("echo: an engine does not repeat prompts; use score")
        for name, value, limit in (
            ("logprobs", request.logprobs or 0, self.config.max_logprobs),
            ("stop_ids", len(request.stop_ids), self.config.max_stop_ids),
            ("num_samples", request.num_samples, self.config.max_waiting),
        ):
            if value > limit:
                raise PromptError(f"{name}: at most {limit} here, got {value}")
        for id in request.sampling.logit_bias:
            if not 0 <= id < facts.vocab_size:
                raise PromptError(f"logit_bias: the model has no token {id}")
        job = QueuedJob(request)
        samples = self._scheduler.samples_of(job)
        with self._changed:
            self._check_open()
            self._scheduler.queue.put(samples, client)
            self._jobs = {job for job in self._jobs if not job.finished} | {job}
            self._changed.notify_all()
        return job

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """See `jobs.Engine`; other requests go on between batches of 8 rows."""
        futures = []
        for first in range(0, len(requests), SCORE_ROWS):
            batch = requests[first : first + SCORE_ROWS]
            futures.append(self._call(functools.partial(self._score, batch)))
        return [result for future in futures for result in future.result()]

    def _score(self, batch: Sequence[Request]) -> list[Score]:
        return score(self._loaded, batch, batch_size=SCORE_ROWS)

    def compile(self) -> float:
        """Compile all programs that requests may need, before the first one.

        Returns:
          Seconds that it took.
        """
        begin = time.perf_counter()
        self._call(self._scheduler.compile).result()
        limit = self._loaded.model.config.max_seq_len
        sizes = {bucket(1 << power, limit) for power in range(limit.bit_length() + 1)}
        self.score([Request([0] * size) for size in sizes])
        return time.perf_counter() - begin

    def stats(self) -> Stats:
        """See `jobs.Engine`."""
        return self._scheduler.stats()

    def drain(self, timeout: float | None = None) -> bool:
        """See `jobs.Engine`."""
        with self._changed:
            if self._state == "open":
                self._state = "draining"
            return self._changed.wait_for(self._is_idle, timeout)

    def close(self) -> None:
        """See `jobs.Engine`."""
        with self._changed:
            self._state = "closed"
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _is_idle(self) -> bool:
        idle = self._scheduler.idle and not self._tasks
        return idle or not self._thread.is_alive()

    def _check_open(self) -> None:
        if self._state != "open":
            raise ServeError(f"the engine is {self._state}; it takes no requests")

    def _call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function in the engine's thread, between two rounds."""
        task = Task(Future(), function)
        with self._changed:
            self._check_open()
            self._tasks.append(task)
            self._changed.notify_all()
        return task.future

    def _run(self) -> None:
        """The thread: rounds while there is work."""
        try:
            while self._wait():
                if self._tasks:
                    self._tasks[0].run()
                    self._tasks.pop(0)
                self._scheduler.step()
        except Exception as error:  # of a device, or a mistake of ours
            self._stop(ServeError(f"the engine has stopped: {error}"), error)
        else:
            self._stop(ServeError("the engine is closed"), None)

    def _wait(self) -> bool:
        """Wait for work; False when the engine is to close."""
        with self._changed:
            if self._is_idle():
                self._changed.notify_all()  # drain
            self._changed.wait_for(
                lambda: self._state == "closed" or not self._is_idle()
            )
            return self._state != "closed"

    def _stop(self, reason: ServeError, cause: Exception | None) -> None:
        """End everything that waits for this thread."""
        reason.__cause__ = cause
        with self._changed:
            self._state = "closed"
            tasks, jobs = self._tasks, self._jobs
            self._tasks, self._jobs = [], set()
        if cause is None:
            self._scheduler.cancel_all()
        for job in jobs:
            job.fail(reason)
        for task in tasks:
            task.future.set_exception(reason)
        with self._changed:
            self._changed.notify_all()
