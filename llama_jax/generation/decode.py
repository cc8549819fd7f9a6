"""Prefill, more tokens, one more token: pure functions from tokens to logits.

The cache goes in and comes out, and is donated. Shapes decide what is compiled: pad
tokens to a few lengths (`batching.bucket`), and nothing is compiled twice.
"""

import functools

import jax
import jax.numpy as jnp

from llama_jax.arguments import checked
from llama_jax.errors import ConfigError
from llama_jax.model.cache import KVCache, NewCache
from llama_jax.model.transformer import Llama, apply
from llama_jax.types import Array, Float, Int, Lengths, Logits, Params, Tokens


@checked(ConfigError)
@functools.partial(jax.jit, static_argnames=("model", "num_slots"))
def prefill(
    model: Llama, params: Params, tokens: Tokens, lengths: Lengths, num_slots: int
) -> tuple[Logits, KVCache]:
    """Read prompts into a new cache.

    Args:
      model: with unrolled layers.
      params: its weights.
      tokens: prompts `[B, T]`, padded on the right with any id.
      lengths: tokens of each prompt.
      num_slots: S, at least T.

    Returns:
      The logits of the token after each prompt, and the cache.

    >>> import jax.numpy as jnp, llama_jax
    >>> model, params, tokenizer = llama_jax.load()
    >>> ids = jnp.asarray([tokenizer.encode("Once upon a", bos=True, eos=False)])
    >>> logits, cache = prefill(model, params, ids, jnp.asarray([ids.shape[1]]), 32)
    >>> tokenizer.decode([int(logits[0].argmax())]), cache.num_slots
    ('time', 32)
    """
    logits, cache = apply(
        model,
        params,
        tokens,
        cache=NewCache(num_slots),
        lengths=lengths,
        logits_at=lengths[:, None] - 1,
    )
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def extend(
    model: Llama,
    params: Params,
    cache: KVCache,
    tokens: Tokens,
    lengths: Lengths,
    logits_at: Int[Array, "B P"] | None = None,
) -> tuple[Float[Array, "B P V"], KVCache]:
    """Read more tokens into a cache: a chunk of a prompt, or a draft to verify.

    Args:
      model: with unrolled layers.
      params: its weights.
      cache: donated; has T free slots in each row.
      tokens: `[B, T]`, padded on the right with any id.
      lengths: tokens of each row that count; 0 leaves a row as it is.
      logits_at: positions in T whose logits to compute; defaults to all.

    Returns:
      The logits of the tokens that follow those positions, and the cache.
    """
    logits, cache = apply(
        model, params, tokens, cache=cache, lengths=lengths, logits_at=logits_at
    )
    return logits, cache


@checked(ConfigError)
@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def decode_step(
    model: Llama, params: Params, cache: KVCache, tokens: Lengths
) -> tuple[Logits, KVCache]:
    """Read one more token in every row.

    Args:
      model: with unrolled layers.
      params: its weights.
      cache: donated; has a free slot in each row.
      tokens: next token of each row.

    Returns:
      The logits of the token after it, and the cache with it.

    >>> import jax.numpy as jnp, llama_jax
    >>> model, params, _ = llama_jax.load()
    >>> cache = llama_jax.init_cache(model.config, 1, 16, "float32")
    >>> logits, cache = decode_step(model, params, cache, jnp.asarray([1]))
    >>> cache.length.tolist()
    [1]
    """
    lengths = jnp.ones_like(tokens)
    logits, cache = apply(model, params, tokens[:, None], cache=cache, lengths=lengths)
    return logits[:, 0], cache
