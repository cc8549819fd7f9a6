"""Ring attention over eight devices against the reference on one; on sixteen TPUs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support.programs import needs_tpu_compiler
from support.tolerances import FLASH, FLASH_GRADIENT

from llama_jax.kernels import reference
from llama_jax.kernels.blocks import join, passes_of
from llama_jax.kernels.ring import ring_attention, zigzag_order
from llama_jax.planning.target_devices import tpu_devices

# Compiling what the interpreter makes of a kernel takes the time, not running it.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
B, N, K, H = 2, 4, 2, 16


def inputs(length: int, *, heads: int = N, dtype: str = "float32") -> list[Any]:
    """Random q, k, v, and what comes back for the output."""
    rng = np.random.default_rng(0)
    queries, slots = (B, length, heads, H), (B, K, length, H)
    return [
        jnp.asarray(rng.normal(size=size), dtype)
        for size in (queries, slots, slots, queries)
    ]


def segments(length: int) -> Any:
    """A row of three sequences that end within chunks, and one whose ids repeat."""
    place = np.arange(length) / length
    rows = [np.searchsorted([0.2, 0.7], place), (place * 7).astype(int) % 3]
    return jnp.asarray(np.stack(rows), jnp.int32)


def on_ring(mesh: Mesh, implementation: Any, *, packed: bool, interpret: bool) -> Any:
    """Ring attention over a whole mesh, of arrays that are in its order already."""
    queries, slots = P(None, "sequence"), P(None, None, "sequence")

    def attend(q: Any, k: Any, v: Any, ids: Any = None) -> Any:
        return ring_attention(
            q, k, v,
            axis_name="sequence", segment_ids=ids,
            implementation=implementation, interpret=interpret,
        )  # fmt: skip

    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(queries, slots, slots, queries)[: 3 + packed],
        out_specs=queries,
        check_vma=False,
    )


def differentiated(attend: Any, q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
    out, backward = jax.vjp(attend, q, k, v)
    return out, *backward(do)


def ring(devices: int, implementation: str, arrays: Any, ids: Any) -> Any:
    """Output and gradients, in the order of the sequence."""
    length = arrays[0].shape[1]
    order = zigzag_order(length, devices)
    back = np.argsort(order)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("sequence",))
    attend = on_ring(mesh, implementation, packed=ids is not None, interpret=True)

    def over_devices(q: Any, k: Any, v: Any) -> Any:
        more = () if ids is None else (ids[:, order],)
        out = attend(q[:, order], k[:, :, order], v[:, :, order], *more)
        return out[:, back]

    both = functools.partial(differentiated, over_devices)
    return jax.jit(both, compiler_options=FAST)(*arrays)


@functools.partial(jax.jit, compiler_options=FAST)
def judged(q: Any, k: Any, v: Any, do: Any, ids: Any) -> tuple[Any, ...]:
    """The same by the reference, in float32 and in one piece."""
    exact = (x.astype(jnp.float32) for x in (q, k, v, do))
    attend = functools.partial(reference.attention, segment_ids=ids)
    return differentiated(attend, *exact)


def assert_near(found: Any, wanted: Any, dtype: str = "float32") -> None:
    """Every array, relative to the largest number in it."""
    for name, one, other in zip(("o", "dq", "dk", "dv"), found, wanted, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        near = (FLASH if name == "o" else FLASH_GRADIENT)[dtype]
        np.testing.assert_allclose(
            one, other, rtol=0, atol=near * np.abs(other).max(), err_msg=name
        )


@pytest.mark.parametrize(
    ("devices", "implementation", "heads", "packed", "dtype"),
    [
        (8, "xla", K, False, "float32"),
        (8, "xla", N, True, "float32"),
        (2, "xla", 3 * K, True, "bfloat16"),
        (1, "xla", N, False, "float32"),
        (4, "mosaic_tpu", N, True, "float32"),
        (1, "mosaic_tpu", N, False, "bfloat16"),
    ],
)
def test_a_ring_equals_the_reference_on_one_device(
    devices: int, implementation: str, heads: int, packed: bool, dtype: str
) -> None:
    length = 80
    arrays = inputs(length, heads=heads, dtype=dtype)
    ids = segments(length) if packed else None
    found = ring(devices, implementation, arrays, ids)
    assert_near(found, judged(*arrays, ids), dtype)


def test_a_ring_beside_other_axes_equals_the_reference() -> None:
    length = 16
    order = zigzag_order(length, 2)
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = Mesh(devices, ("data", "sequence", "model"))
    queries, slots = P("data", "sequence", "model"), P("data", "model", "sequence")
    attend = jax.shard_map(
        functools.partial(ring_attention, axis_name="sequence"),
        mesh=mesh,
        in_specs=(queries, slots, slots),
        out_specs=queries,
        check_vma=False,
    )

    def over_devices(q: Any, k: Any, v: Any) -> Any:
        out = attend(q[:, order], k[:, :, order], v[:, :, order])
        return out[:, np.argsort(order)]

    arrays = inputs(length)
    both = functools.partial(differentiated, over_devices)
    found = jax.jit(both, compiler_options=FAST)(*arrays)
    assert_near(found, judged(*arrays, None))


def test_a_query_has_no_gradient_to_later_slots_on_other_devices() -> None:
    length, last = 32, 13
    q, k, v, do = inputs(length)
    do = np.where(np.arange(length)[:, None, None] > last, 0, do)
    _, dq, dk, dv = map(np.asarray, ring(4, "xla", (q, k, v, do), None))
    assert not np.any(dq[:, last + 1 :])
    for grad in (dk, dv):
        assert not np.any(grad[:, :, last + 1 :])
        assert np.all(grad[:, :, : last + 1])


def test_attention_to_parts_of_the_slots_adds_up_to_all_of_it() -> None:
    length, first = 24, 16
    arrays = inputs(length)
    passes = passes_of("xla")
    ids = segments(length)
    # The later slots are further on: queries that come before them see nothing there.
    start = jnp.zeros((B,), jnp.int32)
    places = [(slice(0, first), start), (slice(first, length), start - first)]

    @functools.partial(jax.jit, compiler_options=FAST)
    def in_parts(q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
        q, do = q.swapaxes(1, 2), do.swapaxes(1, 2)
        parts = [(k[:, :, at], v[:, :, at], s, (ids, ids[:, at])) for at, s in places]
        out, lse = functools.reduce(join, (passes.forward(q, *p) for p in parts))
        delta = jnp.sum(out * do, axis=-1)
        grads = [passes.backward(q, *part, lse, delta, do) for part in parts]
        dq = grads[0][0] + grads[1][0]
        dk, dv = (jnp.concatenate([g[i] for g in grads], axis=2) for i in (1, 2))
        return out.swapaxes(1, 2), dq.swapaxes(1, 2), dk, dv

    assert_near(in_parts(*arrays), judged(*arrays, ids))


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_zigzag_order_is_a_permutation_that_pairs_front_and_back(devices: int) -> None:
    length = 2 * devices * 5
    order = zigzag_order(length, devices)
    np.testing.assert_array_equal(order[np.argsort(order)], np.arange(length))
    for device, held in enumerate(order.reshape(devices, 2, 5)):
        np.testing.assert_array_equal(held[0], device * 5 + np.arange(5))
        np.testing.assert_array_equal(held[1], length - (device + 1) * 5 + np.arange(5))


def test_a_sequence_that_cannot_be_cut_is_refused_with_the_next_that_can() -> None:
    sentence = "a sequence of 30 cannot be cut into 2 · 4 chunks; pad it to 32"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        zigzag_order(30, 4)
    assert len(zigzag_order(32, 4)) == 32


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_device_has_the_same_work_at_every_step(devices: int) -> None:
    chunk = 6
    order = zigzag_order(2 * devices * chunk, devices)
    seen = order[:, None] >= order
    held = 2 * chunk
    # Of the queries of one device, and the keys of another.
    work = seen.reshape(devices, held, devices, held).sum((1, 3))
    for step in range(devices):
        here = [work[d, (d - step) % devices] for d in range(devices)]
        assert len(set(here)) == 1
        if step:
            assert here[0] == 2 * chunk**2  # two products without a mask


GIB = 2**30
LENGTH, HEADS, WIDTH = 98_304, 32, 128  # Code Llama's 100,000 tokens; the 7B's heads
ROWS = 4


def held_by_a_chip(topology: str, length: int, *, gradient: bool) -> int:
    """Bytes of the program's arguments, results and all between, by the compiler."""
    mesh = Mesh(np.array(tpu_devices(topology)), ("sequence",))
    attend: Any = on_ring(mesh, "mosaic_tpu", packed=False, interpret=False)

    def array(spec: P, *shape: int) -> Any:
        place = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    q = array(P(None, "sequence"), ROWS, length, HEADS, WIDTH)
    slots = array(P(None, None, "sequence"), ROWS, HEADS, length, WIDTH)
    arguments = [q, slots, slots]
    if gradient:
        attend = functools.partial(differentiated, attend)
        arguments.append(q)
    memory = jax.jit(attend).lower(*arguments).compile().memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
    )


@needs_tpu_compiler
@pytest.mark.tpu_compile
def test_sixteen_chips_hold_what_one_could_not() -> None:
    chip = 16 * GIB  # v5e
    # One chip could hold neither q, k, v, the output and its three gradients
    array = ROWS * LENGTH * HEADS * WIDTH * 2
    assert 7 * array > chip
    # nor the scores of so much as one head of one row.
    assert 2 * math.prod((LENGTH, LENGTH)) > chip
    assert held_by_a_chip("v5e:4x4", LENGTH, gradient=False) < chip
    held = held_by_a_chip("v5e:4x4", LENGTH, gradient=True)
    assert held < chip
    # Each holds as much where there are only four, with a fourth of the sequence.
    fewer = held_by_a_chip("v5e:2x2", LENGTH // 4, gradient=True)
    assert math.isclose(held, fewer, rel_tol=1e-3)


@pytest.mark.parametrize("length", [1, 5])
def test_queries_may_lie_before_or_behind_all_slots_of_a_part(length: int) -> None:
    q, *_ = inputs(length)
    _, k, v, _ = inputs(32)
    for start in ([-70, -2], [10, 200]):
        given = q.swapaxes(1, 2), k, v, jnp.asarray(start, jnp.int32), None
        wanted, seen = passes_of("xla").forward(*given)
        found, lse = passes_of("mosaic_tpu", interpret=True).forward(*given)
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(seen))
        one = np.where(np.isneginf(seen), 0.0, seen)
        other = np.where(np.isneginf(lse), 0.0, lse)
        np.testing.assert_allclose(
            other, one, atol=FLASH["float32"] * np.abs(one).max()
        )
        np.testing.assert_allclose(found, wanted, atol=FLASH["float32"])
