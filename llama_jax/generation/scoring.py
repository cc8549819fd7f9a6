"""Log-probabilities of given tokens: nothing is sampled.

Every batch has the same number of rows, and a row's padding depends on its own length
alone, so that a request has the same score, bit for bit, in any company.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from llama_jax.arguments import checked
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.distributed import to_host
from llama_jax.errors import PromptError
from llama_jax.generation.batching import bucket
from llama_jax.generation.generate import check_logprobs, check_token_ids
from llama_jax.generation.request import Request
from llama_jax.model.transformer import Llama, apply
from llama_jax.types import Array, Params, Tokens


class Score(NamedTuple):
    """How likely the tokens of a request are, one entry per token.

    Entry t is of token t given all tokens before it. The first token has none before
    it: its log-probability is 0 and it is not greedy. So `logprobs.sum()` is the
    log-likelihood of the text, and `logprobs[n:].sum()` that of what follows the first
    n tokens.

    Attributes:
      logprobs: log-probabilities (nats) under the model's own distribution.
      greedy: whether each token is the likeliest one (of equals, the lowest id).
      best_ids: the likeliest token at each position; -1 at the first.
      best_logprobs: its log-probability.
    """

    logprobs: Float[np.ndarray, " T"]
    greedy: Bool[np.ndarray, " T"]
    best_ids: Int[np.ndarray, " T"]
    best_logprobs: Float[np.ndarray, " T"]


@checked(PromptError)
def score(
    loaded: Loaded, requests: Sequence[Request], *, batch_size: int = 8
) -> list[Score]:
    """Compute the log-probability of every token of the requests' prompts.

    Logits exist for a chunk of tokens at a time, never for a whole batch.

    Args:
      loaded: model, weights and tokenizer.
      requests: any number; `prompt_ids` is all that counts.
      batch_size: rows of every batch. It is a part of the computation as the dtype is:
        another number may change the last bit of a result.

    Returns:
      A score per request.

    Raises:
      PromptError: a prompt is longer than the context or has an id that the model
        lacks, or `batch_size` is not positive.
      CheckpointError: the logits are not finite; names the weight, if it is one.

    >>> import llama_jax
    >>> loaded = llama_jax.load()
    >>> texts = ["Once upon a time", "Once upon a dime"]
    >>> requests = [llama_jax.text_request(loaded.tokenizer, text) for text in texts]
    >>> usual, unusual = score(loaded, requests)
    >>> bool(usual.logprobs.sum() > unusual.logprobs.sum()), bool(usual.greedy[-1])
    (True, True)
    """
    if batch_size < 1:
        raise PromptError(f"batch_size: must be at least 1, got {batch_size}")
    model = loaded.language_model
    limit = model.config.max_seq_len
    by_width: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        length = len(request.prompt_ids)
        check_token_ids(request, model.config, f"request {index + 1}")
        if length > limit:
            raise PromptError(
                f"request {index + 1}: the prompt has {length} tokens, but the context "
                f"holds {limit}; shorten it"
            )
        by_width.setdefault(bucket(length, limit), []).append(index)
    scores: dict[int, Score] = {}
    for width, indices in sorted(by_width.items()):
        for first in range(0, len(indices), batch_size):
            group = indices[first : first + batch_size]
            tokens = np.zeros((batch_size, width), np.int32)
            for row, index in enumerate(group):
                ids = requests[index].prompt_ids
                tokens[row, : len(ids)] = ids
            scored = _score_batch(model, loaded.params, jnp.asarray(tokens))
            logprobs, best, best_logprobs = to_host(scored)
            for row, index in enumerate(group):
                length = len(requests[index].prompt_ids)
                check_logprobs(logprobs[row, :length], loaded)
                scores[index] = Score(
                    logprobs[row, :length],
                    best[row, :length] == tokens[row, :length],
                    best[row, :length],
                    best_logprobs[row, :length],
                )
    return [scores[index] for index in range(len(requests))]


@functools.partial(jax.jit, static_argnames="model")
def _score_batch(
    model: Llama, params: Params, tokens: Tokens
) -> tuple[Float[Array, "B T"], Int[Array, "B T"], Float[Array, "B T"]]:
    """Scores of right-padded rows; what stands at the padding means nothing."""
    targets = jnp.roll(tokens, -1, axis=1)
    scores = apply(model, params, tokens, targets, method="scores")
    logprobs, best, best_logprobs = (jnp.roll(x, 1, axis=1) for x in scores)
    first = (jnp.arange(tokens.shape[1]) == 0)[None]
    return (
        jnp.where(first, 0.0, logprobs),
        jnp.where(first, -1, best),
        jnp.where(first, 0.0, best_logprobs),
    )
