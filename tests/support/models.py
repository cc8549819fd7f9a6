"""Tiny models for the tests: configurations, random weights, a small tokenizer."""

import functools
import io
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from hypothesis import strategies as st

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.model.transformer import Llama, apply
from llama_jax.params import (
    axes_of,
    leaf_paths,
    stack_layers,
    unflatten,
    weight_shape,
)
from llama_jax.runtime import Runtime
from llama_jax.text.tokenizer import Tokenizer

TINY = LlamaConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_seq_len=64,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-5,
    tied_embeddings=False,
    head="lm",
)

forward = jax.jit(apply, static_argnums=0)
"""`apply`, compiled: `forward(model, params, tokens, ...)`."""


def scalings() -> st.SearchStrategy[RopeScaling | None]:
    """Stretched wavelengths of every kind, and none."""
    factors = st.sampled_from([1.0, 2.0, 8.0, 32.0])
    lengths = st.sampled_from([16, 64, 8192])
    llama3 = st.builds(
        RopeScaling,
        kind=st.just("llama3"),
        factor=factors,
        low_freq_factor=st.sampled_from([0.5, 1.0]),
        high_freq_factor=st.sampled_from([2.0, 4.0]),
        original_max_seq_len=lengths,
    )
    linear = st.builds(RopeScaling, kind=st.just("linear"), factor=factors)
    dynamic = st.builds(
        RopeScaling,
        kind=st.just("dynamic"),
        factor=factors,
        original_max_seq_len=lengths,
    )
    yarn = st.builds(
        RopeScaling,
        kind=st.just("yarn"),
        factor=factors,
        original_max_seq_len=lengths,
        attention_factor=st.sampled_from([0.8, 1.0, 1.2]),
        beta_fast=st.sampled_from([4.0, 32.0]),
        beta_slow=st.sampled_from([0.1, 1.0]),
        truncate=st.booleans(),
    )
    return st.one_of(st.none(), linear, dynamic, yarn, llama3)


def configs() -> st.SearchStrategy[LlamaConfig]:
    """Models of every proportion: odd sizes, and heads that do not add up to D."""

    def build(kv: int, group: int, half: int, **fields: Any) -> LlamaConfig:
        scaling = fields["rope_scaling"]
        if scaling is not None and scaling.kind == "dynamic":
            half = max(half, 2)
        return TINY.replace(
            num_kv_heads=kv, num_heads=kv * group, head_dim=2 * half, **fields
        )

    return st.builds(
        build,
        kv=st.integers(1, 3),
        group=st.integers(1, 3),
        half=st.integers(1, 4),
        vocab_size=st.integers(5, 90),
        num_layers=st.integers(1, 2),
        embed_dim=st.integers(3, 40),
        mlp_dim=st.integers(1, 50),
        rope_theta=st.sampled_from([100.0, 1e4, 1e6]),
        rope_scaling=scalings(),
        norm_eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
        tied_embeddings=st.booleans(),
    )


def random_params(config: LlamaConfig, seed: int = 0) -> dict[str, Any]:
    """Unrolled float32 weights at which every part of the model shows.

    Larger than those that training begins with, so that attention is far from uniform
    and the norms' scales are not all one.
    """
    rng = np.random.default_rng(seed)
    flat = {}
    for path in leaf_paths(config):
        shape = weight_shape(config, axes_of(path))
        noise = rng.normal(size=shape)
        if path.endswith("scale"):
            weight = 1 + 0.2 * noise
        elif path.endswith("embedding"):
            weight = 0.3 * noise
        else:
            weight = noise / np.sqrt(shape[0])
        flat[path] = jnp.asarray(weight, jnp.float32)
    return unflatten(flat)


def random_tokens(
    config: LlamaConfig, batch: int, length: int, seed: int = 0
) -> jax.Array:
    """Ids, uniformly distributed."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(config.vocab_size, size=(batch, length))
    return jnp.asarray(ids, jnp.int32)


def in_layout(params: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    """Unrolled weights as a runtime wants them: its layout and its dtype."""
    if runtime.layer_layout == "stacked":
        params = stack_layers(params)
    return jax.tree.map(lambda x: x.astype(runtime.weight_dtype), params)


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """320 pieces, trained here and now: bytes, letters and a few whole words."""
    lines = [
        "once upon a time there was a little girl named lily",
        "she loved to play outside in the sun all day",
        "the sun was warm and the sky was blue",
        "hello world! 12 cats; the end.",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        character_coverage=1.0,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


TALKING = TINY.replace(vocab_size=324, max_seq_len=32)
"""A model for `tiny_tokenizer`, with four ids that stand for no text."""


def talking_model(config: LlamaConfig = TALKING, runtime: Runtime | None = None) -> Any:
    """A random model that can generate, with its tokenizer."""
    runtime = runtime or Runtime()
    params = in_layout(random_params(config, 1), runtime)
    return Loaded(Llama(config, runtime), params, tiny_tokenizer())


def padded(rows: Sequence[Sequence[int]], width: int) -> jax.Array:
    """Rows of ids, filled up on the right with zeros."""
    table = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return jnp.asarray(table)
