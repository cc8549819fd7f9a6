"""The key/value cache: a value that goes into the model and comes out of it.

The slot of a token is its absolute position, in every row. A query at slot p sees the
slots ≤ p, so what lies after a row's length (padding, the last writes of a finished
row) needs no mask of its own: it is overwritten before any query can see it.

Each layer has a cache of its own (`layer_cache`). What the layers have in common, the
rows' lengths and page table, is stored once: a buffer that appears twice in a tree
cannot be donated.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import DTypeLike

from llama_jax.arguments import checked
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.kernels.reference import Slots
from llama_jax.model import slots
from llama_jax.model.attention import in_order
from llama_jax.model.layer_cache import (
    CacheRows,
    LayerCache,
    PagedLayerCache,
    slots_class,
)
from llama_jax.model.pages import NO_PAGE
from llama_jax.runtime import Runtime
from llama_jax.sharding import activation_spec
from llama_jax.types import Array, Int, Mesh, PyTree


class KVCache(NamedTuple):
    """A cache of each layer, and the state of the rows.

    Attributes:
      layers: L caches of the same kind.
      length: slots of each row that are in use.
      page_table: as of `CacheRows`.

    >>> from llama_jax.model.presets import preset
    >>> cache = init_cache(preset("llama2-7b").replace(num_layers=1), 2, 16, "int8")
    >>> cache.num_slots, cache.length.tolist(), cache.layers[0].k.shape
    (16, [0, 0], (2, 32, 16, 128))
    """

    layers: tuple[LayerCache, ...]
    length: Int[Array, " B"]
    page_table: Int[Array, "B M"] | None = None

    @property
    def num_slots(self) -> int:
        """S, the most slots of a row, the same in every layer."""
        size = self.layers[0].k.shape[2]
        return size if self.page_table is None else size * self.page_table.shape[1]

    @property
    def rows(self) -> CacheRows:
        """The state of the rows, for a layer's cache."""
        return CacheRows(self.length, self.page_table)

    def layer(self, index: int) -> LayerCache:
        """The cache of one layer."""
        return self.layers[index]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NewCache:
    """Instead of a cache: create one of `num_slots` slots that begins with the tokens.

    The tokens attend to each other before any rounding, and may be packed.
    """

    num_slots: int
    rows = None

    def layer(self, index: int) -> "NewCache":
        """The new cache of one layer."""
        return self

    def append(
        self, k: Array, v: Array, rows: None, *, runtime: Runtime, mesh: Mesh | None
    ) -> LayerCache:
        """The cache of a layer that begins with these keys and values."""
        dtype = runtime.slot_dtype

        def first_slots(x: Array) -> Slots:
            x = in_order(x, "B K T H", runtime.rules, mesh)
            new = slots.encode(x, dtype)
            return slots.start(new, self.num_slots, rules=runtime.rules, mesh=mesh)

        return slots_class(dtype)(first_slots(k), first_slots(v))


@checked(ConfigError)
def init_cache(
    config: LlamaConfig, batch: int, num_slots: int, dtype: DTypeLike
) -> KVCache:
    """Create an empty cache of dense slots.

    Args:
      config: of the model.
      batch: B, rows.
      num_slots: S, the most tokens of a row.
      dtype: of keys and values; int8 ones have a float32 scale for each slot and head.

    Returns:
      A cache of `2 · L · B · K · S · H` numbers.

    >>> from llama_jax.model.presets import preset
    >>> cache = init_cache(preset("llama2-7b").replace(num_layers=1), 2, 8, "bfloat16")
    >>> cache.layers[0].v.dtype, len(cache.layers)
    (dtype(bfloat16), 1)
    """
    shape = (batch, config.num_kv_heads, num_slots, config.head_dim)
    layer = slots_class(dtype)
    return KVCache(
        layers=tuple(
            layer(slots.zeros(shape, dtype), slots.zeros(shape, dtype))
            for _ in range(config.num_layers)
        ),
        length=jnp.zeros((batch,), jnp.int32),
    )


@checked(ConfigError)
def init_paged_cache(
    config: LlamaConfig,
    batch: int,
    *,
    num_pages: int,
    page_size: int,
    pages_per_row: int,
    dtype: DTypeLike,
) -> KVCache:
    """Create an empty cache of pages, none of which belongs to a row.

    Args:
      config: of the model.
      batch: B, rows.
      num_pages: P, in each layer.
      page_size: C, slots of a page. TPU kernels need a multiple of 8, or of 128 if
        slots are int8 or head_dim is not a multiple of 128.
      pages_per_row: M, the most pages of a row.
      dtype: of keys and values; int8 ones have a float32 scale for each slot and head.

    Returns:
      A cache of `2 · L · P · K · C · H` numbers.

    >>> from llama_jax.model.presets import preset
    >>> sizes = {"num_pages": 3, "page_size": 8, "pages_per_row": 2, "dtype": "int8"}
    >>> cache = init_paged_cache(preset("llama2-7b").replace(num_layers=1), 4, **sizes)
    >>> cache.num_slots, cache.page_table[0].tolist(), cache.layers[0].k.shape
    (16, [-1, -1], (3, 32, 8, 128))
    """
    shape = (num_pages, config.num_kv_heads, page_size, config.head_dim)
    return KVCache(
        layers=tuple(
            PagedLayerCache(slots.zeros(shape, dtype), slots.zeros(shape, dtype))
            for _ in range(config.num_layers)
        ),
        length=jnp.zeros((batch,), jnp.int32),
        page_table=jnp.full((batch, pages_per_row), NO_PAGE, jnp.int32),
    )


def insert(
    cache: KVCache,
    row: int | Int[Array, ""],
    prefix: KVCache,
    pages: Int[Array, " M"] | None = None,
    *,
    runtime: Runtime | None = None,
    mesh: Mesh | None = None,
) -> KVCache:
    """Replace one row of a cache with the only row of another; other rows stay.

    Args:
      cache: dense, int8 or paged.
      row: index of the row, which may be traced.
      prefix: of one row, with slots of the same kind, not in pages, and no more of
        them than the cache has.
      pages: ids of the pages of the row from now on, `NO_PAGE` after the last; only
        for a paged cache. Those that hold a part of the prefix are overwritten.
      runtime: of the model; its rules count, on a mesh.
      mesh: the devices of the cache.

    Raises:
      ConfigError: the two caches do not fit each other.
    """
    if (pages is None) != (cache.page_table is None):
        raise ConfigError(
            "cache: a row of a paged cache needs pages, and no other row has any; give "
            "insert the ids of M pages for a paged cache only"
        )
    new, stored = prefix.layers[0].k, cache.layers[0].k
    one_row = prefix.page_table is None and prefix.length.shape == (1,)
    same_kind = slots.dtype_of(new) == slots.dtype_of(stored)
    if not one_row or not same_kind or prefix.num_slots > cache.num_slots:
        raise ConfigError(
            f"cache: cannot insert {prefix.length.shape[0]} rows of "
            f"{prefix.num_slots} slots in {slots.dtype_of(new)} into one of "
            f"{cache.num_slots} in {slots.dtype_of(stored)}; prefill one row, densely, "
            "with as many slots at most and the same dtype"
        )
    row, runtime = jnp.asarray(row, jnp.int32), runtime or Runtime()
    layers = (
        layer.insert(row, other, pages, runtime=runtime, mesh=mesh)
        for layer, other in zip(cache.layers, prefix.layers, strict=True)
    )
    table = cache.page_table
    if table is not None and pages is not None:
        table = table.at[row].set(pages)
    return KVCache(tuple(layers), cache.length.at[row].set(prefix.length[0]), table)


def take_row(cache: KVCache, row: int | Int[Array, ""]) -> KVCache:
    """A cache of one row of another: a copy of its slots, or the same pages.

    The pages are those of all rows: tokens appended to the result are in them, and
    `put_row` puts them back.
    """
    row = jnp.asarray(row, jnp.int32)

    def only(rows: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(rows, row, 1)

    length, table = only(cache.length), cache.page_table
    if table is not None:
        return KVCache(cache.layers, length, only(table))
    return KVCache(jax.tree.map(only, cache.layers), length)


def put_row(
    cache: KVCache,
    row: int | Int[Array, ""],
    taken: KVCache,
    *,
    runtime: Runtime | None = None,
    mesh: Mesh | None = None,
) -> KVCache:
    """Put back what `take_row` took, with what was appended to it since.

    Args:
      cache: dense, int8 or paged.
      row: index of the row.
      taken: of that row.
      runtime: of the model; its rules count, on a mesh.
      mesh: the devices of the cache.
    """
    if cache.page_table is None or taken.page_table is None:
        return insert(cache, row, taken, runtime=runtime, mesh=mesh)
    return KVCache(
        taken.layers,
        cache.length.at[row].set(taken.length[0]),
        cache.page_table.at[row].set(taken.page_table[0]),
    )


def grow(cache: KVCache, num_slots: int) -> KVCache:
    """The same contents in a cache of more slots per row.

    Raises:
      ValueError: it has more slots already, or pages of which these are no multiple.
    """
    extra = num_slots - cache.num_slots
    if extra < 0:
        raise ValueError(f"cannot shrink {cache.num_slots} slots to {num_slots}")
    table = cache.page_table
    if table is not None:
        size = cache.layers[0].k.shape[2]
        if extra % size:
            raise ValueError(f"{num_slots} slots are no multiple of a page of {size}")
        pad = ((0, 0), (0, extra // size))
        table = jnp.pad(table, pad, constant_values=NO_PAGE)
    layers = tuple(layer.grow(extra) for layer in cache.layers)
    return KVCache(layers, cache.length, table)


def cache_shardings(
    config: LlamaConfig, runtime: Runtime, mesh: Mesh, batch: int, num_slots: int
) -> KVCache:
    """The `NamedSharding` of each array of a dense or int8 cache.

    Rows are cut over `data` and `fsdp`, heads over `tensor`, slots over `sequence`, and
    over `tensor` too where it does not divide K. Scales are cut as their slots are.
    """
    shape = (batch, config.num_kv_heads, num_slots, config.head_dim)
    entries = activation_spec(shape, slots.AXES, runtime.rules, mesh)
    part: PyTree = NamedSharding(mesh, entries)
    if runtime.slot_dtype == "int8":
        scales: PyTree = NamedSharding(mesh, PartitionSpec(*entries[:3]))
        part = QuantizedSlots(part, scales)
    layer = slots_class(runtime.slot_dtype)(part, part)
    length: PyTree = NamedSharding(mesh, PartitionSpec())
    return KVCache((layer,) * config.num_layers, length)
