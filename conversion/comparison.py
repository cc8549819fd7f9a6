"""Compare two checkpoints: weight by weight, then by the logits of both models.

Both are read as our leaves, so any two formats can be compared. The models run layer by
layer, with one layer of each in memory at a time.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.arguments import checked
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.config import LlamaConfig
from llama_jax.conversion.source import Source
from llama_jax.conversion.tokenizer_comparison import compare_tokenizers
from llama_jax.errors import CheckpointError, ConfigError, LlamaJaxError
from llama_jax.model.layers import Block, RMSNorm, SharedInputs
from llama_jax.model.linear import linear
from llama_jax.model.rope import rope_tables
from llama_jax.model.transformer import apply
from llama_jax.runtime import Runtime
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Array, Float, Hidden, Tokens

DIVERGED = 1e-2
"""Relative error of hidden states from which a layer counts as diverged."""

_TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Simply put, the theory of relativity states that 1) the laws of physics",
)
_TOKENS_PER_TEXT = 32
_EMBEDDING = "transformer/embedding"
_RUNTIME = Runtime(dtype="float32")


class Comparison(NamedTuple):
    """How checkpoint b differs from checkpoint a.

    Attributes:
      tensors: number of weights.
      equal: how many are bit-identical.
      rounded: how many are bit-identical once `a` is cast to the dtype of `b`.
      differing: names of all others.
      max_weight_error: largest absolute error in these.
      max_logit_error, mean_logit_error: absolute, over all tokens of the prompts.
      kl: mean KL(a ‖ b) over the tokens, in nats.
      top1_agreement: fraction of tokens after which both predict the same next token.
      layer_errors: ‖a - b‖ / ‖a‖ of the hidden states after the embedding and after
        every layer.
      first_diverging_layer: first layer where that exceeds 1 %, -1 for the embedding,
        None if there is none.
      text: differences of what the checkpoints say about text, as sentences; None if
        one of them has no tokenizer.
    """

    tensors: int
    equal: int
    rounded: int
    differing: tuple[str, ...]
    max_weight_error: float
    max_logit_error: float
    mean_logit_error: float
    kl: float
    top1_agreement: float
    layer_errors: tuple[float, ...]
    first_diverging_layer: int | None
    text: tuple[str, ...] | None

    @property
    def same(self) -> bool:
        """Whether tokenizers, and all weights up to rounding, are equal."""
        return not self.differing and not self.text


@checked(ConfigError)
def compare(a: Source, b: Source, progress: Progress | None = None) -> Comparison:
    """Compare two opened checkpoints of the same model.

    Args:
      a: the reference.
      b: the other one.
      progress: called with the bytes that are compared, then the layers that have run.

    Raises:
      ConfigError: the checkpoints have different configurations, or no output head.
      CheckpointError: one of them is damaged, or has weights that are not finite.

    >>> from llama_jax.conversion import open_source
    >>> from llama_jax.loading import bundled
    >>> comparison = compare(open_source(bundled()), open_source(bundled()))
    >>> comparison.same, comparison.max_logit_error
    (True, 0.0)
    """
    a.config.check_head("lm", "verify")
    _check_same_config(a, b)
    tied = a.config.tied_embeddings and b.config.tied_embeddings
    a_leaves, b_leaves = (_leaves(source, with_head=not tied) for source in (a, b))
    equal, rounded, differing, max_weight_error = 0, 0, [], 0.0
    done, total = 0, sum(leaf.nbytes for leaf in a_leaves.values())
    for path, leaf in a_leaves.items():
        a_array, b_array = leaf.read(), b_leaves[path].read()
        if a_array.dtype == b_array.dtype and _same_bits(a_array, b_array):
            equal += 1
        elif a_array.dtype != b_array.dtype and _same_bits(
            a_array.astype(b_array.dtype), b_array
        ):
            rounded += 1
        else:
            differing.append(path)
            error = np.abs(a_array.astype(np.float32) - b_array.astype(np.float32))
            max_weight_error = max(max_weight_error, float(error.max()))
        done += leaf.nbytes
        if progress is not None:
            progress("comparing weights", done, total)
    a_tokenizer, b_tokenizer = _find_tokenizer(a), _find_tokenizer(b)
    prompts = _prompts(a_tokenizer, a.config.vocab_size)
    layer_errors, a_logits, b_logits = _run_both(
        a.config, a_leaves, b_leaves, prompts, progress
    )
    for source, logits in ((a, a_logits), (b, b_logits)):
        if not jnp.isfinite(logits).all():
            raise CheckpointError(
                f"{source.path}: its logits are NaN or infinite, although its weights "
                "are not; some must be far too large, use another checkpoint"
            )
    a_log_probs, b_log_probs = map(jax.nn.log_softmax, (a_logits, b_logits))
    kl = jnp.sum(jnp.exp(a_log_probs) * (a_log_probs - b_log_probs), axis=-1)
    # Not `error > DIVERGED`: NaN has diverged too.
    diverged = [n - 1 for n, error in enumerate(layer_errors) if not error <= DIVERGED]
    return Comparison(
        tensors=len(a_leaves),
        equal=equal,
        rounded=rounded,
        differing=tuple(differing),
        max_weight_error=max_weight_error,
        max_logit_error=float(jnp.abs(a_logits - b_logits).max()),
        mean_logit_error=float(jnp.abs(a_logits - b_logits).mean()),
        kl=float(kl.mean()),
        top1_agreement=float((a_logits.argmax(-1) == b_logits.argmax(-1)).mean()),
        layer_errors=tuple(layer_errors),
        first_diverging_layer=diverged[0] if diverged else None,
        text=_compare_text(a_tokenizer, b_tokenizer, a.config.vocab_size),
    )


def _find_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer, or None: weights can be compared without one."""
    try:
        return source.find_tokenizer()[0]
    except LlamaJaxError:
        return None


def _compare_text(
    a: Tokenizer | None, b: Tokenizer | None, vocab_size: int
) -> tuple[str, ...] | None:
    if a is None or b is None:
        return None
    return tuple(compare_tokenizers(a, b, vocab_size))


def _check_same_config(a: Source, b: Source) -> None:
    a_fields, b_fields = a.config.to_dict(), b.config.to_dict()
    for name, value in a_fields.items():
        # A format that cannot tie embeddings stores them twice.
        if name in ("max_seq_len", "tied_embeddings"):
            continue
        if not _close(value, b_fields[name]):
            raise ConfigError(
                f"{a.path} and {b.path} are different models: {name} is {value!r} in "
                f"one and {b_fields[name]!r} in the other; compare checkpoints of one "
                "model"
            )


def _close(a: object, b: object) -> bool:
    """Whether two values of a configuration are equal in float32, as in GGUF files."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[name], b[name]) for name in a)
    if type(a) is float and type(b) is float:
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _leaves(source: Source, *, with_head: bool) -> dict[str, LazyLeaf]:
    """Return a checkpoint's leaves; `with_head` adds the head of a tied one."""
    leaves = source.leaves(finite=True)
    if with_head and "lm_head" not in leaves:
        embedding = leaves[_EMBEDDING]
        leaves["lm_head"] = LazyLeaf(
            embedding.shape[::-1], embedding.dtype, lambda: embedding.read().T
        )
    return leaves


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Compare bits, so that NaNs can be equal and signed zeros differ."""
    words = f"u{a.dtype.itemsize}"
    a, b = (np.ascontiguousarray(array).view(words) for array in (a, b))
    return np.array_equal(a, b)


def _prompts(tokenizer: Tokenizer | None, vocab_size: int) -> Tokens:
    """Return the fixed texts, or fixed random tokens if they cannot be encoded."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(vocab_size, size=(len(_TEXTS), _TOKENS_PER_TEXT))
    if tokenizer is None:
        return jnp.asarray(tokens, jnp.int32)
    for row, text in zip(tokens, _TEXTS, strict=True):
        ids = tokenizer.encode(text, bos=True, eos=False)[:_TOKENS_PER_TEXT]
        if max(ids) < vocab_size:
            row[: len(ids)] = ids
    return jnp.asarray(tokens, jnp.int32)


def _run_both(
    config: LlamaConfig,
    a_leaves: Mapping[str, LazyLeaf],
    b_leaves: Mapping[str, LazyLeaf],
    tokens: Tokens,
    progress: Progress | None,
) -> tuple[list[float], Float[Array, "B T V"], Float[Array, "B T V"]]:
    """Return the relative errors after every layer, and the logits of both models."""
    x, y = (_embed(leaves, tokens) for leaves in (a_leaves, b_leaves))
    errors = [_relative_error(x, y)]
    for layer in range(config.num_layers):
        x, y = (
            _run_layer(config, _layer_weights(leaves, layer), hidden)
            for leaves, hidden in ((a_leaves, x), (b_leaves, y))
        )
        errors.append(_relative_error(x, y))
        if progress is not None:
            progress("running layers", layer + 1, config.num_layers)
    return errors, _logits(config, a_leaves, x), _logits(config, b_leaves, y)


def _layer_weights(
    leaves: Mapping[str, LazyLeaf], layer: int
) -> dict[str, dict[str, np.ndarray]]:
    """Return the tree of one block in float32."""
    prefix = f"transformer/layers/{layer}/"
    tree: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in leaves.items():
        if path.startswith(prefix):
            module, name = path.removeprefix(prefix).split("/")
            tree.setdefault(module, {})[name] = leaf.read().astype(np.float32)
    return tree


def _embed(leaves: Mapping[str, LazyLeaf], tokens: Tokens) -> Hidden:
    embedding = leaves[_EMBEDDING].read()
    return jnp.asarray(embedding[np.asarray(tokens)].astype(np.float32))


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    config: LlamaConfig, weights: Mapping[str, Mapping[str, Array]], x: Hidden
) -> Hidden:
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    rope = rope_tables(positions, config)
    out: Array = apply(Block(config, _RUNTIME), weights, x, SharedInputs(rope), None)[0]
    return out


def _logits(
    config: LlamaConfig, leaves: Mapping[str, LazyLeaf], x: Hidden
) -> Float[Array, "B T V"]:
    scale = leaves["transformer/final_norm/scale"].read().astype(np.float32)
    x = apply(RMSNorm(config, _RUNTIME), {"scale": scale}, x)
    if "lm_head" in leaves:
        head = leaves["lm_head"].read()
    else:
        head = leaves[_EMBEDDING].read().T
    return linear(x, jnp.asarray(head.astype(np.float32)))


def _relative_error(a: Hidden, b: Hidden) -> float:
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
