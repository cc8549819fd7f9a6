"""From logits to the next token; all settings are data, one entry per row.

Order: repetition, presence and frequency penalties, logit bias, temperature, top-k,
top-p, min-p. Log-probabilities are of the model's own logits, before all of these.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.arguments import checked
from llama_jax.errors import PromptError
from llama_jax.types import Array, Bool, Float, Int, Lengths, Logits, UInt32


@checked(PromptError)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of a completion are drawn; the defaults are Meta's.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_p: keep a token if the tokens likelier than it have at most this much
        probability (arXiv:1904.09751); 1 keeps all.
      top_k: keep this many of the likeliest tokens, and those equal to the last of
        them; 0 keeps all.
      min_p: keep tokens at least this likely, relative to the likeliest
        (arXiv:2407.01082); 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of every
        token in the prompt or the completion (arXiv:1909.05858); 1 has no effect.
      presence_penalty: subtracted once from logits of tokens in the completion.
      frequency_penalty: subtracted for each time that a token is in the completion.
      logit_bias: added to the logits of these token ids; `-inf` bans one.
      seed: seed of the random numbers; equal seeds give equal completions, whatever
        else is in the batch.

    Raises:
      PromptError: a setting is out of range.

    >>> Sampling(temperature=0.8, top_k=40).top_p
    0.9
    >>> Sampling(top_p=1.5)
    Traceback (most recent call last):
    llama_jax.errors.PromptError: sampling: top_p is 1.5; it must be more than 0 and ...
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (1 keeps all)"),
            ("top_k", _whole(self.top_k, 31), "an integer, 0 (keeps all) or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (keeps all) and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("presence_penalty", True, "finite"),
            ("frequency_penalty", True, "finite"),
            ("seed", _whole(self.seed, 32), "an integer between 0 and 2**32 - 1"),
        ):
            value = getattr(self, name)
            if not fits or not math.isfinite(value):
                raise PromptError(f"sampling: {name} is {value}; it must be {expected}")


def _whole(value: float, bits: int) -> bool:
    return isinstance(value, numbers.Integral) and 0 <= value < 1 << bits


class SamplingRows(NamedTuple):
    """The settings of a batch, one entry per row.

    Attributes:
      bias: of each logit; `-inf` bans a token.
      sample: number of each row among the completions of its prompt.

    The others are those of `Sampling`.
    """

    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]
    presence_penalty: Float[Array, " B"]
    frequency_penalty: Float[Array, " B"]
    bias: Float[Array, "B V"]
    seed: UInt32[Array, " B"]
    sample: Int[Array, " B"]


class TokenCounts(NamedTuple):
    """Which tokens are in each row so far, for the penalties."""

    in_prompt: Bool[Array, "B V"]
    in_completion: Int[Array, "B V"]


def sampling_rows(
    settings: Sequence[Sampling],
    vocab_size: int,
    *,
    samples: Sequence[int] | None = None,
    banned: Sequence[int] = (),
) -> SamplingRows:
    """Put settings into arrays.

    Args:
      settings: one per row.
      vocab_size: V, logits per row.
      samples: number of each row among the completions of its prompt: rows of equal
        seeds and different numbers draw different tokens. Defaults to 0.
      banned: ids that no row may draw.

    Raises:
      PromptError: a biased id does not exist.
    """
    bias = np.zeros((len(settings), vocab_size), np.float32)
    for row, setting in enumerate(settings):
        for token, value in setting.logit_bias.items():
            if not 0 <= token < vocab_size or math.isnan(value) or value == math.inf:
                raise PromptError(
                    f"sampling: logit_bias {{{token}: {value}}} needs a token id below "
                    f"{vocab_size} and a number or -inf"
                )
            bias[row, token] = value
    bias[:, list(banned)] = -np.inf

    def column(name: str, dtype: type) -> Array:
        return jnp.asarray([getattr(setting, name) for setting in settings], dtype)

    return SamplingRows(
        temperature=column("temperature", jnp.float32),
        top_p=column("top_p", jnp.float32),
        top_k=column("top_k", jnp.int32),
        min_p=column("min_p", jnp.float32),
        repetition_penalty=column("repetition_penalty", jnp.float32),
        presence_penalty=column("presence_penalty", jnp.float32),
        frequency_penalty=column("frequency_penalty", jnp.float32),
        bias=jnp.asarray(bias),
        seed=column("seed", jnp.uint32),
        sample=jnp.asarray(samples or [0] * len(settings), jnp.int32),
    )


def count_prompt(
    tokens: Int[Array, "B T"], lengths: Lengths, vocab_size: int
) -> TokenCounts:
    """Count the tokens of prompts; the completions are empty."""
    batch, width = tokens.shape
    in_row = jnp.arange(width)[None] < lengths[:, None]
    rows = jnp.arange(batch)[:, None]
    in_prompt = jnp.zeros((batch, vocab_size), bool).at[rows, tokens].max(in_row)
    return TokenCounts(in_prompt, jnp.zeros((batch, vocab_size), jnp.int32))


def count_token(counts: TokenCounts, tokens: Lengths) -> TokenCounts:
    """Add one token to the completion of each row."""
    rows = jnp.arange(tokens.shape[0])
    in_completion = counts.in_completion.at[rows, tokens].add(1)
    return counts._replace(in_completion=in_completion)


def apply_penalties(
    logits: Logits, counts: TokenCounts, sampling: SamplingRows
) -> Logits:
    """Apply repetition, presence and frequency penalties and the bias."""
    times = counts.in_completion
    penalty = sampling.repetition_penalty[:, None]
    weakened = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(counts.in_prompt | (times > 0), weakened, logits)
    logits -= sampling.presence_penalty[:, None] * (times > 0)
    logits -= sampling.frequency_penalty[:, None] * times
    return logits + sampling.bias


def filter_logits(logits: Logits, sampling: SamplingRows) -> Logits:
    """Set the logits that top-k, top-p and min-p drop to -inf.

    Each filter works on the distribution that the one before it leaves. Nothing is
    sorted: each filter is a threshold on the probability, found by bisection.

    Args:
      logits: divided by the temperature.
      sampling: settings of each row.
    """
    vocab_size = logits.shape[-1]
    probs = jax.nn.softmax(logits, axis=-1)
    top_k = jnp.where(sampling.top_k == 0, vocab_size, sampling.top_k)

    def fewer_than_k(threshold: Array) -> Array:
        return jnp.sum(probs > threshold, axis=-1, keepdims=True) < top_k[:, None]

    probs = jnp.where(probs >= _least_threshold(probs, fewer_than_k), probs, 0.0)
    probs /= jnp.sum(probs, axis=-1, keepdims=True)

    def at_most_p(threshold: Array) -> Array:
        above = jnp.where(probs > threshold, probs, 0.0)
        return jnp.sum(above, axis=-1, keepdims=True) <= sampling.top_p[:, None]

    threshold = _least_threshold(probs, at_most_p)
    # Rounding can put the sum above one, which must not drop a token.
    threshold = jnp.where(sampling.top_p[:, None] < 1, threshold, 0.0)
    floor = sampling.min_p[:, None] * jnp.max(probs, axis=-1, keepdims=True)
    keep = (probs >= jnp.maximum(threshold, floor)) & (probs > 0)
    return jnp.where(keep, logits, -jnp.inf)


def _least_threshold(
    probs: Float[Array, "B V"], passes: Callable[[Array], Array]
) -> Float[Array, "B 1"]:
    """The smallest float in [0, 1] that passes a monotone test which 1 passes.

    Non-negative floats are ordered as their bits are, so 30 bisections are exact.
    """

    def bisect(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        passed = passes(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(passed, low, middle + 1), jnp.where(passed, middle, high)

    low = jnp.zeros((probs.shape[0], 1), jnp.int32)
    high = jnp.full_like(low, np.float32(1.0).view(np.int32))
    _, bits = jax.lax.fori_loop(0, 30, bisect, (low, high))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def sample_token(
    logits: Logits,
    counts: TokenCounts,
    sampling: SamplingRows,
    slots: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Draw the next token of every row.

    Args:
      logits: of the model, float32.
      counts: tokens in the rows, for the penalties.
      sampling: settings of each row.
      slots: cache index of each new token. It is folded into the row's random key, so
        that a row draws the same numbers in any batch and with any chunking.
    """
    logits = apply_penalties(logits, counts, sampling)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def noise(seed: Array, sample: Array, slot: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), sample)
        key = jax.random.fold_in(key, slot)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    def draw() -> Array:
        temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
        # Subtract the maximum first: a compiler may divide twice with different
        # rounding, which at a tiny temperature separates a logit from its own maximum.
        below = logits - jnp.max(logits, axis=-1, keepdims=True)
        filtered = filter_logits(below / temperature[:, None], sampling)
        gumbel = jax.vmap(noise)(sampling.seed, sampling.sample, slots)
        drawn = jnp.argmax(filtered + gumbel, axis=-1).astype(jnp.int32)
        return jnp.where(sampling.temperature > 0, drawn, likeliest)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda: likeliest)


class TokenLogprobs(NamedTuple):
    """Log-probabilities (nats) of the chosen tokens and of the likeliest ones."""

    chosen: Float[Array, "*batch"]
    top_ids: Int[Array, "*batch top"]
    top: Float[Array, "*batch top"]


@functools.partial(jax.jit, static_argnames="top")
def token_logprobs(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"], top: int = 0
) -> TokenLogprobs:
    """Compute the log softmax of the logits at the tokens and the `top` likeliest."""
    normed = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(normed, tokens[..., None], axis=-1)[..., 0]
    best, ids = jax.lax.top_k(normed, top)
    return TokenLogprobs(chosen, ids, best)
