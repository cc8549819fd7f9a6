"""The TPU kernels for decoding against the reference, interpreted; and compiled."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from support.attention_inputs import (
    arrays,
    assert_equal,
    newest_only,
    quantized,
    quick_jit,
)
from support.programs import needs_tpu_compiler, whole_results
from support.tolerances import DECODE_BFLOAT16, DECODE_FLOAT32

from llama_jax.kernels import reference
from llama_jax.kernels.quantized_slots import (
    QuantizedSlots,
    dequantize_slots,
)
from llama_jax.kernels.tpu.decode import decode_attention
from llama_jax.kernels.tpu.paged import paged_attention
from llama_jax.planning.target_devices import tpu_devices

S, C = 384, 64
# Lengths around the borders of the 128-slot blocks of these tests, and a full row.
LENGTHS = (3, 100, 127, 128, 129, 256, 300, 384)
TOLERANCES = {"float32": DECODE_FLOAT32, "bfloat16": DECODE_BFLOAT16}

decode = quick_jit(
    functools.partial(decode_attention, interpret=True, block_slots=128),
    static_argnames="cores",
)
paged = quick_jit(functools.partial(paged_attention, interpret=True, block_slots=128))
reference_attention = quick_jit(reference.attention)
reference_paged_attention = quick_jit(reference.paged_attention)


def inputs(
    n: int,
    k: int,
    *,
    width: int = 128,
    queries: int = 1,
    slots: int = S,
    lengths: tuple[int, ...] = LENGTHS,
    dtype: str = "float32",
) -> tuple[Any, Any, Any, Any]:
    """Random q, k and v, and the slot of each row's first query."""
    batch = len(lengths)
    cache = batch, k, slots, width
    q, keys, values = arrays((batch, queries, n, width), cache, cache, dtype=dtype)
    return q, keys, values, jnp.asarray(lengths, jnp.int32) - queries


def in_pages(cache: Any, page: int) -> tuple[Any, Any]:
    """The same slots in pages in random order, and the page table."""
    leaves = jax.tree.leaves(cache)
    batch, _, slots = leaves[0].shape[:3]
    order = np.random.default_rng(1).permutation(batch * (slots // page))

    def cut(part: Any) -> Any:
        pages = part.reshape(*part.shape[:2], -1, page, *part.shape[3:])
        pages = jnp.moveaxis(pages, 2, 1)
        return pages.reshape(-1, *pages.shape[2:])[order]

    table = np.argsort(order).reshape(batch, -1)
    return jax.tree.map(cut, cache), jnp.asarray(table, jnp.int32)


def assert_close(actual: Any, expected: Any, dtype: str = "float32") -> None:
    assert actual.dtype == expected.dtype == dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(expected, np.float64),
        rtol=TOLERANCES[dtype],
        atol=TOLERANCES[dtype],
    )


@pytest.mark.parametrize(
    ("n", "k", "queries", "dtype"),
    [
        (4, 4, 1, "float32"),
        pytest.param(4, 4, 3, "bfloat16", marks=pytest.mark.slow),
        pytest.param(16, 2, 1, "bfloat16", marks=pytest.mark.slow),
        pytest.param(16, 2, 3, "float32", marks=newest_only),
        pytest.param(8, 1, 2, "float32", marks=pytest.mark.slow),
        pytest.param(6, 2, 1, "bfloat16", marks=newest_only),
    ],
)
def test_decoding_equals_the_reference(
    n: int, k: int, queries: int, dtype: str
) -> None:
    q, keys, values, start = inputs(n, k, queries=queries, dtype=dtype)
    assert_close(
        decode(q, keys, values, q_start=start),
        reference_attention(q, keys, values, q_start=start),
        dtype,
    )


@pytest.mark.parametrize(
    ("n", "k", "queries", "dtype"),
    [
        (4, 4, 1, "float32"),
        pytest.param(16, 2, 3, "float32", marks=newest_only),
        pytest.param(6, 2, 1, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_decoding_over_pages_equals_the_reference(
    n: int, k: int, queries: int, dtype: str
) -> None:
    q, keys, values, start = inputs(n, k, queries=queries, dtype=dtype)
    (k_pages, v_pages), table = in_pages((keys, values), C)
    assert_close(
        paged(q, k_pages, v_pages, table, q_start=start),
        reference_attention(q, keys, values, q_start=start),
        dtype,
    )


@newest_only
@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (64, "bfloat16"),
        (80, "float32"),
        pytest.param(96, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_decoding_with_other_head_dims_equals_the_reference(
    width: int, dtype: str
) -> None:
    q, keys, values, start = inputs(4, 2, width=width, queries=2, dtype=dtype)
    expected = reference_attention(q, keys, values, q_start=start)
    assert_close(decode(q, keys, values, q_start=start), expected, dtype)


@newest_only
def test_decoding_over_pages_with_another_head_dim_equals_the_reference() -> None:
    q, keys, values, start = inputs(4, 2, width=80, queries=2)
    expected = reference_attention(q, keys, values, q_start=start)
    (k_pages, v_pages), table = in_pages((keys, values), 128)
    assert_close(paged(q, k_pages, v_pages, table, q_start=start), expected, "float32")


@newest_only
@pytest.mark.parametrize("slots", [24, 1000])
def test_a_cache_of_partial_blocks_equals_the_reference(
    slots: int,
) -> None:
    lengths = tuple(sorted({1, slots // 2, slots - 1, slots}))
    q, keys, values, start = inputs(4, 2, slots=slots, lengths=lengths)
    assert_close(
        decode(q, keys, values, q_start=start),
        reference_attention(q, keys, values, q_start=start),
        "float32",
    )


@newest_only
def test_many_rows_of_one_slot_equal_the_reference() -> None:
    q, keys, values, start = inputs(4, 4, lengths=(1,) * 8)
    assert_close(
        decode(q, keys, values, q_start=start),
        reference_attention(q, keys, values, q_start=start),
        "float32",
    )


@pytest.mark.parametrize(
    ("n", "k", "width", "queries", "dtype"),
    [
        pytest.param(4, 4, 128, 1, "float32", marks=pytest.mark.slow),
        pytest.param(16, 2, 128, 2, "bfloat16", marks=newest_only),
        pytest.param(4, 4, 64, 2, "float32", marks=newest_only),
    ],
)
def test_int8_slots_equal_the_reference_on_dequantized_slots(
    n: int, k: int, width: int, queries: int, dtype: str
) -> None:
    q, keys, values, start = inputs(n, k, width=width, queries=queries, dtype=dtype)
    slots = quantized(keys, values)
    # Dequantized to the queries' dtype the numbers would be rounded once more.
    expected = reference_attention(
        q.astype(jnp.float32),
        *(dequantize_slots(x, jnp.float32) for x in slots),
        q_start=start,
    ).astype(dtype)
    assert_close(decode(q, *slots, q_start=start), expected, dtype)
    pages, table = in_pages(slots, 128)
    assert_close(paged(q, *pages, table, q_start=start), expected, dtype)


@newest_only
def test_pages_shared_between_rows_equal_the_reference() -> None:
    q, keys, values, start = inputs(4, 4)
    (k_pages, v_pages), table = in_pages((keys, values), C)
    shared = table.at[:, :3].set(table[0, :3])
    assert_close(
        paged(q, k_pages, v_pages, shared, q_start=start),
        reference_paged_attention(q, k_pages, v_pages, shared, q_start=start),
        "float32",
    )


@newest_only
def test_heads_divided_among_cores_equal_the_reference() -> None:
    q, keys, values, start = inputs(4, 4)
    assert_close(
        decode(q, keys, values, q_start=start, cores=2),
        reference_attention(q, keys, values, q_start=start),
        "float32",
    )


@newest_only
@pytest.mark.parametrize("int8", [False, True])
def test_decoding_is_deterministic_and_ignores_slots_after_the_length(
    int8: bool,
) -> None:
    q, keys, values, start = inputs(4, 4)
    after = np.arange(S)[None, None] > np.asarray(start)[:, None, None]
    clean = quantized(keys, values) if int8 else [keys, values]
    page = 128 if int8 else C
    clean_pages, table = in_pages(clean, page)
    out = decode(q, *clean, q_start=start)
    paged_out = paged(q, *clean_pages, table, q_start=start)
    for garbage in (None, 1e30, np.nan):

        def dirty(slots: Any, garbage: float | None = garbage) -> Any:
            if garbage is None:
                return slots
            if isinstance(slots, QuantizedSlots):
                return slots._replace(scales=jnp.where(after, garbage, slots.scales))
            return jnp.where(after[..., None], garbage, slots)

        slots = [dirty(x) for x in clean]
        assert_equal(decode(q, *slots, q_start=start), out)
        pages, _ = in_pages(slots, page)
        assert_equal(paged(q, *pages, table, q_start=start), paged_out)


@newest_only
def test_table_entries_after_the_length_are_not_used() -> None:
    q, keys, values, start = inputs(4, 4)
    (k_pages, v_pages), table = in_pages((keys, values), C)
    after = np.arange(S // C)[None] * C > np.asarray(start)[:, None]
    assert_equal(
        paged(q, k_pages, v_pages, table, q_start=start),
        paged(q, k_pages, v_pages, jnp.where(after, 10**6, table), q_start=start),
    )


@pytest.mark.parametrize(
    ("queries", "slots", "dtype", "message"),
    [
        (33, 256, "float32", "132 rows"),
        (1, 256, "float16", "float16"),
        (1, 100, "float32", "must be a multiple of 8, got 100"),
    ],
)
def test_calls_that_decoding_does_not_support_are_rejected(
    queries: int, slots: int, dtype: str, message: str
) -> None:
    q, keys, values, start = inputs(
        8, 2, queries=queries, slots=slots, lengths=(64,), dtype=dtype
    )
    with pytest.raises(ValueError, match=message):
        decode(q, keys, values, q_start=start)


def test_int8_slots_over_part_of_a_register_are_rejected() -> None:
    q, keys, values, start = inputs(4, 2, slots=200, lengths=(64,))
    with pytest.raises(ValueError, match=r"must be a multiple of 128 .* got 200"):
        decode(q, *quantized(keys, values), q_start=start)


def compiled(
    kernel: Callable[..., Any],
    topology: str,
    *,
    n: int,
    k: int,
    width: int,
    batch: int,
    queries: int,
    lead: tuple[int, ...],
    dtype: str,
    int8: bool,
) -> tuple[Any, int]:
    """The program, and the number of elements of the keys."""
    sharding = SingleDeviceSharding(tpu_devices(topology)[0])

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    slots: Any = array(dtype, *lead, width)
    if int8:
        slots = QuantizedSlots(array(jnp.int8, *lead, width), array("float32", *lead))
    start = array("int32", batch)
    q = array(dtype, batch, queries, n, width)
    arguments = [q, slots, slots]
    if kernel is paged_attention:
        arguments.append(array("int32", batch, lead[0] // batch))
    program = jax.jit(kernel).lower(*arguments, q_start=start).compile()
    return program, math.prod((*lead, width))


CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
MODELS = ((32, 32, 128, 1, 4096, "bfloat16"), (64, 8, 128, 3, 4096, "bfloat16"))
OTHERS = (
    (32, 8, 64, 1, 2048, "bfloat16"),
    (32, 32, 80, 1, 2048, "bfloat16"),
    (32, 32, 96, 3, 2048, "float32"),
    (8, 1, 128, 1, 2048, "float32"),
)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("topology", "n", "k", "width", "queries", "slots", "dtype"),
    [(chip, *model) for chip in CHIPS for model in MODELS]
    + [(chip, *other) for chip in (CHIPS[0], CHIPS[3]) for other in OTHERS],
)
def test_decoding_compiles_for_tpus_and_copies_no_cache(
    topology: str,
    int8: bool,
    n: int,
    k: int,
    width: int,
    queries: int,
    slots: int,
    dtype: str,
) -> None:
    batch, page = 16, 128
    for kernel, lead in (
        (decode_attention, (batch, k, slots)),
        (paged_attention, (batch * slots // page, k, page)),
    ):
        program, size = compiled(
            kernel,
            topology,
            n=n,
            k=k,
            width=width,
            batch=batch,
            queries=queries,
            lead=lead,
            dtype=dtype,
            int8=int8,
        )
        assert not whole_results(program.as_text(), {size})
        assert program.memory_analysis().temp_size_in_bytes < size // 10


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.parametrize("slots", [1000, 1600])
def test_a_ragged_cache_compiles_for_tpus_and_is_not_copied(slots: int) -> None:
    program, size = compiled(
        decode_attention,
        "v5e:2x2",
        n=32,
        k=32,
        width=128,
        batch=8,
        queries=1,
        lead=(8, 32, slots),
        dtype="bfloat16",
        int8=False,
    )
    assert not whole_results(program.as_text(), {size})


@needs_tpu_compiler
@pytest.mark.tpu_compile
def test_small_pages_compile_for_tpus_and_are_not_copied() -> None:
    program, size = compiled(
        paged_attention,
        "v5e:2x2",
        n=64,
        k=8,
        width=128,
        batch=8,
        queries=1,
        lead=(8 * 256, 8, 16),
        dtype="bfloat16",
        int8=False,
    )
    assert not whole_results(program.as_text(), {size})
