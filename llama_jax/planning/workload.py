"""A workload, and one chip's shard of its weights and activations."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

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
from llama_jax.weights import GROUP_SIZE

Task = Literal["train", "lora", "qlora", "prefill", "decode"]
Quantization = Literal["none", "int8", "int4", "nf4"]

EMBEDDING = "transformer/embedding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What runs, independent of the hardware.

    Attributes:
      config: the model.
      task: "train" updates all weights; "lora" and "qlora" train adapters of `rank` on
        each of a layer's seven projections, with frozen weights; "prefill" reads
        prompts of `seq` tokens into a cache; "decode" generates one token per row.
      batch: B, rows of the whole mesh.
      seq: tokens per row; for decoding, slots of the cache.
      dtype: dtype of activations, and of weights that are not trained.
      cache_dtype: dtype of the cache; "int8" has a float32 scale per slot and head,
        None means `dtype`.
      param_dtype: dtype of trained weights, their gradients and their moments.
      quantize: storage of the layers' frozen projections: "int8" has a float32 scale
        per column, "int4" and "nf4" one in `dtype` per `GROUP_SIZE` weights. Embedding,
        norms and head stay in `dtype`.
      remat: what the backward pass recomputes.
      rank: R, the rank of adapters.
      flash: attention does not materialize its weights.
      gpu: compiled for GPUs, whose compiler keeps more of a block alive at once.
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
        """Bytes per number in `dtype`."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def param_itemsize(self) -> int:
        """Bytes per number in `param_dtype`."""
        return jnp.dtype(self.param_dtype).itemsize

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
        """Tokens per row that go through the model at once."""
        return 1 if self.task == "decode" else self.seq

    def replace(self, **changes: object) -> "Workload":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


class WeightShard(NamedTuple):
    """One chip's shard of a kind of weight, all layers together.

    Attributes:
      shape: of the shard; L leads the shape of a layer's weight.
      gathered: its size with D gathered, as matrix products need it.
      adapter_size: size of its adapter per unit of rank; 0 if it has none.
    """

    shape: tuple[int, ...]
    gathered: int
    adapter_size: int

    @property
    def size(self) -> int:
        """Numbers in the shard."""
        return math.prod(self.shape)


def weight_shards(work: Workload, mesh: Mapping[str, int]) -> dict[str, WeightShard]:
    """One chip's shard of each kind of weight, by path, layers stacked.

    Raises:
      MeshError: a mesh axis does not divide the weight axis that it splits.
    """
    return shards_on(work.config, work.rules, sizes_of(mesh))


def layer_shards(work: Workload, mesh: Mapping[str, int]) -> list[WeightShard]:
    """The shards of `weight_shards` that belong to the layers."""
    shards = weight_shards(work, mesh)
    return [shard for path, shard in shards.items() if path.startswith(LAYERS)]


@functools.lru_cache(maxsize=4096)
def shards_on(
    config: LlamaConfig, rules: Rules, sizes: tuple[int, ...]
) -> dict[str, WeightShard]:
    """`weight_shards` by mesh sizes in the order of `MESH_AXES`; cached."""
    mesh = abstract_mesh(dict(zip(MESH_AXES, sizes, strict=True)))
    runtime = Runtime(layer_layout="stacked", rules=rules)
    shardings = flatten(param_shardings(config, runtime, mesh))
    shapes = flatten(param_shapes(config, "stacked"))
    embed_dim = axis_sizes(config)["D"]
    shards = {}
    for path in leaf_paths(config, "stacked"):
        shape = shardings[path].shard_shape(shapes[path].shape)
        gathered = math.prod(
            embed_dim if letter == "D" else size
            for letter, size in zip(axes_of(path).split(), shape, strict=True)
        )
        # An adapter is [I, R] and [R, O], split as I and O are.
        projection = path.startswith(LAYERS) and len(shape) == 3
        adapter_size = shape[0] * (shape[1] + shape[2]) if projection else 0
        shards[path] = WeightShard(shape, gathered, adapter_size)
    return shards


def stored_bytes(work: Workload, shard: WeightShard, size: int) -> int:
    """Bytes of `size` numbers of a weight as they are stored, with their scales."""
    if work.task == "train":
        return size * work.param_itemsize
    if work.quantize == "none" or not shard.adapter_size:
        return size * work.itemsize
    if work.quantize == "int8":
        # One scale per column and layer; each shard along D has all of them.
        return size + 4 * shard.shape[0] * shard.shape[2]
    return math.ceil(size / 2) + math.ceil(size / GROUP_SIZE) * work.itemsize


class LocalSizes(NamedTuple):
    """Sizes of one chip's part of the activations.

    Attributes:
      rows: of the batch.
      tokens: of all its rows, inside a block.
      stream: of all its rows between blocks, where `tensor` splits them too.
      d: its part of D.
      n: its part of N times H.
      k: its part of K times H.
      f: its part of F.
      v: its part of V.
    """

    rows: int
    tokens: int
    stream: int
    d: int
    n: int
    k: int
    f: int
    v: int


def local_sizes(work: Workload, mesh: Mapping[str, int]) -> LocalSizes:
    """Split activations as `sharding.activation_spec` does.

    The last mesh axes of a letter that do not divide its size are dropped.
    """
    config, rules = work.config, dict(work.rules.activations)

    def part(letter: str, size: int) -> int:
        axes = list(rules.get(letter) or ())
        while axes and size % math.prod(mesh.get(axis, 1) for axis in axes):
            axes.pop()
        return size // math.prod(mesh.get(axis, 1) for axis in axes)

    rows = part("B", work.batch)
    return LocalSizes(
        rows=rows,
        tokens=rows * part("T", work.queries),
        stream=rows * part("TS", work.queries),
        d=part("D", config.embed_dim),
        n=part("N", config.num_heads) * config.head_dim,
        k=part("K", config.num_kv_heads) * config.head_dim,
        f=part("F", config.mlp_dim),
        v=part("V", config.vocab_size),
    )


def sizes_of(mesh: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes of all mesh axes, in the order of `MESH_AXES`."""
    return tuple(mesh.get(axis, 1) for axis in MESH_AXES)


def abstract_mesh(mesh: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, for functions that need its sizes only."""
    return AbstractMesh(sizes_of(mesh), MESH_AXES)
