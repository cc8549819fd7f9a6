"""Cut requests into batches that fit memory, and put them into arrays."""

import functools
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.distributed import broadcast_from_main
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling, SamplingRows, sampling_rows
from llama_jax.model.cache import cache_shardings, init_cache
from llama_jax.model.transformer import Llama
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Array, Int, Lengths, Mesh, Tokens

MAX_ROWS = 256
"""Most rows of a batch, whatever fits memory: more are no faster."""


def bucket(size: int, limit: int, smallest: int = 16) -> int:
    """The size to pad to: the next power of two, between `smallest` and `limit`."""
    return min(max(smallest, 1 << (size - 1).bit_length()), limit)


class StartInputs(NamedTuple):
    """Arguments of `lanes.start` that depend on the requests."""

    tokens: Tokens
    lengths: Lengths
    sampling: SamplingRows
    stop_ids: Int[Array, "B E"]
    limits: Lengths


def token_limit(request: Request, config: LlamaConfig) -> int:
    """Most tokens that a completion of a request may have in the context."""
    room = config.max_seq_len - len(request.prompt_ids)
    return min(room, request.max_new_tokens or room)


def slots_needed(request: Request, config: LlamaConfig) -> int:
    """Cache slots of the prompt and the longest completion of a request."""
    return len(request.prompt_ids) + token_limit(request, config)


def cut_batches(
    requests: Sequence[Request], model: Llama, *, max_bytes: int | None = None
) -> list[list[int]]:
    """Group requests so that the caches of a group fit memory together.

    The longest come first, and those of similar length together, so that rows are
    padded little. A request that fits no memory alone is a group of its own.

    Args:
      requests: one completion each.
      model: decides the size of a row.
      max_bytes: most bytes of a batch on one device; defaults to what is free there
        (`free_bytes`). The same requests and bytes give the same groups.

    Returns:
      Indices of `requests`, in groups.
    """
    if not requests:
        return []
    if max_bytes is None:
        max_bytes = broadcast_from_main(free_bytes(model.mesh))
    config = model.config
    needs = [slots_needed(request, config) for request in requests]
    scored = any(r.echo and r.logprobs is not None for r in requests)
    left = sorted(
        range(len(requests)),
        key=lambda i: (needs[i], len(requests[i].prompt_ids)),
        reverse=True,
    )
    groups = []
    while left:
        slots, rows = bucket(needs[left[0]], config.max_seq_len), 1
        while (
            rows < min(len(left), MAX_ROWS)
            and batch_bytes(model, 2 * rows, slots, score_prompt=scored) <= max_bytes
        ):
            rows *= 2
        groups.append(left[:rows])
        left = left[rows:]
    return groups


@functools.lru_cache(maxsize=256)
def batch_bytes(
    model: Llama, rows: int, slots: int, *, score_prompt: bool = False
) -> int:
    """Bytes of a batch on one device: cache, logits and what sampling makes of them.

    Args:
      model: with its runtime and mesh.
      rows: B.
      slots: S; prompts may fill all of them.
      score_prompt: whether there are logits of every token of the prompts.
    """
    config, runtime = model.config, model.runtime
    shapes = jax.eval_shape(lambda: init_cache(config, rows, slots, runtime.slot_dtype))
    leaves = jax.tree.leaves(shapes)
    parts: list[tuple[int, ...]] = [leaf.shape for leaf in leaves]
    if model.mesh is not None and model.mesh.size > 1:
        shardings = cache_shardings(config, runtime, model.mesh, rows, slots)
        pairs = zip(leaves, jax.tree.leaves(shardings), strict=True)
        parts = [sharding.shard_shape(leaf.shape) for leaf, sharding in pairs]
    cache = sum(
        math.prod(shape) * leaf.dtype.itemsize
        for shape, leaf in zip(parts, leaves, strict=True)
    )
    # Logits, bias, counts, and probabilities, noise and candidates in float32; with
    # log-probabilities of the prompt, logits and their logarithms at every token.
    vocab = rows * config.vocab_size * 4 * 8
    scores = rows * slots * config.vocab_size * 4 * 3 if score_prompt else 0
    # Streams of one block while prompts are read.
    width = 4 * config.embed_dim + 3 * config.mlp_dim
    block = rows * slots * width * jnp.dtype(runtime.dtype).itemsize
    return cache + vocab + scores + block


def free_bytes(mesh: Mesh | None) -> int:
    """Bytes that a batch may take on each device of this process, with a margin.

    Free memory of the device if JAX reports it, else the device's share of the host's.
    """
    devices = jax.local_devices() if mesh is None else list(mesh.local_devices)
    devices = devices[:1] if mesh is None else devices
    free = []
    for device in devices:
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if not free:
        free = [_host_bytes() // len(devices)]
    return int(min(free)) * 3 // 4


def _host_bytes() -> int:
    """Available memory of the host; half of all of it if the system does not say."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text("ascii")
    except OSError:
        text = ""
    if available := re.search(r"^MemAvailable: +(\d+) kB", text, re.MULTILINE):
        return int(available[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 4 << 30


def start_inputs(
    requests: Sequence[Request],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    *,
    samples: Sequence[int] | None = None,
) -> StartInputs:
    """Put requests into arrays, one row each; rows, tokens and stop ids in buckets.

    Args:
      requests: at least one; `num_samples` is not looked at.
      config: of the model.
      tokenizer: ids that it has no text for are never sampled.
      samples: number of each row among the completions of its request; defaults to 0.

    Raises:
      PromptError: a biased id does not exist.
    """
    # Rows that only fill the bucket have one token to read and none to sample.
    fill = bucket(len(requests), 1 << 30, smallest=1) - len(requests)
    rows = len(requests) + fill
    lengths = [len(request.prompt_ids) for request in requests]
    tokens = np.zeros((rows, bucket(max(lengths), config.max_seq_len)), np.int32)
    ends = max(len(request.stop_ids) for request in requests)
    stop_ids = np.full((rows, bucket(ends, 1 << 30, smallest=8)), -1, np.int32)
    for row, request in enumerate(requests):
        tokens[row, : lengths[row]] = request.prompt_ids
        stop_ids[row, : len(request.stop_ids)] = request.stop_ids
    limits = [token_limit(request, config) for request in requests]
    return StartInputs(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray([*lengths, *[1] * fill], jnp.int32),
        sampling=sampling_rows(
            [*(request.sampling for request in requests), *[Sampling()] * fill],
            config.vocab_size,
            samples=[*(samples or [0] * len(requests)), *[0] * fill],
            banned=tokenizer.unnamed_ids(config.vocab_size),
        ),
        stop_ids=jnp.asarray(stop_ids),
        limits=jnp.asarray([*limits, *[0] * fill], jnp.int32),
    )
