"""The device side of generation: prefill, one decoding step, and a loop of steps.

All are pure functions; the cache goes in and comes out, and is donated. Shapes come in
buckets, and everything that a request may choose (settings, limits, stop ids) is data,
so that within its buckets no request compiles anything anew.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.generation.sampling import (
    SamplingRows,
    TokenCounts,
    TokenLogprobs,
    count_prompt,
    count_token,
    sample_token,
    token_logprobs,
)
from llama_jax.model.cache import KVCache, NewCache
from llama_jax.model.transformer import Llama, apply
from llama_jax.types import Array, Bool, Float, Int, Lengths, Logits, Params, Tokens

MAX_STEPS = 32
"""The most decoding steps of one device call, whatever the caller asks for."""


def bucket(size: int, limit: int, smallest: int = 16) -> int:
    """The size to pad to: the next power of two, between `smallest` and `limit`."""
    return min(max(smallest, 1 << (size - 1).bit_length()), limit)


@functools.partial(jax.jit, static_argnames=("model", "num_slots"))
def prefill(
    model: Llama, params: Params, tokens: Tokens, lengths: Lengths, num_slots: int
) -> tuple[Logits, KVCache]:
    """Read prompts into a new cache.

    Args:
      model: with unrolled layers.
      params: its weights.
      tokens: the prompts, padded on the right with any id.
      lengths: how long each prompt is.
      num_slots: S, at least T.

    Returns:
      The logits of the token that follows each prompt, and the cache.
    """
    logits, cache = _read_prompts(model, params, tokens, lengths, num_slots)
    return logits[:, 0], cache


def _read_prompts(
    model: Llama,
    params: Params,
    tokens: Tokens,
    lengths: Lengths,
    num_slots: int,
    *,
    every_logit: bool = False,
) -> tuple[Float[Array, "B P V"], KVCache]:
    logits, cache = apply(
        model,
        params,
        tokens,
        cache=NewCache(num_slots),
        lengths=lengths,
        logits_at=None if every_logit else lengths[:, None] - 1,
    )
    return logits, cache


def _decode(
    model: Llama, params: Params, cache: KVCache, tokens: Lengths, counted: Lengths
) -> tuple[Logits, KVCache]:
    logits, cache = apply(model, params, tokens[:, None], cache=cache, lengths=counted)
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def decode_step(
    model: Llama, params: Params, cache: KVCache, tokens: Lengths
) -> tuple[Logits, KVCache]:
    """One more token in every row.

    Args:
      model: with unrolled layers.
      params: its weights.
      cache: donated: use the one that is returned. Must have a free slot in each row.
      tokens: the next token of each row.

    Returns:
      The logits of the token after it, and the cache with it.
    """
    return _decode(model, params, cache, tokens, jnp.ones_like(tokens))


class Lanes(NamedTuple):
    """Rows that are being written.

    `token` is the last one sampled, which is not in the cache yet; `remaining` is how
    many more may be sampled.
    """

    cache: KVCache
    token: Int[Array, " B"]
    counts: TokenCounts
    remaining: Int[Array, " B"]
    done: Bool[Array, " B"]


class Written(NamedTuple):
    """What a device call wrote: C tokens per row, -1 behind a row's end."""

    tokens: Int[Array, "B C"]
    logprobs: TokenLogprobs


@functools.partial(
    jax.jit, static_argnames=("model", "num_slots", "top", "score_prompt")
)
def start(
    model: Llama,
    params: Params,
    tokens: Tokens,
    lengths: Lengths,
    rows: SamplingRows,
    limits: Lengths,
    stop_ids: Int[Array, " E"],
    *,
    num_slots: int,
    top: int,
    score_prompt: bool,
) -> tuple[Lanes, Written, TokenLogprobs | None]:
    """Read prompts and sample the first token of each row.

    Args:
      model: with unrolled layers.
      params: its weights.
      tokens: the prompts, padded on the right.
      lengths: how long each is.
      rows: how to sample.
      limits: the most tokens to sample; 0 for rows that only fill the batch.
      stop_ids: tokens that end a row, padded with -1.
      num_slots: S, at least prompt plus limit in each row.
      top: how many of the likeliest tokens to report.
      score_prompt: whether to report the prompt's own log-probabilities: of token
        t + 1 at index t.
    """
    logits, cache = _read_prompts(
        model, params, tokens, lengths, num_slots, every_logit=score_prompt
    )
    scores = None
    if score_prompt:
        scores = token_logprobs(logits[:, :-1], tokens[:, 1:], top)
        last = (lengths - 1)[:, None, None]
        logits = jnp.take_along_axis(logits, last, axis=1)
    counts = count_prompt(tokens, lengths, logits.shape[-1])
    lanes = Lanes(cache, lengths, counts, limits, limits <= 0)
    lanes, chosen, logprobs = _choose(lanes, logits[:, 0], rows, stop_ids, top)
    written = Written(chosen, logprobs)
    return lanes, jax.tree.map(lambda x: x[:, None], written), scores


def _choose(
    lanes: Lanes, logits: Logits, rows: SamplingRows, stop_ids: Array, top: int
) -> tuple[Lanes, Array, TokenLogprobs]:
    """Sample the token behind the cache's last in every row that is not done."""
    token = sample_token(logits, lanes.counts, rows, lanes.cache.length)
    logprobs = token_logprobs(logits, token, top)
    written = jnp.where(lanes.done, -1, token)
    remaining = lanes.remaining - ~lanes.done
    stopped = jnp.any(token[:, None] == stop_ids, axis=-1)
    lanes = lanes._replace(
        token=token,
        counts=count_token(lanes.counts, token),
        remaining=remaining,
        done=lanes.done | stopped | (remaining <= 0),
    )
    return lanes, written, logprobs


@functools.partial(
    jax.jit, static_argnames=("model", "top"), donate_argnames=("lanes",)
)
def advance(
    model: Llama,
    params: Params,
    lanes: Lanes,
    rows: SamplingRows,
    stop_ids: Int[Array, " E"],
    steps: Int[Array, ""],
    *,
    top: int,
) -> tuple[Lanes, Written]:
    """Up to `steps` (at most `MAX_STEPS`) tokens more, fewer if all rows are done."""
    batch = lanes.token.shape[0]

    def unfinished(state: tuple[Array, Lanes, Written]) -> Array:
        step, lanes, _ = state
        return (step < jnp.minimum(steps, MAX_STEPS)) & ~jnp.all(lanes.done)

    def body(state: tuple[Array, Lanes, Written]) -> tuple[Array, Lanes, Written]:
        step, lanes, written = state
        counted = (~lanes.done).astype(jnp.int32)
        logits, cache = _decode(model, params, lanes.cache, lanes.token, counted)
        lanes = lanes._replace(cache=cache)
        lanes, token, logprobs = _choose(lanes, logits, rows, stop_ids, top)
        new = Written(token, logprobs)
        written = jax.tree.map(lambda all, one: all.at[:, step].set(one), written, new)
        return step + 1, lanes, written

    room = (batch, MAX_STEPS)
    written = Written(
        jnp.full(room, -1, jnp.int32),
        TokenLogprobs(
            jnp.zeros(room, jnp.float32),
            jnp.zeros((*room, top), jnp.int32),
            jnp.zeros((*room, top), jnp.float32),
        ),
    )
    start = (jnp.zeros((), jnp.int32), lanes, written)
    _, lanes, written = jax.lax.while_loop(unfinished, body, start)
    return lanes, written
