"""Prefill speed: the arithmetic done per second, beside a plain matrix product's."""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import decode
from llama_jax.bench.machine import best_seconds, matmul_rate
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama, init_params


def prefill_flops(config: LlamaConfig, batch: int, length: int) -> int:
    """Multiplications and additions of matrix products that a prompt needs.

    Attention counts the causal half of its scores, the output head one position.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    width = config.head_dim
    projections = config.embed_dim * width * (2 * heads + 2 * kv_heads)
    block = projections + 3 * config.embed_dim * config.mlp_dim
    scores = 2 * heads * width * (length + 1) // 2  # q·k and weights·v
    per_token = config.num_layers * (block + scores)
    return 2 * batch * (length * per_token + config.embed_dim * config.vocab_size)


def bench_prefill(
    model: Llama, *, batch: int, prompt_length: int, repeats: int
) -> dict[str, Any]:
    """`decoding.prefill` of random weights and prompts."""
    config = model.config
    shapes = [
        (size, size, size) for size in (1024, 2048)
    ] + [
        (batch * prompt_length, config.embed_dim, config.mlp_dim),
        (batch * prompt_length, config.mlp_dim, config.embed_dim),
    ]  # fmt: skip
    dtype = model.runtime.dtype
    before = matmul_rate(dtype, shapes)
    params = init_params(model, jax.random.key(0))
    tokens = jnp.ones((batch, prompt_length), jnp.int32)
    lengths = jnp.full((batch,), prompt_length, jnp.int32)
    seconds = best_seconds(
        lambda: decode.prefill(model, params, tokens, lengths, prompt_length), repeats
    )
    highest = max(before, matmul_rate(dtype, shapes))
    rate = prefill_flops(config, batch, prompt_length) / seconds
    return {
        "tokens_per_second": batch * prompt_length / seconds,
        "milliseconds": 1e3 * seconds,
        "gflops_per_second": rate / 1e9,
        "matmul_gflops_per_second": highest / 1e9,
        "ratio": rate / highest,
    }
