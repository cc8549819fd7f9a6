"""Engines in tests: random requests, runs alone and together, hostile memory."""

import functools
import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from support.models import TALKING, talking_model

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.runtime import Runtime
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.serve.jobs import Delta, QueuedJob
from llama_jax.serve.scheduler import Scheduler

CONTEXT = 56
PAGED = EngineConfig(lanes=3, chunk=16, pages=9, max_logprobs=2, steps=3)
DENSE = EngineConfig(lanes=3, chunk=16, pages=0, max_logprobs=2, steps=3)


@functools.cache
def served_model(dtype: Any = "float32", cache_dtype: Any = None) -> Loaded:
    """A small model whose context is no multiple of a chunk."""
    config = TALKING.replace(num_layers=1, max_seq_len=CONTEXT)
    return talking_model(config, Runtime(dtype=dtype, cache_dtype=cache_dtype))


def random_request(rng: random.Random) -> Request:
    """Any request: its prompt may begin as others do."""
    shared = [1, *range(263, 263 + 39)][: rng.choice([1, 15, 16, 17, 32, 33, 40])]

    def some_ids(most: int) -> list[int]:
        return [rng.randrange(263, 320) for _ in range(rng.randint(0, most))]

    return Request(
        shared + some_ids(8),
        max_new_tokens=rng.choice([1, 4, 9, None]),
        sampling=Sampling(
            temperature=rng.choice([0.0, 0.7, 2.0]),
            top_p=rng.choice([0.8, 1.0]),
            top_k=rng.choice([0, 40]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            seed=rng.randrange(4),
            logit_bias={rng.randrange(300): 2.5},
        ),
        stop_ids=some_ids(3),
        stop=rng.choice([["e"], ["th", "a b"], []]),
        num_samples=rng.choice([1, 1, 1, 2]),
        logprobs=rng.choice([None, 0, 2]),
    )


def submit(scheduler: Scheduler, request: Request) -> QueuedJob:
    """Put a request into the queue."""
    job = QueuedJob(request)
    scheduler.queue.put(scheduler.samples_of(job), "")
    return job


def joined(deltas: Sequence[Delta], samples: int) -> list[tuple[Any, ...]]:
    """Ids, text, log-probabilities and reason of each sample."""
    results = []
    for index in range(samples):
        parts = [delta for delta in deltas if delta.index == index]
        assert all(part.finish_reason is None for part in parts[:-1])
        ids = tuple(id for part in parts for id in part.ids)
        text = "".join(part.text for part in parts)
        logprobs = tuple(p for part in parts for p in part.logprobs)
        results.append((ids, text, logprobs, parts and parts[-1].finish_reason))
    return results


def run_alone(request: Request, config: EngineConfig, loaded: Loaded) -> list[Any]:
    """The samples of a request in lanes of its own, one after another."""
    scheduler = Scheduler(loaded, config)
    job = submit(scheduler, request)
    while not scheduler.idle:
        scheduler.step()
    return joined(job.poll(), request.num_samples)


def poison(scheduler: Scheduler) -> None:
    """Put NaN into every slot whose content no request may depend on."""
    cache = scheduler.lanes.cache
    lengths = np.asarray(cache.length)
    chunk, lanes = scheduler.config.chunk, scheduler.config.lanes
    used = {
        lane: int(lengths[lane]) if sample.position else 0
        for lane, sample in scheduler.running.items()
    }
    if cache.page_table is None:
        live = np.zeros((lanes, cache.num_slots), bool)
        for lane, length in used.items():
            # Reading a prompt has cleared the slots of a lane that decodes.
            decodes = scheduler.running[lane] not in scheduler._reading
            live[lane, : None if decodes else length] = True
    else:
        live = np.zeros((scheduler.sizes.pages, chunk), bool)
        live[scheduler.prefixes.shared_pages()] = True
        for lane, length in used.items():
            for number, page in enumerate(scheduler.running[lane].pages.pages):
                live[page, : max(length - number * chunk, 0)] = True

    def fill(slots: jax.Array) -> jax.Array:
        if not jnp.issubdtype(slots.dtype, jnp.floating):
            return slots
        keep = live.reshape(live.shape[0], 1, -1, *(1 for _ in slots.shape[3:]))
        return jnp.where(keep, slots, jnp.asarray(jnp.nan, slots.dtype))

    layers = jax.tree.map(fill, cache.layers)
    scheduler.lanes = scheduler.lanes._replace(cache=cache._replace(layers=layers))


def check_nothing_leaks(scheduler: Scheduler) -> None:
    """All lanes and pages of an idle scheduler are free or hold shared chunks."""
    stats = scheduler.stats()
    assert (stats.busy_lanes, stats.waiting) == (0, 0)
    assert stats.free_pages + stats.cached_pages == stats.pages
    assert bool(scheduler.lanes.done.all())
    table = scheduler.lanes.cache.page_table
    assert table is None or bool((table == -1).all())
