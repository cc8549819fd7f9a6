"""The key/value cache of one layer: dense slots, slots in eight bits, or pages.

New keys and values are appended to a `LayerCache`, and queries attend to it. The state
of the rows, which all layers share, is passed in.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from jaxtyping import DTypeLike

from llama_jax.errors import ConfigError
from llama_jax.kernels.quantized_slots import QuantizedSlots, quantize_slots
from llama_jax.kernels.reference import Pages, Slots
from llama_jax.model import pages as paging
from llama_jax.model import slots
from llama_jax.model.attention import attend, attend_pages
from llama_jax.runtime import Runtime
from llama_jax.types import Array, Float, Int, Mesh, PyTree


class CacheRows(NamedTuple):
    """State of a cache's rows, the same for all layers.

    Attributes:
      length: slots of each row that are in use.
      page_table: the page of every C slots of a row, `NO_PAGE` where it has none;
        None if the cache has no pages.
    """

    length: Int[Array, " B"]
    page_table: Int[Array, "B M"] | None = None


@runtime_checkable
class LayerCache(Protocol):
    """Keys and values of one layer."""

    @property
    def k(self) -> Slots | Pages:
        """Keys, as they are stored."""

    @property
    def v(self) -> Slots | Pages:
        """Values, as they are stored."""

    def append(
        self,
        k: Float[Array, "B K T H"],
        v: Float[Array, "B K T H"],
        rows: CacheRows,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> "LayerCache":
        """Write new keys and values after each row's length; the length stays."""

    def attend(
        self,
        q: Float[Array, "B T N H"],
        rows: CacheRows,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> Float[Array, "B T N H"]:
        """Attend to the slots; the first query of a row is at its length."""

    def insert(
        self,
        row: Int[Array, ""],
        prefix: "LayerCache",
        pages: Int[Array, " M"] | None,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> "LayerCache":
        """Write the only row of a dense or int8 prefix into a row, from slot 0."""

    def grow(self, extra: int) -> "LayerCache":
        """Add `extra` slots to each row."""


class DenseLayerCache(NamedTuple):
    """Slots of keys and values, `[B, K, S, H]`: those of a head lie together."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]

    def append(
        self,
        k: Array,
        v: Array,
        rows: CacheRows,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> "DenseLayerCache":
        """See `LayerCache`."""
        new = DenseLayerCache(k.astype(self.k.dtype), v.astype(self.v.dtype))
        return _write(self, new, rows, runtime, mesh)

    def attend(
        self, q: Array, rows: CacheRows, *, runtime: Runtime, mesh: Mesh | None
    ) -> Array:
        """See `LayerCache`."""
        return _attend(self, q, rows, runtime, mesh)

    def insert(
        self,
        row: Array,
        prefix: Any,
        pages: Array | None,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> "DenseLayerCache":
        """See `LayerCache`."""
        return _write_row(self, prefix, row, runtime, mesh)

    def grow(self, extra: int) -> "DenseLayerCache":
        """See `LayerCache`."""
        return DenseLayerCache(*(slots.pad_slots(part, extra) for part in self))


class Int8LayerCache(NamedTuple):
    """The same in eight bits, with a float32 scale for each slot and head."""

    k: QuantizedSlots
    v: QuantizedSlots

    def append(
        self,
        k: Array,
        v: Array,
        rows: CacheRows,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> "Int8LayerCache":
        """See `LayerCache`."""
        new = Int8LayerCache(quantize_slots(k), quantize_slots(v))
        return _write(self, new, rows, runtime, mesh)

    def attend(
        self, q: Array, rows: CacheRows, *, runtime: Runtime, mesh: Mesh | None
    ) -> Array:
        """See `LayerCache`."""
        return _attend(self, q, rows, runtime, mesh)

    def insert(
        self,
        row: Array,
        prefix: Any,
        pages: Array | None,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> "Int8LayerCache":
        """See `LayerCache`."""
        return _write_row(self, prefix, row, runtime, mesh)

    def grow(self, extra: int) -> "Int8LayerCache":
        """See `LayerCache`."""
        return Int8LayerCache(*(slots.pad_slots(part, extra) for part in self))


class PagedLayerCache(NamedTuple):
    """Pages of C slots, `[P, K, C, H]`, which rows find by the page table."""

    k: Pages
    v: Pages

    def append(
        self,
        k: Array,
        v: Array,
        rows: CacheRows,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> "PagedLayerCache":
        """See `LayerCache`."""
        _check_one_device(mesh)
        table, length = rows.page_table, rows.length
        assert table is not None
        dtype = slots.dtype_of(self.k)
        new = (slots.encode(x, dtype) for x in (k, v))
        written = (
            paging.write(*parts, table, length) for parts in zip(self, new, strict=True)
        )
        return PagedLayerCache(
            *(
                slots.pin_layout(part, rules=runtime.rules, mesh=None)
                for part in written
            )
        )

    def attend(
        self, q: Array, rows: CacheRows, *, runtime: Runtime, mesh: Mesh | None
    ) -> Array:
        """See `LayerCache`."""
        _check_one_device(mesh)
        assert rows.page_table is not None
        return attend_pages(
            q,
            self.k,
            self.v,
            jnp.maximum(rows.page_table, 0),  # no page: never looked at, but a page
            q_start=rows.length,
            runtime=runtime,
        )

    def insert(
        self,
        row: Array,
        prefix: LayerCache,
        pages: Array | None,
        *,
        runtime: Runtime,
        mesh: Mesh | None,
    ) -> "PagedLayerCache":
        """See `LayerCache`."""
        _check_one_device(mesh)
        assert pages is not None
        written = (
            paging.write_row(part, new, pages)
            for part, new in zip(self, (prefix.k, prefix.v), strict=True)
        )
        return PagedLayerCache(
            *(
                slots.pin_layout(part, rules=runtime.rules, mesh=None)
                for part in written
            )
        )

    def grow(self, extra: int) -> "PagedLayerCache":
        """See `LayerCache`: the page table grows, pages do not."""
        return self


SlotsCache = TypeVar("SlotsCache", DenseLayerCache, Int8LayerCache)


def slots_class(dtype: DTypeLike) -> Callable[[PyTree, PyTree], LayerCache]:
    """The class of a layer's cache with slots of this dtype."""
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ConfigError(
            f"cache: dtype is {dtype!r}; name one, such as 'bfloat16' or 'int8'"
        ) from error
    return Int8LayerCache if dtype == jnp.int8 else DenseLayerCache


def _write(
    layer: SlotsCache,
    new: SlotsCache,
    rows: CacheRows,
    runtime: Runtime,
    mesh: Mesh | None,
) -> SlotsCache:
    write = functools.partial(
        slots.write, length=rows.length, rules=runtime.rules, mesh=mesh
    )
    return layer._replace(k=write(layer.k, new.k), v=write(layer.v, new.v))


def _write_row(
    layer: SlotsCache,
    prefix: SlotsCache,
    row: Array,
    runtime: Runtime,
    mesh: Mesh | None,
) -> SlotsCache:
    write = functools.partial(slots.write_row, row=row, rules=runtime.rules, mesh=mesh)
    return layer._replace(k=write(layer.k, prefix.k), v=write(layer.v, prefix.v))


def _attend(
    layer: LayerCache, q: Array, rows: CacheRows, runtime: Runtime, mesh: Mesh | None
) -> Array:
    return attend(
        q,
        layer.k,
        layer.v,
        q_start=rows.length,
        segment_ids=None,
        runtime=runtime,
        mesh=mesh,
    )


def _check_one_device(mesh: Mesh | None) -> None:
    if mesh is not None and mesh.size > 1:
        raise ConfigError(
            f"cache: pages cannot be cut over a mesh of {mesh.size} devices; use a "
            "dense cache (init_cache), or one device"
        )
