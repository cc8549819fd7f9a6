"""Two checkpoints compared: tensor by tensor, then by what the models say.

Both are read as our leaves, so that any two formats can be compared. The models run
layer by layer, one layer of each in memory at a time.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.config import LlamaConfig
from llama_jax.conversion.source import Source
from llama_jax.errors import ConfigError
from llama_jax.model.linear import linear
from llama_jax.model.rope import rope_tables
from llama_jax.model.transformer import Block, RMSNorm, apply
from llama_jax.runtime import Runtime
from llama_jax.types import Array

_TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Simply put, the theory of relativity states that 1) the laws of physics",
)
_TOKENS = 32  # of each text
_EMBEDDING = "transformer/embedding"
_DIVERGED = 1e-2
_RUNTIME = Runtime(dtype="float32")


class Comparison(NamedTuple):
    """How two checkpoints differ.

    Attributes:
      tensors: how many weights they have.
      equal: how many are the same bit for bit.
      rounded: how many are not, but are the same once `a` is cast to the dtype of `b`.
      differing: names of the others.
      max_weight_error: the largest difference of two numbers in these.
      max_logit_error, mean_logit_error: of the logits at every token of the prompts.
      kl: mean over the tokens of KL(a ‖ b), in nats.
      top1_agreement: part of the tokens where both like the same next one best.
      layer_errors: ‖a - b‖ / ‖a‖ of the stream behind the embedding and every layer.
      first_diverging_layer: the first layer where that is above one hundredth, -1 for
        the embedding, None where there is none.
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

    @property
    def same(self) -> bool:
        """Whether every weight is the same, or the same after rounding."""
        return not self.differing


def compare(a: Source, b: Source, progress: Progress | None = None) -> Comparison:
    """Compare two opened checkpoints.

    Raises:
      ConfigError: they are of different models.
      CheckpointError: one of them is damaged.
    """
    a.config.check_head("lm", "verify")
    _check_alike(a, b)
    tied = a.config.tied_embeddings and b.config.tied_embeddings
    left, right = (_leaves(source, with_head=not tied) for source in (a, b))
    equal, rounded, differing, worst = 0, 0, [], 0.0
    done, total = 0, sum(leaf.nbytes for leaf in left.values())
    for path, leaf in left.items():
        one, two = leaf.read(), right[path].read()
        if one.dtype == two.dtype and _same_bits(one, two):
            equal += 1
        elif one.dtype != two.dtype and _same_bits(one.astype(two.dtype), two):
            rounded += 1
        else:
            differing.append(path)
            difference = one.astype(np.float32) - two.astype(np.float32)
            worst = max(worst, float(np.abs(difference).max()))
        done += leaf.nbytes
        if progress is not None:
            progress("comparing", done, total)
    errors, of_a, of_b = _run_both(a.config, left, right, _prompts(a), progress)
    log_a, log_b = jax.nn.log_softmax(of_a), jax.nn.log_softmax(of_b)
    kl = jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
    diverged = [layer - 1 for layer, e in enumerate(errors) if not e <= _DIVERGED]
    return Comparison(
        tensors=len(left),
        equal=equal,
        rounded=rounded,
        differing=tuple(differing),
        max_weight_error=worst,
        max_logit_error=float(jnp.abs(of_a - of_b).max()),
        mean_logit_error=float(jnp.abs(of_a - of_b).mean()),
        kl=float(kl.mean()),
        top1_agreement=float((of_a.argmax(-1) == of_b.argmax(-1)).mean()),
        layer_errors=tuple(errors),
        first_diverging_layer=diverged[0] if diverged else None,
    )


def _leaves(source: Source, *, with_head: bool) -> dict[str, LazyLeaf]:
    """A checkpoint's leaves, with the head that a tied one does not have if asked."""
    leaves = source.leaves()
    if with_head and "lm_head" not in leaves:
        embedding = leaves[_EMBEDDING]
        leaves["lm_head"] = LazyLeaf(
            embedding.shape[::-1], embedding.dtype, lambda: embedding.read().T
        )
    return leaves


def _run_both(
    config: LlamaConfig,
    left: Mapping[str, LazyLeaf],
    right: Mapping[str, LazyLeaf],
    tokens: Array,
    progress: Progress | None,
) -> tuple[list[float], Array, Array]:
    """How far the streams are apart behind every layer, and both models' logits."""
    x, y = (_embed(leaves, tokens) for leaves in (left, right))
    errors = [_relative(x, y)]
    for layer in range(config.num_layers):
        x, y = (
            _run_layer(config, _weights(leaves, layer), hidden)
            for leaves, hidden in ((left, x), (right, y))
        )
        errors.append(_relative(x, y))
        if progress is not None:
            progress("running layers", layer + 1, config.num_layers)
    return errors, _logits(config, left, x), _logits(config, right, y)


def describe(found: Comparison) -> str:
    """A comparison in a few lines."""
    lines = [
        f"weights: {found.tensors} tensors, {found.equal} equal bit for bit, "
        f"{found.rounded} equal after rounding to the second's dtype, "
        f"{len(found.differing)} different"
    ]
    if found.differing:
        more = ", ..." if len(found.differing) > 3 else ""
        lines.append(
            f"different: {', '.join(found.differing[:3])}{more} (by at most "
            f"{found.max_weight_error:.3g})"
        )
    lines.append(
        f"logits: max error {found.max_logit_error:.3g}, mean "
        f"{found.mean_logit_error:.3g}, KL {found.kl:.3g} nats, top-1 agreement "
        f"{found.top1_agreement:.1%}"
    )
    where = found.first_diverging_layer
    if where is None:
        lines.append(f"layers: no stream differs by more than {_DIVERGED:.0%}")
    else:
        name = f"layer {where}" if where >= 0 else "the embedding"
        error = found.layer_errors[where + 1]
        lines.append(f"layers: {name} is the first to diverge ({error:.1%})")
    return "\n".join(lines)


def _check_alike(a: Source, b: Source) -> None:
    one, two = a.config.to_dict(), b.config.to_dict()
    for name, value in one.items():
        # A format that cannot tie embeddings holds them twice.
        if name not in ("max_seq_len", "tied_embeddings") and value != two[name]:
            raise ConfigError(
                f"{a.path} and {b.path} are different models: {name} is {value!r} in "
                f"one and {two[name]!r} in the other"
            )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """NaNs and signed zeros included."""
    words = f"u{a.dtype.itemsize}"
    a, b = (np.ascontiguousarray(array).view(words) for array in (a, b))
    return np.array_equal(a, b)


def _prompts(source: Source) -> Array:
    """The fixed texts, or where they cannot be spelled fixed random tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(source.config.vocab_size, size=(len(_TEXTS), _TOKENS))
    try:
        tokenizer, _ = source.find_tokenizer()
    except ValueError:  # every error of ours; without a tokenizer the weights suffice
        return jnp.asarray(tokens, jnp.int32)
    for row, text in zip(tokens, _TEXTS, strict=True):
        ids = tokenizer.encode(text, bos=True, eos=False)[:_TOKENS]
        if max(ids) < source.config.vocab_size:
            row[: len(ids)] = ids
    return jnp.asarray(tokens, jnp.int32)


def _weights(leaves: Mapping[str, LazyLeaf], layer: int) -> dict[str, Any]:
    """The tree of one block in float32."""
    prefix = f"transformer/layers/{layer}/"
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if path.startswith(prefix):
            part, name = path.removeprefix(prefix).split("/")
            tree.setdefault(part, {})[name] = leaf.read().astype(np.float32)
    return tree


def _embed(leaves: Mapping[str, LazyLeaf], tokens: Array) -> Array:
    embedding = leaves[_EMBEDDING].read()
    return jnp.asarray(embedding[np.asarray(tokens)].astype(np.float32))


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(config: LlamaConfig, weights: dict[str, Any], x: Array) -> Array:
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    rope = rope_tables(
        positions, config.head_dim, config.rope_theta, config.rope_scaling
    )
    out: Array = apply(Block(config, _RUNTIME), weights, x, rope, None, None)[0]
    return out


def _logits(config: LlamaConfig, leaves: Mapping[str, LazyLeaf], x: Array) -> Array:
    scale = leaves["transformer/final_norm/scale"].read().astype(np.float32)
    x = apply(RMSNorm(config, _RUNTIME), {"scale": scale}, x)
    if "lm_head" in leaves:
        head = leaves["lm_head"].read()
    else:
        head = leaves[_EMBEDDING].read().T
    return linear(x, jnp.asarray(head.astype(np.float32)))


def _relative(a: Array, b: Array) -> float:
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
