"""Lanes: rows that decode together, each with everything it needs.

Everything that a request may choose (settings, limits, stop ids) is data, so that
within its buckets no request compiles anything. Serving grows from three functions:
`start` reads one prompt into a cache of its own bucket, `insert` puts it into a lane,
and `advance` runs all lanes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.errors import ConfigError
from llama_jax.generation.sampling import (
    Sampling,
    SamplingRows,
    TokenCounts,
    TokenLogprobs,
    count_prompt,
    count_token,
    sample_token,
    sampling_rows,
    token_logprobs,
)
from llama_jax.model import cache as caches
from llama_jax.model.cache import KVCache, NewCache
from llama_jax.model.pages import NO_PAGE
from llama_jax.model.transformer import Llama, apply
from llama_jax.runtime import Runtime
from llama_jax.types import Array, Bool, Int, Lengths, Logits, Mesh, Params, Tokens

MAX_STEPS = 32
"""Most decoding steps of one device call, whatever the caller wants."""


class Lanes(NamedTuple):
    """Everything that decoding needs to know of its rows.

    Attributes:
      cache: keys and values of the tokens before `token`.
      token: last token sampled, which is not in the cache yet.
      counts: tokens of the prompt and the completion, for the penalties.
      sampling: settings of each row.
      stop_ids: tokens that end each row, padded with -1.
      remaining: tokens that may still be sampled.
      done: rows that have ended; they sample nothing and their cache does not grow.
    """

    cache: KVCache
    token: Int[Array, " B"]
    counts: TokenCounts
    sampling: SamplingRows
    stop_ids: Int[Array, "B E"]
    remaining: Int[Array, " B"]
    done: Bool[Array, " B"]


class Emitted(NamedTuple):
    """Tokens emitted by one call, padded with -1 after a row's end.

    Log-probabilities of the padding mean nothing.
    """

    tokens: Int[Array, "B C"]
    logprobs: TokenLogprobs


def empty_lanes(cache: KVCache, vocab_size: int, num_stop_ids: int = 8) -> Lanes:
    """Lanes without requests, all of them done.

    Args:
      cache: empty, one row per lane.
      vocab_size: V of the model.
      num_stop_ids: E, most stop ids of a lane.
    """
    rows = cache.length.shape[0]
    zeros = jnp.zeros((rows,), jnp.int32)
    return Lanes(
        cache=cache,
        token=zeros,
        counts=TokenCounts(
            jnp.zeros((rows, vocab_size), bool),
            jnp.zeros((rows, vocab_size), jnp.int32),
        ),
        sampling=sampling_rows([Sampling()] * rows, vocab_size),
        stop_ids=jnp.full((rows, num_stop_ids), -1, jnp.int32),
        remaining=jnp.zeros_like(zeros),
        done=jnp.ones((rows,), bool),
    )


@functools.partial(
    jax.jit, static_argnames=("model", "num_slots", "top", "score_prompt")
)
def start(
    model: Llama,
    params: Params,
    tokens: Tokens,
    lengths: Lengths,
    sampling: SamplingRows,
    stop_ids: Int[Array, "B E"],
    limits: Lengths,
    *,
    num_slots: int,
    top: int = 0,
    score_prompt: bool = False,
) -> tuple[Lanes, Emitted, TokenLogprobs | None]:
    """Read prompts and sample the first token of each row.

    Args:
      model: with unrolled layers.
      params: its weights.
      tokens: prompts `[B, T]`, padded on the right with any id.
      lengths: tokens of each prompt.
      sampling: settings of each row.
      stop_ids: tokens that end each row, padded with -1.
      limits: most tokens to sample; 0 for rows that only fill the batch.
      num_slots: S, at least prompt plus limit in each row.
      top: number of likeliest tokens to report.
      score_prompt: report log-probabilities of the prompt: of token t + 1 at index t.

    Returns:
      The lanes, the first token of each, and the scores of the prompts.
    """
    logits, cache = apply(
        model,
        params,
        tokens,
        cache=NewCache(num_slots),
        lengths=lengths,
        logits_at=None if score_prompt else lengths[:, None] - 1,
    )
    scores = None
    if score_prompt:
        scores = token_logprobs(logits[:, :-1], tokens[:, 1:], top)
        last = (lengths - 1)[:, None, None]
        logits = jnp.take_along_axis(logits, last, axis=1)
    args = (tokens, lengths, sampling, stop_ids, limits)
    lanes, emitted = begin(cache, logits[:, 0], *args, top=top)
    return lanes, emitted, scores


@functools.partial(jax.jit, static_argnames="top", donate_argnames="cache")
def begin(
    cache: KVCache,
    logits: Logits,
    tokens: Tokens,
    lengths: Lengths,
    sampling: SamplingRows,
    stop_ids: Int[Array, "B E"],
    limits: Lengths,
    *,
    top: int = 0,
) -> tuple[Lanes, Emitted]:
    """Sample the first token of rows whose prompts are in a cache already.

    `start` is `prefill` and this; a prompt read in chunks is `extend` and this.

    Args:
      cache: donated; holds the prompts.
      logits: of the token after each prompt.
      tokens: the prompts, for the penalties; the rest as in `start`.
      lengths: tokens of each prompt.
      sampling: settings of each row.
      stop_ids: tokens that end each row, padded with -1.
      limits: most tokens to sample.
      top: number of likeliest tokens to report.
    """
    counts = count_prompt(tokens, lengths, logits.shape[-1])
    lanes = Lanes(cache, lengths, counts, sampling, stop_ids, limits, limits <= 0)
    lanes, emitted = _sample(lanes, logits, top)
    return lanes, jax.tree.map(lambda x: x[:, None], emitted)


def _sample(lanes: Lanes, logits: Logits, top: int) -> tuple[Lanes, Emitted]:
    """Sample the token after the cache's last in every row that is not done."""
    token = sample_token(logits, lanes.counts, lanes.sampling, lanes.cache.length)
    emitted = Emitted(
        jnp.where(lanes.done, -1, token), token_logprobs(logits, token, top)
    )
    remaining = lanes.remaining - ~lanes.done
    stopped = jnp.any(token[:, None] == lanes.stop_ids, axis=-1)
    lanes = lanes._replace(
        token=token,
        counts=count_token(lanes.counts, token),
        remaining=remaining,
        done=lanes.done | stopped | (remaining <= 0),
    )
    return lanes, emitted


@functools.partial(
    jax.jit, static_argnames=("runtime", "mesh"), donate_argnames="lanes"
)
def insert(
    lanes: Lanes,
    lane: Int[Array, ""] | int,
    prefix: Lanes,
    pages: Int[Array, " M"] | None = None,
    *,
    runtime: Runtime | None = None,
    mesh: Mesh | None = None,
) -> Lanes:
    """Put a started request into a lane, whatever was there.

    Args:
      lanes: donated.
      lane: index of the lane.
      prefix: one row as `start` or `begin` makes it, not in pages, with at most as many
        slots and stop ids as `lanes`.
      pages: for a paged cache: ids of the lane's pages from now on, `NO_PAGE` after
        the last.
      runtime: of the model; only needed on a mesh.
      mesh: devices of the lanes.

    Raises:
      ConfigError: the prefix does not fit the lanes.
    """
    cache = caches.insert(
        lanes.cache, lane, prefix.cache, pages, runtime=runtime, mesh=mesh
    )
    return set_row(lanes._replace(cache=cache), lane, prefix)


def set_row(lanes: Lanes, lane: Int[Array, ""] | int, row: Lanes) -> Lanes:
    """Replace everything of a lane but its cache by the only row of other lanes.

    Raises:
      ConfigError: the row has more stop ids than a lane holds.
    """
    num_stop_ids, wide = row.stop_ids.shape[1], lanes.stop_ids.shape[1]
    if num_stop_ids > wide:
        raise ConfigError(
            f"lanes: a request has {num_stop_ids} stop ids (padded), but a lane holds "
            f"{wide}; make the lanes with more (empty_lanes)"
        )
    fill = ((0, 0), (0, wide - num_stop_ids))
    row = row._replace(stop_ids=jnp.pad(row.stop_ids, fill, constant_values=-1))

    def write(rows: Array, new: Array) -> Array:
        start: list[Array | int] = [lane, *[0] * (rows.ndim - 1)]
        return jax.lax.dynamic_update_slice(rows, new, start)

    pairs = zip(lanes[1:], row[1:], strict=True)  # all but the cache
    return Lanes(lanes.cache, *(jax.tree.map(write, *pair) for pair in pairs))


@functools.partial(jax.jit, donate_argnames="lanes")
def release(lanes: Lanes, ended: Bool[Array, " B"]) -> Lanes:
    """End lanes early, and take the pages of a paged cache from them.

    A lane whose pages another lane is to have must be released first: even a lane that
    is done writes into the slot after its last.

    Args:
      lanes: donated.
      ended: lanes to end; the others stay as they are.
    """
    cache, table = lanes.cache, lanes.cache.page_table
    if table is not None:
        table = jnp.where(ended[:, None], NO_PAGE, table)
        cache = cache._replace(page_table=table)
    return lanes._replace(cache=cache, done=lanes.done | ended)


@functools.partial(
    jax.jit, static_argnames=("model", "top"), donate_argnames=("lanes",)
)
def advance(
    model: Llama,
    params: Params,
    lanes: Lanes,
    steps: Int[Array, ""],
    *,
    top: int = 0,
) -> tuple[Lanes, Emitted]:
    """Sample up to `steps` more tokens in every lane; fewer if all lanes are done.

    Args:
      model: with unrolled layers.
      params: its weights.
      lanes: donated.
      steps: at most `MAX_STEPS`.
      top: number of likeliest tokens to report.
    """
    batch = lanes.token.shape[0]

    def unfinished(state: tuple[Array, Lanes, Emitted]) -> Array:
        step, lanes, _ = state
        return (step < jnp.minimum(steps, MAX_STEPS)) & ~jnp.all(lanes.done)

    def body(state: tuple[Array, Lanes, Emitted]) -> tuple[Array, Lanes, Emitted]:
        step, lanes, emitted = state
        lengths = (~lanes.done).astype(jnp.int32)
        token = lanes.token[:, None]
        logits, cache = apply(model, params, token, cache=lanes.cache, lengths=lengths)
        lanes, new = _sample(lanes._replace(cache=cache), logits[:, 0], top)
        emitted = jax.tree.map(lambda all, at: all.at[:, step].set(at), emitted, new)
        return step + 1, lanes, emitted

    shape = (batch, MAX_STEPS)
    emitted = Emitted(
        jnp.full(shape, -1, jnp.int32),
        TokenLogprobs(
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, top), jnp.int32),
            jnp.zeros((*shape, top), jnp.float32),
        ),
    )
    first = (jnp.zeros((), jnp.int32), lanes, emitted)
    _, lanes, emitted = jax.lax.while_loop(unfinished, body, first)
    return lanes, emitted
