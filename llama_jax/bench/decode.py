"""Decoding: tokens per second, and weights streamed next to memory bandwidth."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from llama_jax.bench.machine import Bandwidth, best_and_median, measure_bandwidth
from llama_jax.config import LlamaConfig
from llama_jax.generation.batching import bucket
from llama_jax.generation.lanes import advance
from llama_jax.generation.lanes import start as start_lanes
from llama_jax.generation.sampling import Sampling, sampling_rows
from llama_jax.model.init import init_params
from llama_jax.model.transformer import Llama
from llama_jax.params import count_params, flatten, param_shapes
from llama_jax.runtime import Runtime
from llama_jax.sharding import param_shardings
from llama_jax.types import Mesh

_STEPS_PER_CALL = 8
"""The default number of steps per device call of `stream`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """Greedy decoding, next to the machine's memory bandwidth.

    Attributes:
      params: number of the model's parameters.
      weight_bytes: bytes of weights that a device reads in each step: its part of all
        weights but the embedding.
      cache_slots: S of the cache, which is also read but not counted.
      tokens_per_s: of all rows, in the fastest device call.
      median_tokens_per_s: of all rows, in the median device call.
      gb_per_s: weight bytes per second in the fastest call.
      bandwidth: of a device, measured in the same run.
      ratio: `gb_per_s` divided by the highest bandwidth.
    """

    params: int
    weight_bytes: int
    cache_slots: int
    tokens_per_s: float
    median_tokens_per_s: float
    gb_per_s: float
    bandwidth: Bandwidth
    ratio: float


def weight_bytes_per_step(
    config: LlamaConfig, runtime: Runtime, mesh: Mesh | None = None
) -> int:
    """Count the bytes of weights that a device reads in a step, for any batch."""
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}
    if mesh is not None:
        shardings = flatten(param_shardings(config, runtime, mesh))
        shapes = {path: shardings[path].shard_shape(shapes[path]) for path in shapes}
    if not config.tied_embeddings:
        del shapes["transformer/embedding"]
    read = sum(map(math.prod, shapes.values()))
    return read * jnp.dtype(runtime.weight_dtype).itemsize


def measure_decode(
    config: LlamaConfig,
    runtime: Runtime,
    *,
    batch: int,
    prompt_length: int,
    steps: int,
    rounds: int = 8,
    mesh: Mesh | None = None,
) -> DecodeReport:
    """Measure greedy decoding with the library's loop, called as `stream` calls it.

    Args:
      config: the model; its weights are random.
      runtime: how the model runs.
      batch: rows.
      prompt_length: tokens of each prompt.
      steps: tokens to decode per row, rounded up to whole device calls.
      rounds: number of times to start again from the prompt.
      mesh: devices; by default jax's default device.
    """
    # Before and after, since the load of the machine changes; not meanwhile, since the
    # weights may leave no room.
    limits = [measure_bandwidth()]
    slots = bucket(prompt_length + steps + _STEPS_PER_CALL, 1 << 30)
    model = Llama(config, runtime, mesh)
    times = _step_times(model, batch, prompt_length, steps, slots, rounds)
    limits.append(measure_bandwidth())
    best, median = best_and_median(times)
    weight_bytes = weight_bytes_per_step(config, runtime, mesh)
    best_limit = Bandwidth(
        reduction=max(limit.reduction for limit in limits),
        matvec=max(limit.matvec for limit in limits),
        copy=max(limit.copy for limit in limits),
    )
    gb_per_s = weight_bytes / best / 1e9
    return DecodeReport(
        params=count_params(param_shapes(config)),
        weight_bytes=weight_bytes,
        cache_slots=slots,
        tokens_per_s=batch / best,
        median_tokens_per_s=batch / median,
        gb_per_s=gb_per_s,
        bandwidth=best_limit,
        ratio=gb_per_s / best_limit.best,
    )


def _step_times(
    model: Llama,
    batch: int,
    prompt_length: int,
    steps: int,
    slots: int,
    rounds: int,
) -> list[float]:
    """Seconds per step of every device call, without compilation."""
    params = init_params(model, jax.random.key(0))
    rows = sampling_rows([Sampling(temperature=0)] * batch, model.config.vocab_size)
    stop_ids = jnp.full((batch, 8), -1, jnp.int32)
    per_call = min(steps, _STEPS_PER_CALL)
    times: list[float] = []
    for number in range(1 + rounds):
        lanes, _, _ = start_lanes(
            model,
            params,
            jnp.ones((batch, prompt_length), jnp.int32),
            jnp.full((batch,), prompt_length, jnp.int32),
            rows,
            stop_ids,
            jnp.full((batch,), 1 << 30, jnp.int32),
            num_slots=slots,
        )
        jax.block_until_ready(lanes)

        for _ in range(-(-steps // per_call)):
            start = time.perf_counter()
            lanes, emitted = advance(model, params, lanes, jnp.int32(per_call))
            jax.block_until_ready(emitted)
            if number > 0:
                times.append((time.perf_counter() - start) / per_call)
    return times
