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
from support.programs import needs_tpu_compiler, whole_results
from support.tolerances import DECODE_BFLOAT16, DECODE_FLOAT32

from llama_jax.kernels import reference
from llama_jax.kernels.quantized_slots import (
    QuantizedSlots,
    dequantize_slots,
    quantize_slots,
)
from llama_jax.kernels.tpu.decode import decode_attention
from llama_jax.kernels.tpu.paged import paged_attention
from llama_jax.planning.target_devices import tpu_devices

S, C = 384, 64
# One slot, the borders of the 128-slot blocks that the tests ask for, and a full row.
LENGTHS = (3, 100, 127, 128, 129, 256, 300, 384)
TOLERANCES = {"float32": DECODE_FLOAT32, "bfloat16": DECODE_BFLOAT16}

# Compiling what the interpreter makes of a kernel takes the time, not running it.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
decode = jax.jit(
    functools.partial(decode_attention, interpret=True, block_slots=128),
    static_argnames="cores",
    compiler_options=FAST,
)
paged = jax.jit(
    functools.partial(paged_attention, interpret=True, block_slots=128),
    compiler_options=FAST,
)
reference_attention = jax.jit(reference.attention)


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
    """Random q, k and v, and where each row's queries begin."""
    rng = np.random.default_rng(0)
    batch = len(lengths)
    cache = batch, k, slots, width
    q, keys, values = (
        jnp.asarray(rng.normal(size=shape), dtype)
        for shape in ((batch, queries, n, width), cache, cache)
    )
    return q, keys, values, jnp.asarray(lengths, jnp.int32) - queries


def in_pages(cache: Any, page: int) -> tuple[Any, Any]:
    """The same slots in pages of random order, and the table of where they are."""
    leaves = jax.tree.leaves(cache)
    batch, _, slots = leaves[0].shape[:3]
    order = np.random.default_rng(1).permutation(batch * (slots // page))

    def cut(part: Any) -> Any:
        pages = part.reshape(*part.shape[:2], -1, page, *part.shape[3:])
        pages = jnp.moveaxis(pages, 2, 1)
        return pages.reshape(-1, *pages.shape[2:])[order]

    table = np.argsort(order).reshape(batch, -1)
    return jax.tree.map(cut, cache), jnp.asarray(table, jnp.int32)


def assert_near(found: Any, wanted: Any, dtype: str) -> None:
    assert found.dtype == wanted.dtype == dtype
    assert found.shape == wanted.shape
    np.testing.assert_allclose(
        np.asarray(found, np.float64),
        np.asarray(wanted, np.float64),
        rtol=TOLERANCES[dtype],
        atol=TOLERANCES[dtype],
    )


@pytest.mark.parametrize(
    ("n", "k", "queries", "dtype"),
    [
        (4, 4, 1, "float32"),
        (4, 4, 3, "bfloat16"),
        (16, 2, 1, "bfloat16"),
        (16, 2, 3, "float32"),
        (8, 1, 2, "float32"),
        (6, 2, 1, "bfloat16"),
    ],
)
def test_decoding_equals_the_reference(
    n: int, k: int, queries: int, dtype: str
) -> None:
    q, keys, values, start = inputs(n, k, queries=queries, dtype=dtype)
    assert_near(
        decode(q, keys, values, q_start=start),
        reference_attention(q, keys, values, q_start=start),
        dtype,
    )


@pytest.mark.parametrize(
    ("n", "k", "queries", "dtype"),
    [(4, 4, 1, "float32"), (16, 2, 3, "float32"), (6, 2, 1, "bfloat16")],
)
def test_decoding_over_pages_equals_the_reference(
    n: int, k: int, queries: int, dtype: str
) -> None:
    q, keys, values, start = inputs(n, k, queries=queries, dtype=dtype)
    (k_pages, v_pages), table = in_pages((keys, values), C)
    assert_near(
        paged(q, k_pages, v_pages, table, q_start=start),
        reference_attention(q, keys, values, q_start=start),
        dtype,
    )


@pytest.mark.parametrize(
    ("width", "dtype"), [(64, "bfloat16"), (80, "float32"), (96, "bfloat16")]
)
def test_decoding_with_other_head_dims_equals_the_reference(
    width: int, dtype: str
) -> None:
    q, keys, values, start = inputs(4, 2, width=width, queries=2, dtype=dtype)
    wanted = reference_attention(q, keys, values, q_start=start)
    assert_near(decode(q, keys, values, q_start=start), wanted, dtype)


def test_pages_of_another_head_dim_equal_the_reference() -> None:
    q, keys, values, start = inputs(4, 2, width=80, queries=2)
    wanted = reference_attention(q, keys, values, q_start=start)
    (k_pages, v_pages), table = in_pages((keys, values), 128)
    assert_near(paged(q, k_pages, v_pages, table, q_start=start), wanted, "float32")


@pytest.mark.parametrize("slots", [24, 1000])
def test_a_cache_that_is_no_multiple_of_the_block_equals_the_reference(
    slots: int,
) -> None:
    lengths = tuple(sorted({1, slots // 2, slots - 1, slots}))
    q, keys, values, start = inputs(4, 2, slots=slots, lengths=lengths)
    assert_near(
        decode(q, keys, values, q_start=start),
        reference_attention(q, keys, values, q_start=start),
        "float32",
    )


def test_many_rows_of_one_slot_equal_the_reference() -> None:
    q, keys, values, start = inputs(4, 4, lengths=(1,) * 8)
    assert_near(
        decode(q, keys, values, q_start=start),
        reference_attention(q, keys, values, q_start=start),
        "float32",
    )


@pytest.mark.parametrize(
    ("n", "k", "width", "queries", "dtype"),
    [
        (4, 4, 128, 1, "float32"),
        (16, 2, 128, 2, "bfloat16"),
        (4, 4, 64, 2, "float32"),
    ],
)
def test_eight_bits_equal_the_reference_on_their_numbers(
    n: int, k: int, width: int, queries: int, dtype: str
) -> None:
    q, keys, values, start = inputs(n, k, width=width, queries=queries, dtype=dtype)
    held = quantize_slots(keys), quantize_slots(values)
    # In the queries' dtype the numbers meant would be rounded once more.
    wanted = reference_attention(
        q.astype(jnp.float32),
        *(dequantize_slots(x, jnp.float32) for x in held),
        q_start=start,
    ).astype(dtype)
    assert_near(decode(q, *held, q_start=start), wanted, dtype)
    pages, table = in_pages(held, 128)
    assert_near(paged(q, *pages, table, q_start=start), wanted, dtype)


def test_pages_shared_between_rows_equal_the_reference() -> None:
    q, keys, values, start = inputs(4, 4)
    (k_pages, v_pages), table = in_pages((keys, values), C)
    shared = table.at[:, :3].set(table[0, :3])
    assert_near(
        paged(q, k_pages, v_pages, shared, q_start=start),
        reference.paged_attention(q, k_pages, v_pages, shared, q_start=start),
        "float32",
    )


def test_heads_divided_among_cores_equal_the_reference() -> None:
    q, keys, values, start = inputs(4, 4)
    assert_near(
        decode(q, keys, values, q_start=start, cores=2),
        reference_attention(q, keys, values, q_start=start),
        "float32",
    )


@pytest.mark.parametrize("garbage", [1e30, np.nan])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_slots_behind_the_length_are_never_looked_at(
    garbage: float, eight_bits: bool
) -> None:
    q, keys, values, start = inputs(4, 4)
    behind = np.arange(S) > np.asarray(start)[:, None, None]

    def dirty(slots: Any) -> Any:
        if isinstance(slots, QuantizedSlots):
            return slots._replace(scales=jnp.where(behind, garbage, slots.scales))
        return jnp.where(behind[..., None], garbage, slots)

    clean: tuple[Any, Any] = (keys, values)
    if eight_bits:
        clean = quantize_slots(keys), quantize_slots(values)
    soiled = tuple(map(dirty, clean))
    np.testing.assert_array_equal(
        decode(q, *soiled, q_start=start), decode(q, *clean, q_start=start)
    )
    page = 128 if eight_bits else C
    clean, table = in_pages(clean, page)
    soiled, _ = in_pages(soiled, page)
    np.testing.assert_array_equal(
        paged(q, *soiled, table, q_start=start), paged(q, *clean, table, q_start=start)
    )


def test_table_entries_behind_the_length_are_never_looked_up() -> None:
    q, keys, values, start = inputs(4, 4)
    (k_pages, v_pages), table = in_pages((keys, values), C)
    behind = np.arange(S // C) * C > np.asarray(start)[:, None]
    np.testing.assert_array_equal(
        paged(q, k_pages, v_pages, table, q_start=start),
        paged(q, k_pages, v_pages, jnp.where(behind, 10**6, table), q_start=start),
    )


def test_decoding_twice_gives_the_same_bits() -> None:
    q, keys, values, start = inputs(4, 4)
    (k_pages, v_pages), table = in_pages((keys, values), C)
    np.testing.assert_array_equal(
        decode(q, keys, values, q_start=start), decode(q, keys, values, q_start=start)
    )
    once = paged(q, k_pages, v_pages, table, q_start=start)
    np.testing.assert_array_equal(
        once, paged(q, k_pages, v_pages, table, q_start=start)
    )


@pytest.mark.parametrize(
    ("queries", "slots", "dtype", "reason"),
    [
        (33, 256, "float32", "132 rows"),
        (1, 256, "float16", "float16"),
        (1, 100, "float32", "100 slots are no multiple of 8"),
    ],
)
def test_what_decoding_cannot_do_is_refused(
    queries: int, slots: int, dtype: str, reason: str
) -> None:
    q, keys, values, start = inputs(
        8, 2, queries=queries, slots=slots, lengths=(64,), dtype=dtype
    )
    with pytest.raises(ValueError, match=reason):
        decode(q, keys, values, q_start=start)


def test_eight_bits_over_part_of_a_register_are_refused() -> None:
    q, keys, values, start = inputs(4, 2, slots=200, lengths=(64,))
    with pytest.raises(ValueError, match="200 slots are no multiple of 128"):
        decode(q, quantize_slots(keys), quantize_slots(values), q_start=start)


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
    eight_bits: bool,
) -> tuple[Any, int]:
    """The program, and how many elements the keys have."""
    place = SingleDeviceSharding(tpu_devices(topology)[0])

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    slots: Any = array(dtype, *lead, width)
    if eight_bits:
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
@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize(
    ("topology", "n", "k", "width", "queries", "slots", "dtype"),
    [(chip, *model) for chip in CHIPS for model in MODELS]
    + [(chip, *other) for chip in (CHIPS[0], CHIPS[3]) for other in OTHERS],
)
def test_decoding_compiles_for_tpus_and_copies_no_cache(
    topology: str,
    eight_bits: bool,
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
            eight_bits=eight_bits,
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
        eight_bits=False,
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
        eight_bits=False,
    )
    assert not whole_results(program.as_text(), {size})
