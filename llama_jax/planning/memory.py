"""Bytes on each chip, by kind, from shapes and shardings alone.

Weights and cache are placed by the functions that place them when a program runs
(`sharding.param_shardings`, `sharding.cache_shardings`), on a mesh of no devices; what
they say is exact. The rest is a count of tensors:

*Training* holds a shard of each weight, of its gradient and of AdamW's two moments, all
in `param_dtype`. Of each layer the backward pass finds, per token (d, n, k, f: a
chip's part of D, N·H, K·H, F; in `dtype` where nothing is said):

    block   d                      the block's input, from which all is computed again
    dots    2 d + n + 2 k + 2 f    also what the projections gave: q, k, v, o, gate and
                                   up; not down, whose result is the next block's input
    none    2 d + 2 n + 2 k + 6 f  both normed streams, q, k, v, what attention gave,
            + 4 d in float32       and six stages of SwiGLU; the norms' own numbers;
            + attention's own      its sums (flash), or its weights twice (otherwise)

and with `none`, each weight once more in `dtype` where it is held in another. They are
the residuals that differentiating the model leaves; tests compare.

*Decoding* counts a step, whose temporaries are few; reading a long prompt takes more.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from llama_jax.config import LlamaConfig
from llama_jax.params import axes_of, axis_sizes, flatten, leaf_paths, param_shapes
from llama_jax.runtime import MESH_AXES, DType, Remat, Rules, Runtime
from llama_jax.sharding import cache_shardings, param_shardings
from llama_jax.types import Mesh

Task = Literal["train", "lora", "qlora", "decode"]
Quantization = Literal["none", "int8", "int4"]

LOSS_CHUNK = 256
"""Tokens of each row whose logits exist at a time (`kernels.token_losses`)."""

INT4_GROUP = 64
"""Weights that share a scale in four bits: a block of QLoRA (arXiv:2305.14314)."""

_LAYERS = "transformer/layers/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is run, wherever it is.

    Attributes:
      config: of the model.
      task: "train" all weights; "lora" and "qlora" adapters of `rank` for each of a
        layer's seven projections, on weights that stay; "decode" a token for each row.
      batch: B, rows of the whole mesh.
      seq: tokens of a row; slots of its cache.
      dtype: of activations, of weights that are not trained, and of the cache.
      param_dtype: of weights that are trained, their gradients and their moments.
      quantize: how projections of the layers are held that are not trained: "int8"
        with a float32 scale for each column, "int4" with one in `dtype` for each
        `INT4_GROUP` weights. Embedding, norms and head stay in `dtype`.
      remat: what the backward pass computes again.
      rank: R of adapters.
      flash: attention runs without the matrix of its weights.
      rules: how axis letters map to mesh axes.
    """

    config: LlamaConfig
    task: Task
    batch: int
    seq: int
    dtype: DType = "bfloat16"
    param_dtype: DType = "float32"
    quantize: Quantization = "none"
    remat: Remat = "block"
    rank: int = 16
    flash: bool = True
    rules: Rules = dataclasses.field(default_factory=Rules)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in `dtype`."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.task != "decode"

    def replace(self, **changes: object) -> "Workload":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


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


class Shard(NamedTuple):
    """A chip's part of one kind of weight, all layers together.

    Attributes:
      shape: of the part; L in front of a layer's weight.
      gathered: numbers of it once its D is whole again, as products need it.
      adapters: numbers of its adapter per unit of rank; 0 for what has none.
    """

    shape: tuple[int, ...]
    gathered: int
    adapters: int

    @property
    def size(self) -> int:
        """Numbers of the part."""
        return math.prod(self.shape)


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
        return Footprint(weights, 0, 0, 0, cache_bytes(work, mesh), _step(work, mesh))
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
    if work.task == "decode":
        return 0
    return sum(work.rank * shard.adapters for shard in found)


def shard_bytes(work: Workload, path: str, shard: Shard, numbers: int) -> int:
    """What so many numbers of a kind of weight take, with their scales."""
    if work.task == "train":
        return numbers * jnp.dtype(work.param_dtype).itemsize
    if work.quantize == "none" or not shard.adapters:
        return numbers * work.itemsize
    if work.quantize == "int8":
        # A scale for each column of each layer; a part of D has them all.
        return numbers + 4 * shard.shape[0] * shard.shape[2]
    return math.ceil(numbers / 2) + math.ceil(numbers / INT4_GROUP) * work.itemsize


def cache_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of a chip's part of the cache: keys, values and lengths."""
    config = work.config
    placed = cache_shardings(
        config.replace(num_layers=1), _runtime(work.rules), _mesh(mesh), work.batch
    )
    shape = (work.batch, config.num_kv_heads, work.seq, config.head_dim)
    layer = math.prod(placed.k[0].shard_shape(shape))  # type: ignore[attr-defined]
    return 2 * config.num_layers * layer * work.itemsize + 4 * work.batch


def kept_bytes(work: Workload, mesh: Mapping[str, int], remat: Remat) -> int:
    """Bytes that a chip keeps of one layer for the backward pass."""
    part = parts(work, mesh)
    d, n, k, f = part.d, part.n, part.k, part.f
    if remat == "block":
        return part.tokens * d * work.itemsize
    if remat == "dots":
        return part.tokens * (2 * d + n + 2 * k + 2 * f) * work.itemsize
    numbers = (2 * d + 2 * n + 2 * k + 6 * f) * work.itemsize + 4 * d * 4
    heads = n // work.config.head_dim
    if work.flash:
        numbers += heads * 4
    else:
        numbers += heads * work.seq * (work.itemsize + 4)
    return part.tokens * numbers + copy_bytes(work, mesh) // work.config.num_layers


class Parts(NamedTuple):
    """A chip's part of an activation: rows times tokens, and its widths."""

    rows: int
    tokens: int
    d: int
    n: int
    k: int
    f: int
    v: int


def parts(work: Workload, mesh: Mapping[str, int], queries: int | None = None) -> Parts:
    """How activations of so many tokens in each row (all, if not told) are split.

    As by `sharding.constrain`: what a mesh does not divide is whole on every chip.
    """
    config, rules = work.config, dict(work.rules.activations)
    sizes = dict(zip(MESH_AXES, sizes_of(mesh), strict=True))

    def part(letter: str, size: int) -> int:
        ways = math.prod(sizes[axis] for axis in rules.get(letter) or ())
        return size if size % ways else size // ways

    rows = part("B", work.batch)
    return Parts(
        rows=rows,
        tokens=rows * part("T", work.seq if queries is None else queries),
        d=part("D", config.embed_dim),
        n=part("N", config.num_heads) * config.head_dim,
        k=part("K", config.num_kv_heads) * config.head_dim,
        f=part("F", config.mlp_dim),
        v=part("V", config.vocab_size),
    )


def layer_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of one layer's weights as a chip multiplies with them: D whole, in `dtype`.

    Quantized ones count as they are held, being widened within the product.
    """
    found = shards(work.config, work.rules, sizes_of(mesh))
    held = work.replace(task="decode") if work.task == "train" else work
    return sum(
        shard_bytes(held, path, shard, shard.gathered) // work.config.num_layers
        for path, shard in found.items()
        if path.startswith(_LAYERS)
    )


def copy_bytes(work: Workload, mesh: Mapping[str, int]) -> int:
    """Bytes of a chip's part of all layers' weights once more, in `dtype`.

    Of those that are trained in another dtype. With remat too: the compiler casts them
    all before it loops over the layers (seen in what libtpu 0.0.52 allots).
    """
    if work.task != "train" or work.dtype == work.param_dtype:
        return 0
    found = shards(work.config, work.rules, sizes_of(mesh))
    inside = (shard.size for path, shard in found.items() if path.startswith(_LAYERS))
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

    It is the plainest count that is within 1 % of what libtpu 0.0.52 allotted for
    three programs of block remat, one row of 4,096 tokens per chip (the tests have
    them), and 13 % too much for a fourth without remat. Chips of several rows, remat
    of all but products, adapters and GPUs have not been compared.
    """
    part, width = parts(work, mesh), work.itemsize
    block = part.tokens * 2 * (part.d + part.f) * width
    if is_gathered(mesh, work.rules):
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
    if work.task == "train":
        held += 4 * head
    return held + max(block, loss)


def _step(work: Workload, mesh: Mapping[str, int]) -> int:
    """Temporaries of a decoding step.

    Logits and what sampling makes of them in float32, the widest activation, and
    weights that had to be gathered.
    """
    part = parts(work, mesh, queries=1)
    step = 3 * part.rows * part.v * 4 + part.tokens * 2 * part.f * work.itemsize
    if is_gathered(mesh, work.rules):
        step += 2 * layer_bytes(work, mesh)
    return step


def sizes_of(mesh: Mapping[str, int]) -> tuple[int, ...]:
    """The sizes of all axes, in their order."""
    return tuple(mesh.get(axis, 1) for axis in MESH_AXES)


@functools.lru_cache(maxsize=4096)
def shards(
    config: LlamaConfig, rules: Rules, sizes: tuple[int, ...]
) -> dict[str, Shard]:
    """A chip's part of every kind of weight, by path, layers stacked.

    Args:
      config: of the model.
      rules: how axis letters map to mesh axes.
      sizes: of the mesh, in the order of `MESH_AXES`.

    Raises:
      MeshError: a mesh axis does not divide the axis of a weight that it splits.
    """
    mesh = dict(zip(MESH_AXES, sizes, strict=True))
    places = flatten(param_shardings(config, _runtime(rules), _mesh(mesh)))
    shapes = flatten(param_shapes(config, "stacked"))
    whole = axis_sizes(config)
    found = {}
    for path in leaf_paths(config, "stacked"):
        shape = places[path].shard_shape(shapes[path].shape)
        letters = axes_of(path).split()
        gathered = math.prod(
            whole["D"] if letter == "D" else size
            for letter, size in zip(letters, shape, strict=True)
        )
        # An adapter is [I, R] and [R, O], split as I and O are.
        projection = path.startswith(_LAYERS) and len(shape) == 3
        adapters = shape[0] * (shape[1] + shape[2]) if projection else 0
        found[path] = Shard(shape, gathered, adapters)
    return found


def _runtime(rules: Rules) -> Runtime:
    return Runtime(layer_layout="stacked", rules=rules)


def _mesh(mesh: Mapping[str, int]) -> Mesh:
    # Placements ask a mesh for its sizes only, so that one without devices will do.
    return cast(Mesh, AbstractMesh(sizes_of(mesh), MESH_AXES))
