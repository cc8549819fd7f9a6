"""What is run, and a chip's part of its weights and activations."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from llama_jax.config import LlamaConfig
from llama_jax.params import (
    LAYERS,
    axes_of,
    axis_sizes,
    flatten,
    leaf_paths,
    param_shapes,
)
from llama_jax.runtime import (
    MESH_AXES,
    TRAINING_RULES,
    CacheDType,
    DType,
    Remat,
    Rules,
    Runtime,
)
from llama_jax.sharding import param_shardings
from llama_jax.types import Mesh

Task = Literal["train", "lora", "qlora", "prefill", "decode"]
Quantization = Literal["none", "int8", "int4", "nf4"]

INT4_GROUP = 64
"""Weights that share a scale in four bits: a block of QLoRA (arXiv:2305.14314)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is run, wherever it is.

    Attributes:
      config: of the model.
      task: "train" all weights; "lora" and "qlora" adapters of `rank` for each of a
        layer's seven projections, on weights that stay; "prefill" reads prompts of
        `seq` tokens into a cache; "decode" writes a token for each row.
      batch: B, rows of the whole mesh.
      seq: tokens of a row; slots of its cache.
      dtype: of activations, and of weights that are not trained.
      cache_dtype: of the cache; "int8" with a float32 scale for each slot and head,
        None as `dtype`.
      param_dtype: of weights that are trained, their gradients and their moments.
      quantize: how projections of the layers are held that are not trained: "int8"
        with a float32 scale for each column, "int4" and "nf4" with one in `dtype` for
        each `INT4_GROUP` weights. Embedding, norms and head stay in `dtype`.
      remat: what the backward pass computes again.
      rank: R of adapters.
      flash: attention runs without the matrix of its weights.
      gpu: compiled for GPUs, whose compiler keeps more of a block at once.
    """

    config: LlamaConfig
    task: Task
    batch: int
    seq: int
    dtype: DType = "bfloat16"
    cache_dtype: CacheDType | None = None
    param_dtype: DType = "float32"
    quantize: Quantization = "none"
    remat: Remat = "block"
    rank: int = 16
    flash: bool = True
    gpu: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a number in `dtype`."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.task in ("train", "lora", "qlora")

    @property
    def rules(self) -> Rules:
        """How axis letters map to mesh axes."""
        return TRAINING_RULES if self.trains else Rules()

    @property
    def queries(self) -> int:
        """Tokens of each row that go through the model at once."""
        return 1 if self.task == "decode" else self.seq

    def replace(self, **changes: object) -> "Workload":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


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


class Parts(NamedTuple):
    """A chip's part of an activation.

    Attributes:
      rows: of the batch.
      tokens: of all its rows, as a block's products have them.
      stream: of all its rows between the blocks, where `tensor` cuts them too.
      d: of D, and so on; heads times their width.
    """

    rows: int
    tokens: int
    stream: int
    d: int
    n: int
    k: int
    f: int
    v: int


def parts(work: Workload, mesh: Mapping[str, int], queries: int | None = None) -> Parts:
    """How activations of so many tokens in each row (all, if not told) are split.

    As by `sharding.divisible`: the last mesh axes that do not divide are left out.
    """
    config, rules = work.config, dict(work.rules.activations)
    sizes = dict(zip(MESH_AXES, sizes_of(mesh), strict=True))

    def part(letter: str, size: int) -> int:
        axes = list(rules.get(letter) or ())
        while axes and size % math.prod(sizes[axis] for axis in axes):
            axes.pop()
        return size // math.prod(sizes[axis] for axis in axes)

    rows, length = part("B", work.batch), work.seq if queries is None else queries
    return Parts(
        rows=rows,
        tokens=rows * part("T", length),
        stream=rows * part("TS", length),
        d=part("D", config.embed_dim),
        n=part("N", config.num_heads) * config.head_dim,
        k=part("K", config.num_kv_heads) * config.head_dim,
        f=part("F", config.mlp_dim),
        v=part("V", config.vocab_size),
    )


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
    places = flatten(param_shardings(config, runtime_of(rules), abstract_mesh(mesh)))
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
        projection = path.startswith(LAYERS) and len(shape) == 3
        adapters = shape[0] * (shape[1] + shape[2]) if projection else 0
        found[path] = Shard(shape, gathered, adapters)
    return found


def runtime_of(rules: Rules) -> Runtime:
    """What placements ask a runtime for: its rules, and layers stacked."""
    return Runtime(layer_layout="stacked", rules=rules)


def abstract_mesh(mesh: Mapping[str, int]) -> Mesh:
    """A mesh of no devices."""
    # Placements ask a mesh for its sizes only, so that one without devices will do.
    return cast(Mesh, AbstractMesh(sizes_of(mesh), MESH_AXES))
