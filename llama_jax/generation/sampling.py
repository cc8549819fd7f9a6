"""From logits to the next token: settings per row, all of them data to the compiler.

Order: repetition, presence and frequency penalties, logit bias, temperature, top-k,
top-p, min-p. Log-probabilities are of the model's own logits, before all of that.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import PromptError
from llama_jax.types import Array, Bool, Float, Int, Lengths, Logits, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one completion is drawn; the defaults are Meta's.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_p: keep a token if the tokens likelier than it hold at most this much mass.
      top_k: keep this many of the likeliest tokens (and their equals); 0 keeps all.
      min_p: keep tokens at least this likely, relative to the likeliest.
      repetition_penalty: divides positive and multiplies negative logits of every
        token in the prompt or the completion (arXiv:1909.05858); 1 does nothing.
      presence_penalty: subtracted once a token is in the completion.
      frequency_penalty: subtracted for each time it is in the completion.
      logit_bias: added to the logits of these token ids; `-inf` bans one.
      seed: of the row's random numbers; equal seeds give equal completions, whatever
        the neighbours in the batch.

    Raises:
      PromptError: a setting is out of its range.
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
        for name, fits, wanted in (
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
                raise PromptError(f"sampling: {name} is {value}; it must be {wanted}")


def _whole(value: float, bits: int) -> bool:
    return isinstance(value, numbers.Integral) and 0 <= value < 1 << bits


class SamplingRows(NamedTuple):
    """The settings of a batch, one entry per row."""

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
    """What each row has in it so far, for the penalties."""

    in_prompt: Bool[Array, "B V"]
    in_completion: Int[Array, "B V"]


def sampling_rows(
    settings: Sequence[Sampling],
    vocab_size: int,
    *,
    samples: Sequence[int] | None = None,
    banned: Sequence[int] = (),
) -> SamplingRows:
    """Settings as arrays.

    Args:
      settings: one per row.
      vocab_size: V, logits per row.
      samples: number of each row among the completions of its prompt; rows of one
        seed and different numbers draw different tokens.
      banned: ids that no row may produce.

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
    tokens: Int[Array, "B T"], lengths: Lengths, vocab: int
) -> TokenCounts:
    """The counts of rows whose completion is still empty."""
    batch, width = tokens.shape
    real = jnp.arange(width) < lengths[:, None]
    rows = jnp.arange(batch)[:, None]
    in_prompt = jnp.zeros((batch, vocab), bool).at[rows, tokens].max(real)
    return TokenCounts(in_prompt, jnp.zeros((batch, vocab), jnp.int32))


def count_token(counts: TokenCounts, tokens: Lengths) -> TokenCounts:
    """The counts with one more token in each row's completion."""
    rows = jnp.arange(tokens.shape[0])
    more = counts.in_completion.at[rows, tokens].add(1)
    return counts._replace(in_completion=more)


def penalise(logits: Logits, counts: TokenCounts, rows: SamplingRows) -> Logits:
    """Logits after repetition, presence and frequency penalties, and the bias."""
    completed = counts.in_completion
    penalty = rows.repetition_penalty[:, None]
    repeated = counts.in_prompt | (completed > 0)
    weakened = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(repeated, weakened, logits)
    logits -= rows.presence_penalty[:, None] * (completed > 0)
    logits -= rows.frequency_penalty[:, None] * completed
    return logits + rows.bias


def keep_likely(logits: Logits, rows: SamplingRows) -> Logits:
    """Temperature-scaled logits with what top-k, top-p and min-p drop at -inf.

    Each filter works on the distribution that the one before it leaves. No sort:
    a filter is a smallest likelihood, and that is found by bisection.
    """
    vocab = logits.shape[-1]
    probs = jax.nn.softmax(logits, axis=-1)
    top_k = jnp.where(rows.top_k == 0, vocab, rows.top_k)

    def fewer_than_k(bar: Array) -> Array:
        return jnp.sum(probs > bar, axis=-1, keepdims=True) < top_k[:, None]

    probs = jnp.where(probs >= _smallest_bar(probs, fewer_than_k), probs, 0.0)
    probs /= jnp.sum(probs, axis=-1, keepdims=True)

    def little_mass_above(bar: Array) -> Array:
        above = jnp.sum(jnp.where(probs > bar, probs, 0.0), axis=-1, keepdims=True)
        return above <= rows.top_p[:, None]

    bar = _smallest_bar(probs, little_mass_above)
    # What rounding leaves above a mass of one must not cost a token its place.
    bar = jnp.where(rows.top_p[:, None] < 1, bar, 0.0)
    floor = rows.min_p[:, None] * jnp.max(probs, axis=-1, keepdims=True)
    kept = (probs >= jnp.maximum(bar, floor)) & (probs > 0)
    return jnp.where(kept, logits, -jnp.inf)


def _smallest_bar(probs: Float[Array, "B V"], holds: object) -> Float[Array, "B 1"]:
    """The smallest float in [0, 1] for which a test holds that holds for 1.

    Non-negative floats are ordered as their bits are, so 30 halvings are exact.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        enough = holds(jax.lax.bitcast_convert_type(middle, jnp.float32))  # type: ignore[operator]
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.zeros((probs.shape[0], 1), jnp.int32)
    high = jnp.full_like(low, np.float32(1.0).view(np.int32))
    _, bar = jax.lax.fori_loop(0, 30, halve, (low, high))
    return jax.lax.bitcast_convert_type(bar, jnp.float32)


def sample_token(
    logits: Logits, counts: TokenCounts, rows: SamplingRows, slots: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The next token of every row.

    Args:
      logits: the model's, float32.
      counts: what is in the rows, for the penalties.
      rows: the settings.
      slots: where the new token will stand; folded into the row's random key, so
        that a row draws the same numbers in any batch and any chunking.
    """
    logits = penalise(logits, counts, rows)
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def noise(seed: Array, sample: Array, slot: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), sample)
        key = jax.random.fold_in(key, slot)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    def draw() -> Array:
        temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
        # From the likeliest down: a compiler may divide twice with different rounding,
        # which at a tiny temperature would part a logit from its own maximum.
        below = logits - jnp.max(logits, axis=-1, keepdims=True)
        likely = keep_likely(below / temperature[:, None], rows)
        gumbel = jax.vmap(noise)(rows.seed, rows.sample, slots)
        drawn = jnp.argmax(likely + gumbel, axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, drawn, likeliest)

    return jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: likeliest)


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the chosen tokens and of the likeliest ones."""

    chosen: Float[Array, "*batch"]
    top_ids: Int[Array, "*batch top"]
    top: Float[Array, "*batch top"]


@functools.partial(jax.jit, static_argnames="top")
def token_logprobs(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"], top: int = 0
) -> TokenLogprobs:
    """Log softmax of the logits at the tokens, and at the `top` likeliest."""
    normed = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(normed, tokens[..., None], axis=-1)[..., 0]
    best, ids = jax.lax.top_k(normed, top)
    return TokenLogprobs(chosen, ids, best)
