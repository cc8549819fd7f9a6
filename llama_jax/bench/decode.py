"""Decoding speed: the bytes of weights streamed per second, beside the memory's."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import decode
from llama_jax.bench.machine import memory_bandwidth
from llama_jax.model import Llama, init_params
from llama_jax.params import flatten
from llama_jax.sampling import Sampling, sampling_rows


def bench_decode(
    model: Llama, *, batch: int, prompt_length: int, steps: int, repeats: int
) -> dict[str, Any]:
    """Greedy decoding of random weights with the loop that `generate` uses.

    The bytes per step are those of every weight that a step reads: all but the
    embedding, of which it reads a row. The cache's are not counted.
    """
    config = model.config
    before = memory_bandwidth()
    params = init_params(model, jax.random.key(0))
    step_bytes = sum(
        leaf.nbytes
        for path, leaf in flatten(params).items()
        if path != "transformer/embedding" or config.tied_embeddings
    )
    rows = sampling_rows([Sampling(temperature=0)] * batch, config.vocab_size)
    never = jnp.full((8,), -1, jnp.int32)
    needed = prompt_length + steps + decode.MAX_STEPS
    slots = decode.bucket(needed, config.max_seq_len)
    lanes, _, _ = decode.start(
        model,
        params,
        jnp.ones((batch, prompt_length), jnp.int32),
        jnp.full((batch,), prompt_length, jnp.int32),
        rows,
        jnp.full((batch,), needed, jnp.int32),
        never,
        num_slots=slots,
        top=0,
        score_prompt=False,
    )

    def advance(lanes: decode.Lanes, steps: int) -> decode.Lanes:
        lanes, written = decode.advance(
            model, params, lanes, rows, never, jnp.int32(steps), top=0
        )
        jax.block_until_ready(written)
        return lanes

    lanes = advance(lanes, 1)
    length = lanes.cache.length
    best = float("inf")
    for _ in range(repeats):
        # The same slots again: what matters is their number, not what is in them.
        cache = lanes.cache._replace(length=length + 0)
        lanes = lanes._replace(cache=cache, remaining=lanes.remaining * 0 + needed)
        began, left = time.perf_counter(), steps
        while left:
            count = min(left, decode.MAX_STEPS)
            lanes = advance(lanes, count)
            left -= count
        best = min(best, time.perf_counter() - began)
    bandwidth = memory_bandwidth()
    highest = max(before.highest, bandwidth.highest)
    rate = step_bytes * steps / best
    return {
        "tokens_per_second": batch * steps / best,
        "milliseconds_per_step": 1e3 * best / steps,
        "weight_bytes_per_step": step_bytes,
        "cache_slots": slots,
        "weights_gb_per_second": rate / 1e9,
        "reduction_gb_per_second": max(before.reduction, bandwidth.reduction) / 1e9,
        "matvec_gb_per_second": max(before.matvec, bandwidth.matvec) / 1e9,
        "copy_gb_per_second": max(before.copy, bandwidth.copy) / 1e9,
        "ratio": rate / highest,
    }
