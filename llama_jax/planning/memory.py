"""Bytes on each chip, by kind, from shapes and shardings alone.

Weights and cache are split by the functions that split them when a program runs
(`param_shardings`, `activation_spec`), on a mesh without devices; these counts are
exact. The rest is a count of tensors.

*Training* stores a shard of each weight, of its gradient and of AdamW's two moments,
all in `param_dtype`. For the backward pass each layer keeps, per token (d, n, k, f: one
chip's part of D, N·H, K·H, F; in `dtype` unless noted):

    block   d (of the stream)      the block's input, from which it recomputes the rest
    dots    2 d + n + 2 k + 2 f    also the outputs of projections: q, k, v, o, gate and
                                   up; not down, whose output is the next block's input
    none    2 d + 2 n + 2 k + 6 f  both normed streams, q, k, v, the output of attention
            + 4 d in float32       and six stages of SwiGLU; the norms' own residuals;
            + attention's own      its log-sums (flash), or its weights twice (else)

and with `none` a copy of each weight in `dtype` if it is stored in another. These are
the residuals of differentiating the model; tests compare them.

*Decoding* is one step, which has few temporaries. *Prefill* reads whole prompts.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.sharding import NamedSharding

from llama_jax.planning.workload import (
    EMBEDDING,
    LocalSizes,
    Workload,
    abstract_mesh,
    layer_shards,
    local_sizes,
    sizes_of,
    stored_bytes,
    weight_shards,
)
from llama_jax.runtime import MESH_AXES, Remat, Rules
from llama_jax.sharding import activation_spec

LOSS_CHUNK = 256
"""Tokens per row whose logits exist at the same time (`kernels.token_losses`)."""


WeightCount = Callable[[Workload, Mapping[str, int]], int]


def _cached_by_weights(count: WeightCount) -> WeightCount:
    """Cache a count of weights: a search varies batch and remat, and they do not."""

    @functools.lru_cache(maxsize=4096)
    def cached(work: Workload, sizes: tuple[int, ...]) -> int:
        return count(work, dict(zip(MESH_AXES, sizes, strict=True)))

    @functools.wraps(count)
    def lookup(work: Workload, mesh: Mapping[str, int]) -> int:
        return cached(work.replace(batch=1, seq=1, remat="none"), sizes_of(mesh))

    return lookup


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
        """Bytes of all kinds."""
        return sum(self)


def footprint(work: Workload, mesh: Mapping[str, int]) -> Footprint:
    """Count the peak memory of each chip while the workload runs.

    Args:
      work: on the whole mesh.
      mesh: sizes by axis.

    Raises:
      MeshError: a mesh axis does not divide the weight axis that it splits.
    """
    weights, trained = weight_bytes(work, mesh), num_trained(work, mesh)
    if not work.trains:
        prefill = work.task == "prefill"
        temporaries = _prefill_bytes(work, mesh) if prefill else _step_bytes(work, mesh)
        return Footprint(weights, 0, 0, 0, cache_bytes(work, mesh), temporaries)
    return Footprint(
        weights=weights,
        optimizer=2 * trained * work.param_itemsize,
        gradients=trained * work.param_itemsize,
        activations=work.config.num_layers * residual_bytes(work, mesh, work.remat),
        cache=0,
        temporaries=_backward_bytes(work, mesh),
    )


@_cached_by_weights
def weight_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of one chip's weights, adapters included."""
    shards = weight_shards(work, mesh).values()
    nbytes = sum(stored_bytes(work, shard, shard.size) for shard in shards)
    if work.task in ("lora", "qlora"):
        nbytes += num_trained(work, mesh) * work.param_itemsize
    return nbytes


@_cached_by_weights
def num_trained(work: Workload, mesh: Mapping[str, int]) -> int:
    """Number of one chip's parameters that have a gradient."""
    shards = weight_shards(work, mesh).values()
    if work.task == "train":
        return sum(shard.size for shard in shards)
    if not work.trains:
        return 0
    return sum(work.rank * shard.adapter_size for shard in shards)


def cache_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of one chip's part of the cache: keys, values, their scales and lengths."""
    config, devices = work.config, abstract_mesh(mesh)
    shape = (work.batch, config.num_kv_heads, work.seq, config.head_dim)
    spec = activation_spec(shape, "B K S H", work.rules, devices)
    size = math.prod(NamedSharding(devices, spec).shard_shape(shape))
    if work.cache_dtype == "int8":
        nbytes = size + 4 * size // config.head_dim
    else:
        nbytes = size * work.itemsize
    return 2 * config.num_layers * nbytes + 4 * work.batch


def residual_bytes(work: Workload, mesh: Mapping[str, int], remat: Remat) -> int:
    """Bytes of one layer that a chip keeps for the backward pass."""
    local = local_sizes(work, mesh)
    d, n, k, f = local.d, local.n, local.k, local.f
    if remat == "block":
        return local.stream * d * work.itemsize
    if remat == "dots":
        size = local.stream * 2 * d + local.tokens * (n + 2 * k + 2 * f)
        return size * work.itemsize
    per_token = (2 * d + 2 * n + 2 * k + 6 * f) * work.itemsize
    heads = n // work.config.head_dim
    per_token += heads * (4 if work.flash else work.seq * (work.itemsize + 4))
    norms = local.stream * 4 * d * 4
    copies = cast_bytes(work, mesh) // work.config.num_layers
    return local.tokens * per_token + norms + copies


@_cached_by_weights
def layer_weight_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of one layer's weights as a chip multiplies them: D gathered, in `dtype`.

    Quantized weights count as they are stored: they are widened within the product.
    """
    stored = work.replace(task="decode") if work.task == "train" else work
    return sum(
        stored_bytes(stored, shard, shard.gathered) // work.config.num_layers
        for shard in layer_shards(work, mesh)
    )


@_cached_by_weights
def cast_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of the copy in `dtype` of one chip's part of all layers' trained weights.

    Zero if `param_dtype` is `dtype`. It exists with remat too: the compiler casts all
    weights before it loops over the layers (seen in allocations of libtpu 0.0.52).
    """
    if work.task != "train" or work.dtype == work.param_dtype:
        return 0
    return sum(shard.size for shard in layer_shards(work, mesh)) * work.itemsize


def gathers_weights(mesh: Mapping[str, int], rules: Rules) -> bool:
    """Whether D of weights is split, so that products must gather it first."""
    axes = dict(rules.weights).get("D") or ()
    return math.prod(mesh.get(axis, 1) for axis in axes) > 1


def _attention_weight_bytes(work: Workload, local: LocalSizes) -> int:
    """Bytes of attention's weights, in `dtype` and float32; none in flash attention."""
    if work.flash:
        return 0
    heads = local.n // work.config.head_dim
    return local.tokens * heads * work.seq * (work.itemsize + 4)


def _backward_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Temporaries of training: cast weights, plus those of a block or of the loss.

    A block needs its gathered weights, the operands of SwiGLU, its input, and the
    gradient of each; without flash attention the attention weights too. The loss needs
    the head, the last stream with its gradient, and a chunk's logits with theirs. The
    head's float32 gradient, with D gathered, exists during both.

    This is the simplest count whose total stays within a tenth of what libtpu 0.0.52
    and XLA's compiler for H100s allocate: for whole models with remat of blocks, up to
    four rows of 4,096 tokens per chip, training weights or adapters (the tests compile
    them). For one program without remat it was 13 % too high; remat of all but matrix
    products has not been compared.
    """
    local, width = local_sizes(work, mesh), work.itemsize
    gathers = gathers_weights(mesh, work.rules)
    block = _block_backward_size(work, local) * width
    if gathers and (work.gpu or local.stream == local.tokens):
        block += layer_weight_bytes(work, mesh)
    if work.remat != "none":
        block += _attention_weight_bytes(work, local)
    shards = weight_shards(work, mesh)
    head = shards[EMBEDDING if work.config.tied_embeddings else "lm_head"].gathered
    loss = head * width + local.tokens * 2 * local.d * width
    loss += 2 * local.rows * min(LOSS_CHUNK, work.seq) * local.v * 4
    common = cast_bytes(work, mesh) if work.remat != "none" else 0
    if work.gpu and gathers:
        common += _transposed_bytes(work, mesh)
    if work.task == "train":
        common += 4 * head
    return common + max(block, loss)


def _transposed_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Weights that a GPU's compiler transposes before it loops over the layers.

    These are the weights whose last axis is D: it gathers along the first axis only.
    Weights that are cast are transposed in the same pass; `cast_bytes` counts them.
    """
    if cast_bytes(work, mesh):
        return 0
    return sum(
        stored_bytes(work, shard, shard.size)
        for path, shard in weight_shards(work, mesh).items()
        if path.endswith(("/o_proj", "/down_proj"))
    )


def _block_backward_size(work: Workload, local: LocalSizes) -> int:
    """Peak count of activation numbers in the backward pass of a block.

    If `tensor` splits the stream, tokens are gathered for the products: the normed
    input of both halves, the gradient of the block, and two of these again in the
    layout that gradients of weights want; the operands of SwiGLU, with the gradient of
    each; q, attention's output, the gradients of both, and one more in another layout.
    Weights are gathered piece by piece meanwhile, and are never whole.

    GPUs do not recompute to save memory: the stream, the normed input and the gradient
    of each; q, keys or values, attention's output and its gradient; gate, up, their
    product and two gradients.
    """
    if work.gpu:
        return local.tokens * (4 * local.d + 5 * local.f + 4 * local.n)
    if local.stream == local.tokens:
        return local.tokens * 2 * (local.d + local.f)
    return local.tokens * (5 * local.d + 6 * local.f + 5 * local.n)


def _prefill_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Temporaries of prefill.

    The stream and what a half of the block adds to it; the normed input of the
    feed-forward half, gathered if `tensor` splits the stream; the operands of SwiGLU;
    gathered weights; without flash attention the attention weights.
    """
    local = local_sizes(work, mesh)
    size = local.stream * 2 * local.d + local.tokens * (local.d + 2 * local.f)
    nbytes = size * work.itemsize + local.rows * local.v * 4
    if gathers_weights(mesh, work.rules):
        nbytes += 2 * layer_weight_bytes(work, mesh)
    return nbytes + _attention_weight_bytes(work, local)


def _step_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Temporaries of a decoding step.

    Logits and what sampling derives from them in float32, the widest activation,
    gathered weights, and for each row and token id on every chip a bias and a count of
    four bytes each, and one byte for whether the id is in the prompt.
    """
    local = local_sizes(work, mesh)
    nbytes = 9 * work.batch * work.config.vocab_size
    nbytes += 3 * local.rows * local.v * 4 + local.tokens * 2 * local.f * work.itemsize
    if gathers_weights(mesh, work.rules):
        nbytes += 2 * layer_weight_bytes(work, mesh)
    return nbytes
