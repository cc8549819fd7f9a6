"""A server without a device: an engine that plays scripted answers."""

import threading
from collections.abc import Sequence

import numpy as np

from llama_jax.errors import PromptTooLong, QueueFull, ServeError
from llama_jax.generation.request import Request
from llama_jax.generation.scoring import Score
from llama_jax.serve.api.call import Served
from llama_jax.serve.jobs import (
    Delta,
    FinishReason,
    QueuedJob,
    Stats,
    TokenLogprob,
    Usage,
)
from llama_jax.text.tokenizer import Tokenizer

CONTEXT = 64


class _ScriptedJob(QueuedJob):
    """A job that sets an event when it is cancelled before its end."""

    def __init__(self, request: Request, cancelled: threading.Event) -> None:
        super().__init__(request)
        self._cancelled_early = cancelled

    def cancel(self) -> None:
        """See `QueuedJob`."""
        super().cancel()
        if not self.finished:
            self._cancelled_early.set()


class ScriptedEngine:
    """An engine whose answers are scripts: texts, a token of one id for each.

    Args:
      script: texts of every sample's deltas.
      finish: why every sample ends; None never ends it.
      full: whether the queue is full.

    Attributes:
      requests: that were submitted.
      jobs: of them.
      cancelled: set when a job is cancelled.
    """

    def __init__(
        self,
        script: Sequence[str] = ("Once", " upon"),
        finish: FinishReason | None = "stop",
        *,
        full: bool = False,
    ) -> None:
        self.script, self.finish, self.full = script, finish, full
        self.requests: list[Request] = []
        self.jobs: list[QueuedJob] = []
        self.cancelled = threading.Event()
        self.draining = False

    def submit(self, request: Request, *, client: str = "") -> QueuedJob:
        """Play the script into a job."""
        if self.draining:
            raise ServeError("the engine is draining")
        if self.full:
            raise QueueFull("256 answers wait")
        if len(request.prompt_ids) >= CONTEXT:
            raise PromptTooLong(len(request.prompt_ids), CONTEXT)
        self.requests.append(request)
        job = _ScriptedJob(request, self.cancelled)
        self.jobs.append(job)
        threading.Thread(target=self._play, args=(job,)).start()
        return job

    def _play(self, job: QueuedJob) -> None:
        request = job.request
        entries = ()
        if request.logprobs is not None:
            top = tuple((40 + rank, -1.0 - rank) for rank in range(request.logprobs))
            entries = (TokenLogprob(40, -1.0, top),)
        count = len(self.script) * request.num_samples
        stops = request.num_samples if self.finish == "stop" else 0
        job.usage = Usage(len(request.prompt_ids), 2, count + stops)
        for text in self.script:
            for index in range(request.num_samples):
                job.push(Delta(index, (40,), text, entries))
        if self.finish is not None:
            for index in range(request.num_samples):
                job.push(Delta(index, (), "", (), self.finish))

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score token number t as -t, the even ones as the likeliest."""
        scores = []
        for request in requests:
            ids = np.asarray(request.prompt_ids)
            numbers = np.arange(len(ids))
            greedy = numbers % 2 == 0
            scores.append(
                Score(
                    -numbers.astype(np.float32),
                    greedy,
                    np.where(greedy, ids, 50),
                    np.where(greedy, -numbers, -0.5).astype(np.float32),
                )
            )
        return scores

    def stats(self) -> Stats:
        """Numbers of nothing."""
        return Stats(8, 1, 2, 3, 4, 5, 6, 7, 8, 9)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests."""
        self.draining = True
        return True

    def close(self) -> None:
        """Do nothing."""


def served(tokenizer: Tokenizer, name: str = "tiny") -> Served:
    """A tokenizer as a served model."""
    return Served(name, tokenizer, CONTEXT, "fp_0123456789abcdef")
