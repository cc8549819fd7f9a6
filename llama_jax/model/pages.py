"""Pages of keys or values, `[P, K, C, H]`, shared by all rows of a cache.

Slot s of a row lies in page `page_table[row, s // C]` at offset `s % C`. An entry of
`NO_PAGE` means that the row has no such page: nothing is written there, so a finished
row or a padded token never changes the page of another row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from llama_jax.kernels.reference import Pages, Slots
from llama_jax.model.slots import pad_slots
from llama_jax.types import Array, Int

NO_PAGE = -1


def write(
    pages: Pages,
    new: Slots,
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
) -> Pages:
    """Write T encoded keys or values after each row's length, in place."""

    def write_array(pages: Array, new: Array) -> Array:
        if new.shape[2] == 1:
            return _write_slots(pages, new, page_table, length)
        return _write_pages(pages, new, page_table, length)

    return jax.tree.map(write_array, pages, new)


def write_row(pages: Pages, new: Slots, page_ids: Int[Array, " M"]) -> Pages:
    """Write the slots of one row, `[1, K, S', H]` with S' ≤ M · C, into pages."""
    size = pages.shape[2]
    new = pad_slots(new, -new.shape[2] % size)
    table, length = page_ids[None], jnp.zeros((1,), jnp.int32)

    def write_array(pages: Array, new: Array) -> Array:
        def body(index: Array, pages: Array) -> Array:
            return _write_page(pages, new, table, length, jnp.int32(0), index)

        return jax.lax.fori_loop(0, new.shape[2] // size, body, pages)

    return jax.tree.map(write_array, pages, new)


def gather(pages: Pages, page_table: Int[Array, "B M"]) -> Slots:
    """The slots `[B, K, M · C, H]` of every row; those without a page are arbitrary."""

    def gather_array(pages: Array) -> Array:
        of_row = jnp.moveaxis(pages[jnp.maximum(page_table, 0)], 1, 2)  # B K M C ...
        return of_row.reshape(*of_row.shape[:2], -1, *of_row.shape[4:])

    return jax.tree.map(gather_array, pages)


def _page_id(
    page_table: Int[Array, "B M"], row: int | Int[Array, ""], page: Int[Array, ""]
) -> Int[Array, ""]:
    """The id of a row's page, `NO_PAGE` after its last."""
    page_id = jax.lax.dynamic_slice(page_table, (row, page), (1, 1))[0, 0]
    return jnp.where(page < page_table.shape[1], page_id, NO_PAGE)


def _write_slots(
    pages: Shaped[Array, "P K C *H"],
    new: Shaped[Array, "B K 1 *H"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
) -> Array:
    size = pages.shape[2]
    # Updates at traced offsets, one per row, as for dense slots: in place.
    for row in range(new.shape[0]):
        page = _page_id(page_table, row, length[row] // size)
        at = (page, 0, length[row] % size, 0)[: pages.ndim]
        old = jax.lax.dynamic_slice(pages, at, (1, *new.shape[1:]))
        slot = jnp.where(page >= 0, new[row : row + 1], old)
        pages = jax.lax.dynamic_update_slice(pages, slot, at)
    return pages


def _write_pages(
    pages: Shaped[Array, "P K C *H"],
    new: Shaped[Array, "B K T *H"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
) -> Array:
    size, (batch, _, count, *_) = pages.shape[2], new.shape
    touched = (count + 2 * size - 2) // size  # pages of a row, at any offset

    def body(index: Array, pages: Array) -> Array:
        row, page = index // touched, index % touched
        page = page + length[row] // size
        return _write_page(pages, new, page_table, length, row, page)

    return jax.lax.fori_loop(0, batch * touched, body, pages)


def _write_page(
    pages: Shaped[Array, "P K C *H"],
    new: Shaped[Array, "B K T *H"],
    page_table: Int[Array, "B M"],
    length: Int[Array, " B"],
    row: Int[Array, ""],
    page: Int[Array, ""],
) -> Array:
    """One page of a row, with those of its new tokens that fall into it."""
    size, count = pages.shape[2], new.shape[2]
    page_id = _page_id(page_table, row, page)
    at = (page_id, 0, 0, 0)[: pages.ndim]
    old = jax.lax.dynamic_slice(pages, at, (1, *pages.shape[1:]))
    index = page * size + jnp.arange(size) - length[row]
    tokens = jax.lax.dynamic_index_in_dim(new, row)
    values = jnp.take(tokens, jnp.clip(index, 0, count - 1), axis=2)
    is_new = (index >= 0) & (index < count) & (page_id >= 0)
    is_new = is_new.reshape(1, 1, size, *(1 for _ in pages.shape[3:]))
    return jax.lax.dynamic_update_slice(pages, jnp.where(is_new, values, old), at)
