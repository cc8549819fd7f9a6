"""Prefill: tokens per second, beside the machine's rate of matrix products."""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.bench.machine import MatmulRate, best_and_median, matmul_rate, seconds
from llama_jax.config import LlamaConfig
from llama_jax.generation import decode as decoding
from llama_jax.model.init import init_params
from llama_jax.model.transformer import Llama
from llama_jax.params import LAYERS, axes_of, count_params, leaf_paths, weight_shape
from llama_jax.runtime import Runtime
from llama_jax.types import Array, Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillReport:
    """Reading prompts beside the machine's rate of matrix products.

    Attributes:
      params: of the model.
      flops: of one prefill; see `prefill_flops`.
      tokens_per_s: of all rows together, in the fastest of the calls.
      median_tokens_per_s: in the middle one.
      gflops_per_s: in the fastest.
      matmul: what a device can do, measured in the same run.
      ratio: `gflops_per_s` of each device as a part of it.
    """

    params: int
    flops: int
    tokens_per_s: float
    median_tokens_per_s: float
    gflops_per_s: float
    matmul: MatmulRate
    ratio: float


def prefill_flops(config: LlamaConfig, batch: int, tokens: int) -> int:
    """Floating-point operations that reading prompts needs.

    Two per weight of a projection and token, for the output head of one token per row;
    and the two products of attention, of what a query may see (about half of all
    pairs, so that computing the other half counts for nothing).
    """
    projections = 0
    for path in leaf_paths(config):
        rows, *columns = weight_shape(config, axes_of(path))
        if path.startswith(LAYERS) and columns:
            projections += rows * columns[0]
    head = config.embed_dim * config.vocab_size
    pairs = tokens * (tokens + 1) // 2
    seen = pairs * config.num_heads * config.head_dim * config.num_layers
    return batch * (2 * projections * tokens + 2 * head + 4 * seen)


def measure_prefill(
    config: LlamaConfig,
    runtime: Runtime,
    *,
    batch: int,
    prompt_length: int,
    steps: int,
    mesh: Mesh | None = None,
) -> PrefillReport:
    """Read prompts with the library's own function.

    Args:
      config: of the model, whose weights are random.
      runtime: how it is run.
      batch: prompts that are read together.
      prompt_length: tokens in each.
      steps: how often.
      mesh: devices; jax's default one where not given.
    """
    model = Llama(config, runtime, mesh)
    params = init_params(model, jax.random.key(0))
    tokens = jnp.ones((batch, prompt_length), jnp.int32)
    lengths = jnp.full((batch,), prompt_length, jnp.int32)

    def call() -> Array:
        logits, _ = decoding.prefill(model, params, tokens, lengths, prompt_length)
        return logits

    # Before and after, since other programs come and go.
    rates = [matmul_rate(config, batch * prompt_length, runtime.dtype)]
    best, median = best_and_median(seconds(call, repeats=steps))
    rates.append(matmul_rate(config, batch * prompt_length, runtime.dtype))
    limit = max(rates, key=lambda rate: rate.gflops)
    flops = prefill_flops(config, batch, prompt_length)
    devices = 1 if mesh is None else mesh.size
    return PrefillReport(
        params=count_params(params),
        flops=flops,
        tokens_per_s=batch * prompt_length / best,
        median_tokens_per_s=batch * prompt_length / median,
        gflops_per_s=flops / best / 1e9,
        matmul=limit,
        ratio=flops / best / 1e9 / devices / limit.gflops,
    )
