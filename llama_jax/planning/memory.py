"""Bytes on each chip, by kind, from shapes and shardings alone.

Weights and cache are placed by the functions that place them when a program runs
(`sharding.param_shardings`, `sharding.cache_shardings`), on a mesh of no devices; what
they say is exact. The rest is a count of tensors:

*Training* holds a shard of each weight, of its gradient and of AdamW's two moments, all
in `param_dtype`. Of each layer the backward pass finds, per token (d, n, k, f: a
chip's part of D, N·H, K·H, F; in `dtype` where nothing is said):

    block   d (of the stream)      the block's input, from which all is computed again
    dots    2 d + n + 2 k + 2 f    also what the projections gave: q, k, v, o, gate and
                                   up; not down, whose result is the next block's input
    none    2 d + 2 n + 2 k + 6 f  both normed streams, q, k, v, what attention gave,
            + 4 d in float32       and six stages of SwiGLU; the norms' own numbers;
            + attention's own      its sums (flash), or its weights twice (otherwise)

and with `none`, each weight once more in `dtype` where it is held in another. They are
the residuals that differentiating the model leaves; tests compare.

*Decoding* counts a step, whose temporaries are few; *prefill* reads prompts, which
takes more.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.params import LAYERS
from llama_jax.planning.workload import (
    INT4_GROUP,
    Parts,
    Quantization,
    Shard,
    Task,
    Workload,
    abstract_mesh,
    parts,
    runtime_of,
    shard_bytes,
    shards,
    sizes_of,
)
from llama_jax.runtime import Remat, Rules
from llama_jax.sharding import cache_shardings

__all__ = [
    "INT4_GROUP",
    "Footprint",
    "Quantization",
    "Shard",
    "Task",
    "Workload",
    "footprint",
    "parts",
    "shard_bytes",
    "shards",
    "sizes_of",
]

LOSS_CHUNK = 256
"""Tokens of each row whose logits exist at a time (`kernels.token_losses`)."""


class Footprint(NamedTuple):
    """Bytes on each chip, by kind."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self)


def footprint(work: Workload, mesh: Mapping[str, int]) -> Footprint:
    """What each chip holds at most while the work runs.

    Args:
      work: on the whole mesh.
      mesh: sizes by axis.

    Raises:
      MeshError: a mesh axis does not divide the axis of a weight that it splits.
    """
    weights, trained = weight_bytes(work, mesh), trained_numbers(work, mesh)
    width = jnp.dtype(work.param_dtype).itemsize
    if not work.trains:
        once = _prompt if work.task == "prefill" else _step
        held = cache_bytes(work, mesh)
        return Footprint(weights, 0, 0, 0, held, once(work, mesh))
    return Footprint(
        weights=weights,
        optimizer=2 * trained * width,
        gradients=trained * width,
        activations=work.config.num_layers * kept_bytes(work, mesh, work.remat),
        cache=0,
        temporaries=_backward(work, mesh),
    )


def weight_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of a chip's weights, adapters included."""
    held = sum(
        shard_bytes(work, path, shard, math.prod(shard.shape))
        for path, shard in shards(work.config, work.rules, sizes_of(mesh)).items()
    )
    if work.task in ("lora", "qlora"):
        held += trained_numbers(work, mesh) * jnp.dtype(work.param_dtype).itemsize
    return held


def trained_numbers(work: Workload, mesh: Mapping[str, int]) -> int:
    """How many numbers of a chip have a gradient."""
    found = shards(work.config, work.rules, sizes_of(mesh)).values()
    if work.task == "train":
        return sum(shard.size for shard in found)
    if not work.trains:
        return 0
    return sum(work.rank * shard.adapters for shard in found)


def cache_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of a chip's part of the cache: keys, values, their scales and lengths."""
    config = work.config
    runtime = runtime_of(work.rules).replace(cache_dtype=work.cache_dtype)
    placed = cache_shardings(
        config.replace(num_layers=1),
        runtime,
        abstract_mesh(mesh),
        work.batch,
        work.seq,
    )
    shape = (work.batch, config.num_kv_heads, work.seq, config.head_dim)
    layer: Any = placed.k[0]
    if isinstance(layer, QuantizedSlots):
        held = math.prod(layer.values.shard_shape(shape))  # type: ignore[attr-defined]
        held += 4 * math.prod(layer.scales.shard_shape(shape[:3]))  # type: ignore[attr-defined]
    else:
        held = math.prod(layer.shard_shape(shape)) * work.itemsize
    return 2 * config.num_layers * held + 4 * work.batch


def kept_bytes(work: Workload, mesh: Mapping[str, int], remat: Remat) -> int:
    """Bytes that a chip keeps of one layer for the backward pass."""
    part = parts(work, mesh)
    d, n, k, f = part.d, part.n, part.k, part.f
    if remat == "block":
        return part.stream * d * work.itemsize
    if remat == "dots":
        numbers = part.stream * 2 * d + part.tokens * (n + 2 * k + 2 * f)
        return numbers * work.itemsize
    numbers = (2 * d + 2 * n + 2 * k + 6 * f) * work.itemsize
    heads = n // work.config.head_dim
    if work.flash:
        numbers += heads * 4
    else:
        numbers += heads * work.seq * (work.itemsize + 4)
    norms = part.stream * 4 * d * 4
    copies = copy_bytes(work, mesh) // work.config.num_layers
    return part.tokens * numbers + norms + copies


def layer_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of one layer's weights as a chip multiplies with them: D whole, in `dtype`.

    Quantized ones count as they are held, being widened within the product.
    """
    found = shards(work.config, work.rules, sizes_of(mesh))
    held = work.replace(task="decode") if work.task == "train" else work
    return sum(
        shard_bytes(held, path, shard, shard.gathered) // work.config.num_layers
        for path, shard in found.items()
        if path.startswith(LAYERS)
    )


def copy_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of a chip's part of all layers' weights once more, in `dtype`.

    Of those that are trained in another dtype. With remat too: the compiler casts them
    all before it loops over the layers (seen in what libtpu 0.0.52 allots).
    """
    if work.task != "train" or work.dtype == work.param_dtype:
        return 0
    found = shards(work.config, work.rules, sizes_of(mesh))
    inside = (shard.size for path, shard in found.items() if path.startswith(LAYERS))
    return sum(inside) * work.itemsize


def is_gathered(mesh: Mapping[str, int], rules: Rules) -> bool:
    """Whether weights lie in parts that a product must first put together."""
    axes = dict(rules.weights).get("D") or ()
    return math.prod(mesh.get(axis, 1) for axis in axes) > 1


def _backward(work: Workload, mesh: Mapping[str, int]) -> int:
    """Temporaries of training: weights in `dtype`, and those of a block or of the loss.

    A block needs its gathered weights, what SwiGLU multiplies, its input, and the
    gradient of each; without flash attention its own weights of tokens too. The loss
    needs the head, the last stream with its gradient, and a chunk's logits with theirs.
    The head's float32 gradient, whole along D, is there in both.

    It is the plainest count whose total stays within a tenth of what libtpu 0.0.52 and
    XLA's compiler for H100s allot: for whole models with remat of blocks, up to four
    rows of 4,096 tokens a chip, weights or adapters being trained (the tests compile
    them). For one program without remat it was 13 % too much; remat of all but products
    has not been compared.
    """
    part, width = parts(work, mesh), work.itemsize
    block = _block_backward(work, part) * width
    if is_gathered(mesh, work.rules) and (work.gpu or part.stream == part.tokens):
        block += layer_bytes(work, mesh)
    if not work.flash and work.remat != "none":
        heads = part.n // work.config.head_dim
        block += part.tokens * heads * work.seq * (width + 4)
    found = shards(work.config, work.rules, sizes_of(mesh))
    tied = work.config.tied_embeddings
    head = found["transformer/embedding" if tied else "lm_head"].gathered
    loss = head * width + part.tokens * 2 * part.d * width
    loss += 2 * part.rows * min(LOSS_CHUNK, work.seq) * part.v * 4
    held = copy_bytes(work, mesh) if work.remat != "none" else 0
    if work.gpu and is_gathered(mesh, work.rules):
        held += _turned_bytes(work, mesh)
    if work.task == "train":
        held += 4 * head
    return held + max(block, loss)


def _turned_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Weights that a GPU's compiler turns around before it loops over the layers.

    Those whose last axis is D: it gathers along the first axis only. What is cast is
    turned with it, and counted by `copy_bytes`.
    """
    if copy_bytes(work, mesh):
        return 0
    found = shards(work.config, work.rules, sizes_of(mesh))
    return sum(
        shard_bytes(work, path, shard, shard.size)
        for path, shard in found.items()
        if path.endswith(("/o_proj", "/down_proj"))
    )


def _block_backward(work: Workload, part: Parts) -> int:
    """Numbers of activations that the backward pass of a block has at once, at most.

    Where `tensor` cuts the stream, tokens are put together for the products: the
    normed input of both halves, the gradient of the block, and two of these once more
    as the gradients of weights want them laid out; what SwiGLU is made of, with the
    gradient of each; and q, attention's output, the gradients of both, and one more in
    another layout. Weights travel part by part meanwhile, and are never whole.

    On GPUs nothing is computed again for want of memory: the stream, the normed input
    and the gradient of each; q, keys or values, attention's output and its gradient;
    gate, up, their product and two gradients.
    """
    if work.gpu:
        return part.tokens * (4 * part.d + 5 * part.f + 4 * part.n)
    if part.stream == part.tokens:
        return part.tokens * 2 * (part.d + part.f)
    return part.tokens * (5 * part.d + 6 * part.f + 5 * part.n)


def _prompt(work: Workload, mesh: Mapping[str, int]) -> int:
    """Temporaries of reading a prompt.

    The stream with what is added to it, the normed input of the feed-forward half, put
    together where `tensor` cuts the stream, and what SwiGLU multiplies; without flash
    attention the weights of tokens, and those that had to be gathered.
    """
    part, width = parts(work, mesh), work.itemsize
    block = part.stream * 2 * part.d + part.tokens * (part.d + 2 * part.f)
    held = block * width + part.rows * part.v * 4
    if is_gathered(mesh, work.rules):
        held += 2 * layer_bytes(work, mesh)
    if not work.flash:
        heads = part.n // work.config.head_dim
        held += part.tokens * heads * work.seq * (width + 4)
    return held


def _step(work: Workload, mesh: Mapping[str, int]) -> int:
    """Temporaries of a decoding step.

    Logits and what sampling makes of them in float32, the widest activation, weights
    that had to be gathered, and what is there of each row and id on every chip: a bias
    and a count in four bytes, and whether it is in the prompt in one.
    """
    part = parts(work, mesh, queries=1)
    step = 9 * work.batch * work.config.vocab_size
    step += 3 * part.rows * part.v * 4 + part.tokens * 2 * part.f * work.itemsize
    if is_gathered(mesh, work.rules):
        step += 2 * layer_bytes(work, mesh)
    return step
