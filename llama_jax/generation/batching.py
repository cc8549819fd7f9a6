"""Requests as the arrays that the device side takes."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.generation.decode import bucket
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling, SamplingRows, sampling_rows
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Array, Int, Lengths, Tokens


class StartInputs(NamedTuple):
    """Arguments of `decode.start` that depend on the requests."""

    tokens: Tokens
    lengths: Lengths
    sampling: SamplingRows
    stop_ids: Int[Array, "B E"]
    limits: Lengths


def token_limit(request: Request, config: LlamaConfig) -> int:
    """Most tokens that a completion of a request may have in the context."""
    room = config.max_seq_len - len(request.prompt_ids)
    return min(room, request.max_new_tokens or room)


def num_slots(requests: Sequence[Request], config: LlamaConfig) -> int:
    """Cache slots that a batch of requests needs, in buckets."""
    most = max(len(r.prompt_ids) + token_limit(r, config) for r in requests)
    return bucket(most, config.max_seq_len)


def start_inputs(
    requests: Sequence[Request],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    *,
    samples: Sequence[int] | None = None,
) -> StartInputs:
    """Put requests into arrays, one row each; rows, tokens and stop ids in buckets.

    Args:
      requests: at least one; `num_samples` is not looked at.
      config: of the model.
      tokenizer: ids that it has no text for are never sampled.
      samples: number of each row among the completions of its request; defaults to 0.

    Raises:
      PromptError: a biased id does not exist.
    """
    # Rows that only fill the bucket have one token to read and none to sample.
    fill = bucket(len(requests), 1 << 30, smallest=1) - len(requests)
    rows = len(requests) + fill
    lengths = [len(request.prompt_ids) for request in requests]
    tokens = np.zeros((rows, bucket(max(lengths), config.max_seq_len)), np.int32)
    ends = max(len(request.stop_ids) for request in requests)
    stop_ids = np.full((rows, bucket(ends, 1 << 30, smallest=8)), -1, np.int32)
    for row, request in enumerate(requests):
        tokens[row, : lengths[row]] = request.prompt_ids
        stop_ids[row, : len(request.stop_ids)] = request.stop_ids
    limits = [token_limit(request, config) for request in requests]
    return StartInputs(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray([*lengths, *[1] * fill], jnp.int32),
        sampling=sampling_rows(
            [*(request.sampling for request in requests), *[Sampling()] * fill],
            config.vocab_size,
            samples=[*(samples or [0] * len(requests)), *[0] * fill],
            banned=tokenizer.unnamed_ids(config.vocab_size),
        ),
        stop_ids=jnp.asarray(stop_ids),
        limits=jnp.asarray([*limits, *[0] * fill], jnp.int32),
    )
