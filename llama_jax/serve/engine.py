"""The device side of serving: pure functions over lanes.

A prompt is read into its lane chunk by chunk (`read_chunk`), its first token is sampled
(`first_token`), and all lanes decode together (`generation.lanes.advance`). Shapes
depend on the configuration and the request alone, so that every row is computed by the
same programs whatever the other lanes do.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.generation.batching import bucket, token_limit
from llama_jax.generation.lanes import Emitted, Lanes, begin, empty_lanes, set_row
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import SamplingRows, sampling_rows
from llama_jax.kernels.quantized_slots import zero_later_slots
from llama_jax.model import cache as caches
from llama_jax.model.cache import KVCache, cache_shardings, init_cache, init_paged_cache
from llama_jax.model.transformer import Llama, apply
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.types import Array, Int, Lengths, Logits, Params, Tokens


def new_lanes(model: Llama, config: EngineConfig) -> Lanes:
    """Make empty lanes with a cache of the configuration's kind.

    Args:
      model: with unrolled layers.
      config: of the engine.
    """
    sizes, facts, runtime = config.resolve(model.config), model.config, model.runtime
    num_slots = sizes.pages_per_lane * config.chunk

    def create() -> Lanes:
        if sizes.pages:
            cache = init_paged_cache(
                facts,
                config.lanes,
                num_pages=sizes.pages,
                page_size=config.chunk,
                pages_per_row=sizes.pages_per_lane,
                dtype=runtime.slot_dtype,
            )
        else:
            cache = init_cache(facts, config.lanes, num_slots, runtime.slot_dtype)
        return empty_lanes(cache, facts.vocab_size, config.max_stop_ids)

    if model.mesh is None:
        return create()
    args = (facts, runtime, model.mesh, config.lanes, num_slots)
    lanes = jax.jit(create)()
    shardings = cache_shardings(*args)
    return lanes._replace(cache=jax.device_put(lanes.cache, shardings))


class LaneInputs(NamedTuple):
    """Arguments of `first_token` that depend on the request."""

    tokens: Tokens
    lengths: Lengths
    sampling: SamplingRows
    stop_ids: Int[Array, "B E"]
    limits: Lengths


def lane_inputs(
    request: Request,
    sample: int,
    model: Llama,
    config: EngineConfig,
    banned: Sequence[int] = (),
) -> LaneInputs:
    """Put a sample of a request into arrays of one row.

    Args:
      request: that fits the engine.
      sample: its number; with the request's seed it decides the random numbers.
      model: decides the context and the vocabulary.
      config: of the engine.
      banned: ids that are never sampled.
    """
    sizes, length = config.resolve(model.config), len(request.prompt_ids)
    facts = model.config.replace(max_seq_len=sizes.context)
    tokens = np.zeros((1, sizes.context), np.int32)
    tokens[0, :length] = request.prompt_ids
    stop_ids = np.full((1, config.max_stop_ids), -1, np.int32)
    stop_ids[0, : len(request.stop_ids)] = request.stop_ids
    return LaneInputs(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray([length], jnp.int32),
        sampling=sampling_rows(
            [request.sampling], facts.vocab_size, samples=[sample], banned=banned
        ),
        stop_ids=jnp.asarray(stop_ids),
        limits=jnp.asarray([token_limit(request, facts)], jnp.int32),
    )


def chunk_of(prompt: Sequence[int], start: int, config: EngineConfig) -> Tokens:
    """The chunk of a prompt that begins at a multiple of C, in its bucket."""
    ids = prompt[start : start + config.chunk]
    tokens = np.zeros((1, bucket(len(ids), config.chunk)), np.int32)
    tokens[0, : len(ids)] = ids
    return jnp.asarray(tokens)


def chunk_widths(config: EngineConfig) -> list[int]:
    """All shapes that `chunk_of` gives to chunks."""
    return sorted({bucket(size + 1, config.chunk) for size in range(config.chunk)})


@functools.partial(jax.jit, static_argnames="model", donate_argnames="lanes")
def read_chunk(
    model: Llama,
    params: Params,
    lanes: Lanes,
    lane: Int[Array, ""],
    tokens: Tokens,
    start: Int[Array, ""],
    length: Int[Array, ""],
    pages: Int[Array, " M"] | None = None,
) -> tuple[Lanes, Logits]:
    """Read a chunk of a prompt into a lane that samples nothing yet.

    Args:
      model: with unrolled layers.
      params: its weights.
      lanes: donated.
      lane: index of the lane; it must be done.
      tokens: the chunk `[1, T]`, padded on the right with any id.
      start: slot of the first of them; earlier slots hold the prompt so far.
      length: how many tokens count.
      pages: of a paged cache: the lane's pages from now on.

    Returns:
      The lanes, and the logits of the token after the chunk.
    """
    cache = lanes.cache
    cache = cache._replace(length=cache.length.at[lane].set(start))
    if cache.page_table is not None and pages is not None:
        cache = cache._replace(page_table=cache.page_table.at[lane].set(pages))
    row = caches.take_row(cache, lane)
    if row.page_table is None:  # attention to pages clears its copy of them
        row = row._replace(layers=zero_later_slots(row.layers, start[None]))
    logits, row = apply(
        model,
        params,
        tokens,
        cache=row,
        lengths=length[None],
        logits_at=length[None, None] - 1,
    )
    cache = caches.put_row(cache, lane, row, runtime=model.runtime, mesh=model.mesh)
    return lanes._replace(cache=cache), logits[:, 0]


@functools.partial(jax.jit, static_argnames="top", donate_argnames="lanes")
def first_token(
    lanes: Lanes,
    lane: Int[Array, ""],
    logits: Logits,
    inputs: LaneInputs,
    *,
    top: int,
) -> tuple[Lanes, Emitted]:
    """Sample the first token of a lane whose prompt has been read.

    From then on `advance` decodes the lane.

    Args:
      lanes: donated.
      lane: index of the lane.
      logits: of the token after the prompt, from `read_chunk`.
      inputs: the request.
      top: number of likeliest tokens to report.
    """
    of_lane = KVCache((), inputs.lengths)  # only its length counts here
    row, emitted = begin(of_lane, logits, *inputs, top=top)
    return set_row(lanes, lane, row), emitted
