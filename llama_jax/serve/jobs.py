"""What a server sees of the engine: requests go in as jobs, deltas come out.

`Engine` and `Job` are protocols, so that the server and its tests need no device;
`QueuedJob` is the job that the scheduler makes.
"""

import collections
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from llama_jax.generation.generate import TopLogprobs
from llama_jax.generation.request import Request
from llama_jax.generation.scoring import Score

FinishReason = Literal["stop", "length", "cancelled"]


class TokenLogprob(NamedTuple):
    """The log-probability (nats) of a token, under the model's own distribution.

    Attributes:
      id: the token.
      logprob: its log-probability.
      top: (id, log-probability) of the likeliest tokens at its position, the likeliest
        first; as many as the request's `logprobs`.
    """

    id: int
    logprob: float
    top: TopLogprobs


class Delta(NamedTuple):
    """New tokens of one sample of a request.

    Attributes:
      index: number of the sample, `0 <= index < request.num_samples`.
      ids: the tokens, without the stop id that ended the sample.
      text: text that follows that of earlier deltas: no half characters, and nothing
        that may be the beginning of a stop string.
      logprobs: one for each of `ids` if the request has `logprobs`, else none.
      finish_reason: set in the last delta of the sample.
    """

    index: int  # type: ignore[assignment]  # instead of `tuple.index`
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class Usage(NamedTuple):
    """Tokens of a job so far.

    Attributes:
      prompt_tokens: of the prompt, counted once for all samples.
      cached_prompt_tokens: of those, how many the first sample did not compute, because
        they were in the prefix cache.
      generated_tokens: of all samples, stop ids included.
    """

    prompt_tokens: int
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0


class Stats(NamedTuple):
    """State of an engine; the last four only grow.

    Attributes:
      lanes: rows that decode together.
      busy_lanes: lanes with a sample.
      waiting: samples in the queue.
      pages: pages of the cache; 0 if it has none.
      free_pages: pages that neither a lane nor the prefix cache uses.
      cached_pages: pages of the prefix cache that no lane uses.
      prompt_tokens: prompt tokens of admitted samples.
      cached_prompt_tokens: of those, tokens that were in the prefix cache.
      generated_tokens: tokens sampled.
      finished: samples that have ended, for whatever reason.
    """

    lanes: int
    busy_lanes: int
    waiting: int
    pages: int
    free_pages: int
    cached_pages: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    finished: int


@runtime_checkable
class Job(Protocol):
    """A submitted request."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""

    def deltas(self) -> Iterator[Delta]:
        """Yield deltas as they are made; ends after every sample is finished.

        Raises the job's error, if it has one.
        """

    def poll(self) -> list[Delta]:
        """Return the deltas that nobody has taken yet, without waiting.

        Raises the job's error once, after the last delta is taken.
        """

    def add_listener(self, call: Callable[[], None]) -> None:
        """Call a function whenever there is something new: deltas, the end, an error.

        It is called from the engine's thread, and at once if something is there
        already. It must return quickly (asyncio: `loop.call_soon_threadsafe`).
        """

    def cancel(self) -> None:
        """End all samples; their lanes are free at the next step.

        Samples that had not finished get a last delta whose reason is `"cancelled"`.
        """


@runtime_checkable
class Engine(Protocol):
    """Runs requests. All of its methods may be called from any thread."""

    def submit(self, request: Request, *, client: str = "") -> Job:
        """Queue a request.

        Args:
          request: not with `echo`, which is `score`.
          client: clients take turns when requests wait.

        Raises:
          QueueFull: too many samples wait; try again later.
          PromptTooLong: the prompt does not fit; has both numbers.
          ServeError: the engine is draining or closed.
          PromptError: the model cannot run the request.
        """

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Compute the log-probability of every token of the prompts; blocks.

        The bits are those of `generation.scoring.score`, in any company.

        Raises:
          ServeError, PromptError: as of `submit`.
        """

    def stats(self) -> Stats:
        """Return the state of the engine."""

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for the accepted ones.

        Args:
          timeout: seconds; defaults to no limit.

        Returns:
          Whether all of them have ended.
        """

    def close(self) -> None:
        """Cancel all jobs and stop the engine's thread."""


class QueuedJob:
    """A job whose deltas wait in a queue; see `Job`.

    The engine calls `push` and `fail`; the thread that waits for the answer calls the
    other methods.

    Args:
      request: that was submitted.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.usage = Usage(len(request.prompt_ids))
        self.cancelled = False
        self._left = request.num_samples
        self._deltas: collections.deque[Delta] = collections.deque()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self._left == 0 or self._error is not None

    def push(self, delta: Delta) -> None:
        """Add a delta; ignored once the job has failed."""
        with self._changed:
            if self.finished:
                return
            self._left -= delta.finish_reason is not None
            self._deltas.append(delta)
        self._notify()

    def fail(self, error: Exception) -> None:
        """End all samples with an error."""
        with self._changed:
            if self.finished:
                return
            self._error = error
        self._notify()

    def deltas(self) -> Iterator[Delta]:
        """See `Job`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._deltas or self.finished)
            yield from (news := self.poll())
            if not news:
                return

    def poll(self) -> list[Delta]:
        """See `Job`."""
        with self._changed:
            news = list(self._deltas)
            self._deltas.clear()
            if not news and self._error is not None:
                raise self._error
            return news

    def add_listener(self, call: Callable[[], None]) -> None:
        """See `Job`."""
        with self._changed:
            self._listeners.append(call)
            waiting = bool(self._deltas) or self.finished
        if waiting:
            call()

    def cancel(self) -> None:
        """See `Job`."""
        self.cancelled = True

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listeners = list(self._listeners)
        for call in listeners:
            call()
