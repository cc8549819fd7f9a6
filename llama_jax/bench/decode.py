"""Decoding: tokens per second, and how near it streams its weights to the limit."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from llama_jax.bench.machine import Bandwidth, bandwidth, best_and_median
from llama_jax.config import LlamaConfig
from llama_jax.generation import decode as decoding
from llama_jax.generation.sampling import Sampling, sampling_rows
from llama_jax.model.init import init_params
from llama_jax.model.transformer import Llama
from llama_jax.params import count_params, flatten, param_shapes
from llama_jax.runtime import Runtime
from llama_jax.sharding import param_shardings
from llama_jax.types import Mesh

_STEPS_PER_CALL = 8
"""As many as `stream` decodes between two looks at the text, unless told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """Greedy decoding beside the machine's memory bandwidth.

    Attributes:
      params: of the model.
      weight_bytes: that a device reads for every step: its part of the weights, of the
        embedding one row.
      cache_slots: S, of each row's cache, which is read too but not counted.
      tokens_per_s: of all rows together, in the fastest of the device calls.
      median_tokens_per_s: in the middle one.
      gb_per_s: weight bytes per second in the fastest call.
      bandwidth: what a device can do, measured in the same run.
      ratio: `gb_per_s` as a part of the highest bandwidth.
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
    """Bytes of weights that a device reads in a decoding step, whatever the batch."""
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}
    if mesh is not None:
        places = flatten(param_shardings(config, runtime, mesh))
        shapes = {path: places[path].shard_shape(shapes[path]) for path in shapes}
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
    """Decode greedily with the library's own loop, as `stream` calls it.

    Args:
      config: of the model, whose weights are random.
      runtime: how it is run.
      batch: rows that are decoded together.
      prompt_length: of every row.
      steps: tokens to decode per row, rounded up to whole calls.
      rounds: how often to start again from the prompt.
      mesh: devices; jax's default one where not given.
    """
    # Around what is compared with it, since other programs come and go, and not beside
    # it, since the weights may leave no room.
    limits = [bandwidth()]
    slots = decoding.bucket(prompt_length + steps + _STEPS_PER_CALL, 1 << 30)
    model = Llama(config, runtime, mesh)
    times = _step_times(model, batch, prompt_length, steps, slots, rounds)
    limits.append(bandwidth())
    best, median = best_and_median(times)
    weight_bytes = weight_bytes_per_step(config, runtime, mesh)
    limit = Bandwidth(
        reduction=max(one.reduction for one in limits),
        matvec=max(one.matvec for one in limits),
        copy=max(one.copy for one in limits),
    )
    gb_per_s = weight_bytes / best / 1e9
    return DecodeReport(
        params=count_params(param_shapes(config)),
        weight_bytes=weight_bytes,
        cache_slots=slots,
        tokens_per_s=batch / best,
        median_tokens_per_s=batch / median,
        gb_per_s=gb_per_s,
        bandwidth=limit,
        ratio=gb_per_s / limit.best,
    )


def _step_times(
    model: Llama,
    batch: int,
    prompt_length: int,
    steps: int,
    slots: int,
    rounds: int,
) -> list[float]:
    """Seconds per step of every device call, compilation left out."""
    params = init_params(model, jax.random.key(0))
    rows = sampling_rows([Sampling(temperature=0)] * batch, model.config.vocab_size)
    stop_ids = jnp.full((batch, 8), -1, jnp.int32)
    per_call = min(steps, _STEPS_PER_CALL)
    times: list[float] = []
    for number in range(1 + rounds):
        lanes, _, _ = decoding.start(
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
            lanes, written = decoding.advance(model, params, lanes, jnp.int32(per_call))
            jax.block_until_ready(written)
            if number > 0:
                times.append((time.perf_counter() - start) / per_call)
    return times
