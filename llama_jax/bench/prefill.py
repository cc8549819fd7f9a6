"""Prefill: tokens per second, next to the machine's FLOP/s of matrix products."""

import dataclasses

import jax
import jax.numpy as jnp

from llama_jax.bench.machine import (
    MatmulRate,
    best_and_median,
    measure_matmul_rate,
    time_calls,
)
from llama_jax.config import LlamaConfig
from llama_jax.generation import decode as decoding
from llama_jax.model.init import init_params
from llama_jax.model.transformer import Llama
from llama_jax.params import count_params
from llama_jax.planning.flops import prefill_flops
from llama_jax.runtime import Runtime
from llama_jax.types import Array, Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillReport:
    """Prefill, next to the machine's FLOP/s of matrix products.

    Attributes:
      params: number of the model's parameters.
      flops: of one prefill; see `planning.flops.prefill_flops`.
      tokens_per_s: of all rows, in the fastest call.
      median_tokens_per_s: of all rows, in the median call.
      gflops_per_s: in the fastest call.
      matmul: the fastest matrix product of a device, measured in the same run.
      ratio: `gflops_per_s` per device divided by that of `matmul`.
    """

    params: int
    flops: int
    tokens_per_s: float
    median_tokens_per_s: float
    gflops_per_s: float
    matmul: MatmulRate
    ratio: float


def measure_prefill(
    config: LlamaConfig,
    runtime: Runtime,
    *,
    batch: int,
    prompt_length: int,
    steps: int,
    mesh: Mesh | None = None,
) -> PrefillReport:
    """Measure prefill with the library's function.

    Args:
      config: the model; its weights are random.
      runtime: how the model runs.
      batch: prompts.
      prompt_length: tokens of each prompt.
      steps: number of repetitions.
      mesh: devices; by default jax's default device.
    """
    model = Llama(config, runtime, mesh)
    params = init_params(model, jax.random.key(0))
    tokens = jnp.ones((batch, prompt_length), jnp.int32)
    lengths = jnp.full((batch,), prompt_length, jnp.int32)

    def call() -> Array:
        logits, _ = decoding.prefill(model, params, tokens, lengths, prompt_length)
        return logits

    # Before and after, since the load of the machine changes.
    rates = [measure_matmul_rate(config, batch * prompt_length, runtime.dtype)]
    best, median = best_and_median(time_calls(call, repeats=steps))
    rates.append(measure_matmul_rate(config, batch * prompt_length, runtime.dtype))
    limit = max(rates, key=lambda rate: rate.gflops)
    flops = int(prefill_flops(config, batch, prompt_length))
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
