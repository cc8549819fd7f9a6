"""What runs when: admission, chunks of prompts, decoding, ends; all on the host.

A `Scheduler` has no thread and no lock of its own: `step` does one round of work, and
only the queue may be used from elsewhere. The state of the lanes on the device follows
from what it did; nothing is decided there.
"""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import ServeError
from llama_jax.generation.batching import token_limit
from llama_jax.generation.generate import Row
from llama_jax.generation.lanes import Emitted, advance, release
from llama_jax.generation.request import Request
from llama_jax.model.pages import NO_PAGE
from llama_jax.serve.engine import (
    LaneInputs,
    chunk_of,
    chunk_widths,
    first_token,
    lane_inputs,
    new_lanes,
    read_chunk,
)
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.serve.fair_queue import FairQueue
from llama_jax.serve.jobs import Delta, QueuedJob, Stats, TokenLogprob, Usage
from llama_jax.serve.prefix_cache import LanePages, PrefixCache
from llama_jax.types import Array


class Sample:
    """One sample of a job, from the queue to its end.

    Attributes:
      job: that it belongs to.
      request: of the job, its limit that of the context.
      index: number of the sample.
      row: turns tokens into text.
      lane: index of its lane, once it has been admitted.
      pages: of its lane.
      position: tokens of the prompt that are in the lane.
      cached: of those, tokens that were in the prefix cache.
    """

    def __init__(self, job: QueuedJob, index: int, loaded: Loaded, limit: int) -> None:
        self.job, self.index = job, index
        self.request = dataclasses.replace(job.request, max_new_tokens=limit)
        self.row = Row(self.request, index, index, loaded)
        self.lane = -1
        self.pages = LanePages("")
        self.position = self.cached = 0


class Scheduler:
    """Runs samples on lanes.

    Args:
      loaded: model with unrolled layers, weights and tokenizer.
      config: of the engine.
    """

    def __init__(self, loaded: Loaded, config: EngineConfig) -> None:
        self.config = config
        self.sizes = config.resolve(loaded.model.config)
        self.queue: FairQueue[Sample] = FairQueue(config.max_waiting)
        self.prefixes = PrefixCache(self.sizes.pages, config.chunk)
        self.lanes = new_lanes(loaded.language_model, config)
        self.running: dict[int, Sample] = {}
        self._loaded, self._model = loaded, loaded.language_model
        vocab_size = loaded.model.config.vocab_size
        self._banned = loaded.tokenizer.unnamed_ids(vocab_size)
        self._reading: collections.deque[Sample] = collections.deque()
        self._ended: list[int] = []  # lanes whose sample has ended in this round
        self._prompt_tokens = self._cached = self._generated = self._finished = 0

    def samples_of(self, job: QueuedJob) -> list[Sample]:
        """The samples of a job, for the queue."""
        facts = self._model.config.replace(max_seq_len=self.sizes.context)
        limit = token_limit(job.request, facts)
        count = job.request.num_samples
        return [Sample(job, index, self._loaded, limit) for index in range(count)]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not len(self.queue) and not self._ended

    def stats(self) -> Stats:
        """Return the state; from another thread, numbers may be of two rounds."""
        return Stats(
            lanes=self.config.lanes,
            busy_lanes=len(self.running),
            waiting=len(self.queue),
            pages=self.sizes.pages,
            free_pages=self.prefixes.num_free,
            cached_pages=self.prefixes.num_cached,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached,
            generated_tokens=self._generated,
            finished=self._finished,
        )

    def step(self) -> None:
        """Do one round: ends, admissions, a chunk of each prompt, a few tokens."""
        self._drop_unwanted()
        self._release_ended()
        self._admit()
        firsts = [
            pair for sample in list(self._reading) if (pair := self._read(sample))
        ]
        emitted = None
        if len(self.running) > len(self._reading):
            emitted = self._advance()
        for sample, first in firsts:
            self._take(sample, 0, jax.device_get(first))
        if emitted is None:
            return
        news = jax.device_get(emitted)
        for lane, sample in list(self.running.items()):
            if sample not in self._reading:
                self._take(sample, lane, news)

    def cancel_all(self) -> None:
        """End all samples, in lanes and in the queue."""
        for sample in self.queue.remove(lambda sample: True):
            self._finish(sample, Delta(sample.index, (), "", (), "cancelled"))
        for sample in list(self.running.values()):
            self._finish(sample, Delta(sample.index, (), "", (), "cancelled"))

    def compile(self) -> None:
        """Compile all programs, by running them on a lane without a request."""
        assert self.idle, "compile before the first request"
        widths = [[0] * width for width in chunk_widths(self.config)]
        inputs = self._inputs(Request([0], 1), 0)
        inputs = inputs._replace(limits=jnp.zeros_like(inputs.limits))
        # Twice, since the first results may be on other devices than new lanes.
        for prompt in [*widths, *widths]:
            logits = self._read_into(0, prompt, 0, LanePages(""))
            self._first_token(0, logits, inputs)
            jax.block_until_ready(self._advance())
            self._ended = [0]
            self._release_ended()

    def _drop_unwanted(self) -> None:
        """End the samples of jobs that were cancelled or have failed."""

        def unwanted(sample: Sample) -> bool:
            return sample.job.cancelled or sample.job.finished

        waiting = self.queue.remove(unwanted)
        for sample in [*waiting, *filter(unwanted, list(self.running.values()))]:
            self._finish(sample, Delta(sample.index, (), "", (), "cancelled"))

    def _release_ended(self) -> None:
        """Take the pages of ended lanes away before other lanes get them."""
        if not self._ended:
            return
        ended = np.zeros(self.config.lanes, bool)
        ended[self._ended] = True
        self.lanes = release(self.lanes, ended)
        self._ended = []

    def _admit(self) -> None:
        """Give lanes to waiting samples while lanes and pages last, in order."""
        free = [lane for lane in range(self.config.lanes) if lane not in self.running]
        for lane in free:
            if (sample := self.queue.head()) is None:
                return
            prompt = sample.row.prompt
            num_slots = len(prompt) + (sample.request.max_new_tokens or 0)
            if (pages := self.prefixes.reserve(prompt, num_slots)) is None:
                return
            self.queue.pop()
            sample.lane, sample.pages = lane, pages
            self.running[lane] = sample
            self._reading.append(sample)
            self._prompt_tokens += len(prompt)
            if sample.index == 0:
                cached = self.prefixes.cached_tokens(pages)
                sample.job.usage = Usage(len(prompt), cached)

    def _read(self, sample: Sample) -> tuple[Sample, Emitted] | None:
        """Read the next chunk of a prompt; after the last, sample a token."""
        prompt = sample.row.prompt
        while self.prefixes.advance(sample.pages, prompt):
            pass
        start = max(sample.position, self.prefixes.cached_tokens(sample.pages))
        logits = self._read_into(sample.lane, prompt, start, sample.pages)
        sample.cached += start - sample.position
        sample.position = min(start + self.config.chunk, len(prompt))
        if sample.position - start == self.config.chunk:
            self.prefixes.share(sample.pages, prompt[start : sample.position])
        if sample.position < len(prompt):
            return None
        self._reading.remove(sample)
        self._cached += sample.cached
        inputs = self._inputs(sample.request, sample.index)
        return sample, self._first_token(sample.lane, logits, inputs)

    def _read_into(
        self, lane: int, prompt: Sequence[int], start: int, pages: LanePages
    ) -> Array:
        """Read the chunk of a prompt that begins at `start`; returns its logits."""
        tokens, table = chunk_of(prompt, start, self.config), None
        length = min(self.config.chunk, len(prompt) - start)
        if self.sizes.pages:
            table = np.full(self.sizes.pages_per_lane, NO_PAGE, np.int32)
            table[: len(pages.pages)] = pages.pages
        numbers = map(jnp.int32, (start, length))
        args = (self._model, self._loaded.params, self.lanes, jnp.int32(lane), tokens)
        self.lanes, logits = read_chunk(*args, *numbers, table)
        return logits

    def _first_token(self, lane: int, logits: Array, inputs: LaneInputs) -> Emitted:
        args = (self.lanes, jnp.int32(lane), logits, inputs)
        self.lanes, emitted = first_token(*args, top=self.config.max_logprobs)
        return emitted

    def _advance(self) -> Emitted:
        steps = jnp.int32(self.config.steps)
        args = (self._model, self._loaded.params, self.lanes, steps)
        self.lanes, emitted = advance(*args, top=self.config.max_logprobs)
        return emitted

    def _inputs(self, request: Request, sample: int) -> LaneInputs:
        return lane_inputs(request, sample, self._model, self.config, self._banned)

    def _take(self, sample: Sample, at: int, news: Emitted) -> None:
        """Give a sample the tokens that a device call emitted in a row."""
        emitted = news.tokens[at] >= 0
        if not np.isfinite(news.logprobs.chosen[at][emitted]).all():
            sample.job.fail(
                ServeError(
                    "the logits after this prompt are NaN or infinite; generate from "
                    "it with `python -m llama_jax.sample`, which names the weight"
                )
            )
            self._finish(sample, None)
            return
        if (new := sample.row.take(at, news)) is None:
            return
        count = len(new.token_ids) + (new.stop_id is not None)
        self._generated += count
        usage = sample.job.usage
        total = usage.generated_tokens + count
        sample.job.usage = usage._replace(generated_tokens=total)
        logprobs: tuple[TokenLogprob, ...] = ()
        if new.logprobs is not None and new.top_logprobs is not None:
            parts = zip(new.token_ids, new.logprobs, new.top_logprobs, strict=True)
            logprobs = tuple(TokenLogprob(*part) for part in parts)
        reason = new.finish_reason
        assert reason != "unsafe"
        delta = Delta(sample.index, new.token_ids, new.text, logprobs, reason)
        if reason is None:
            sample.job.push(delta)
        else:
            self._finish(sample, delta)

    def _finish(self, sample: Sample, last: Delta | None) -> None:
        """End a sample, and give its lane and pages back."""
        self._finished += 1
        if sample.lane >= 0:
            del self.running[sample.lane]
            if sample in self._reading:
                self._reading.remove(sample)
            self._ended.append(sample.lane)
            self.prefixes.release(sample.pages)
        if last is not None:
            sample.job.push(last)
