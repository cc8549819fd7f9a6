"""Ring attention on eight devices against the reference on one; on sixteen TPUs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support.attention_inputs import (
    assert_close_with_gradient,
    inputs_with_gradient,
    newest_only,
    quick_jit,
    reference_with_gradient,
    with_gradient,
)
from support.programs import needs_tpu_compiler
from support.tolerances import FLASH, FLASH_GRADIENT

from llama_jax.kernels.logsumexp import join
from llama_jax.kernels.partial_attention import passes_of
from llama_jax.kernels.ring import ring_attention, zigzag_order
from llama_jax.planning.target_devices import tpu_devices

B, N, K, H = 2, 4, 2, 16


def inputs(length: int, *, heads: int = N, dtype: str = "float32") -> list[Any]:
    """Random q, k, v, and gradient of the output."""
    return inputs_with_gradient((B, length, heads, K, length, H), dtype)


def segments(length: int) -> Any:
    """A row of three segments that end within chunks, and one whose ids repeat."""
    at = np.arange(length) / length
    rows = [np.searchsorted([0.2, 0.7], at), (at * 7).astype(int) % 3]
    return jnp.asarray(np.stack(rows), jnp.int32)


def on_ring(mesh: Mesh, implementation: Any, *, packed: bool, interpret: bool) -> Any:
    """Ring attention over a mesh, of arrays in its order."""
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


def ring(devices: int, implementation: str, arrays: Any, ids: Any) -> Any:
    """Output and gradients, in sequence order."""
    length = arrays[0].shape[1]
    order = zigzag_order(length, devices)
    back = np.argsort(order)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("sequence",))
    attend = on_ring(mesh, implementation, packed=ids is not None, interpret=True)

    def over_devices(q: Any, k: Any, v: Any) -> Any:
        more = () if ids is None else (ids[:, order],)
        out = attend(q[:, order], k[:, :, order], v[:, :, order], *more)
        return out[:, back]

    return quick_jit(with_gradient(over_devices))(*arrays)


assert_close = functools.partial(
    assert_close_with_gradient, forward=FLASH, backward=FLASH_GRADIENT
)


@pytest.mark.parametrize(
    ("devices", "implementation", "heads", "packed", "dtype"),
    [
        (8, "xla", K, False, "float32"),
        (8, "xla", N, True, "float32"),
        pytest.param(2, "xla", 3 * K, True, "bfloat16", marks=newest_only),
        (1, "xla", N, False, "float32"),
        pytest.param(2, "mosaic_tpu", N, True, "float32", marks=newest_only),
        pytest.param(4, "mosaic_tpu", N, True, "float32", marks=pytest.mark.slow),
        pytest.param(1, "mosaic_tpu", N, False, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_ring_equals_the_reference_on_one_device(
    devices: int, implementation: str, heads: int, packed: bool, dtype: str
) -> None:
    length = 80
    arrays = inputs(length, heads=heads, dtype=dtype)
    ids = segments(length) if packed else None
    actual = ring(devices, implementation, arrays, ids)
    assert_close(actual, reference_with_gradient(*arrays, segment_ids=ids), dtype)


def test_a_ring_on_a_mesh_with_other_axes_equals_the_reference() -> None:
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
    actual = quick_jit(with_gradient(over_devices))(*arrays)
    assert_close(actual, reference_with_gradient(*arrays))


def test_a_query_has_no_gradient_to_later_slots_on_other_devices() -> None:
    length, last = 32, 13
    q, k, v, do = inputs(length)
    do = np.where(np.arange(length)[:, None, None] > last, 0, do)
    _, dq, dk, dv = map(np.asarray, ring(4, "xla", (q, k, v, do), None))
    assert not np.any(dq[:, last + 1 :])
    for grad in (dk, dv):
        assert not np.any(grad[:, :, last + 1 :])
        assert np.all(grad[:, :, : last + 1])


def test_joined_parts_equal_attention_to_all_slots() -> None:
    length, first = 24, 16
    arrays = inputs(length)
    passes = passes_of("xla")
    ids = segments(length)
    # Queries before the second part see nothing there.
    start = jnp.zeros((B,), jnp.int32)
    parts = [(slice(0, first), start), (slice(first, length), start - first)]

    @quick_jit
    def in_parts(q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
        q, do = q.swapaxes(1, 2), do.swapaxes(1, 2)
        slots = [(k[:, :, at], v[:, :, at], s, (ids, ids[:, at])) for at, s in parts]
        out, lse = functools.reduce(join, (passes.forward(q, *s) for s in slots))
        delta = jnp.sum(out * do, axis=-1)
        grads = [passes.backward(q, *s, lse, delta, do) for s in slots]
        dq = grads[0][0] + grads[1][0]
        dk, dv = (jnp.concatenate([g[i] for g in grads], axis=2) for i in (1, 2))
        return out.swapaxes(1, 2), dq.swapaxes(1, 2), dk, dv

    assert_close(in_parts(*arrays), reference_with_gradient(*arrays, segment_ids=ids))


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_zigzag_order_is_a_permutation_that_pairs_front_and_back(devices: int) -> None:
    length = 2 * devices * 5
    order = zigzag_order(length, devices)
    np.testing.assert_array_equal(order[np.argsort(order)], np.arange(length))
    for device, (front, back) in enumerate(order.reshape(devices, 2, 5)):
        np.testing.assert_array_equal(front, device * 5 + np.arange(5))
        np.testing.assert_array_equal(back, length - (device + 1) * 5 + np.arange(5))


def test_a_length_that_cannot_be_cut_is_rejected_with_the_next_that_can() -> None:
    sentence = "a sequence of 30 cannot be cut into 2 · 4 chunks; pad it to 32"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        zigzag_order(30, 4)
    assert len(zigzag_order(32, 4)) == 32


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_device_has_the_same_work_at_every_step(devices: int) -> None:
    chunk = 6
    order = zigzag_order(2 * devices * chunk, devices)
    seen = order[:, None] >= order
    part = 2 * chunk
    # Work of the queries of one device with the keys of another.
    work = seen.reshape(devices, part, devices, part).sum((1, 3))
    for step in range(devices):
        per_device = [work[d, (d - step) % devices] for d in range(devices)]
        assert len(set(per_device)) == 1
        if step:
            assert per_device[0] == 2 * chunk**2  # two products without a mask


GIB = 2**30
LENGTH, HEADS, WIDTH = 98_304, 32, 128  # Code Llama's 100,000 tokens; the 7B's heads
ROWS = 4


def bytes_per_chip(topology: str, length: int, *, gradient: bool) -> int:
    """Bytes of the program's arguments, results and temporaries, by the compiler."""
    mesh = Mesh(np.array(tpu_devices(topology)), ("sequence",))
    attend: Any = on_ring(mesh, "mosaic_tpu", packed=False, interpret=False)

    def array(spec: P, *shape: int) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    q = array(P(None, "sequence"), ROWS, length, HEADS, WIDTH)
    slots = array(P(None, None, "sequence"), ROWS, HEADS, length, WIDTH)
    arguments = [q, slots, slots]
    if gradient:
        attend = with_gradient(attend)
        arguments.append(q)
    memory = jax.jit(attend).lower(*arguments).compile().memory_analysis()
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
    )


@needs_tpu_compiler
@pytest.mark.tpu_compile
def test_sixteen_chips_hold_a_sequence_that_one_chip_could_not() -> None:
    chip = 16 * GIB  # v5e
    # One chip could hold neither q, k, v, the output and its three gradients
    array = ROWS * LENGTH * HEADS * WIDTH * 2
    assert 7 * array > chip
    # nor the scores of one head of one row.
    assert 2 * math.prod((LENGTH, LENGTH)) > chip
    assert bytes_per_chip("v5e:4x4", LENGTH, gradient=False) < chip
    sixteen = bytes_per_chip("v5e:4x4", LENGTH, gradient=True)
    assert sixteen < chip
    # Four chips hold as much each, with a fourth of the sequence.
    four = bytes_per_chip("v5e:2x2", LENGTH // 4, gradient=True)
    assert math.isclose(sixteen, four, rel_tol=1e-3)


@newest_only
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_queries_before_or_after_all_slots_of_a_part_equal_the_reference(
    length: int,
) -> None:
    q, *_ = inputs(length)
    _, k, v, _ = inputs(32)
    kernel, xla = (
        quick_jit(functools.partial(passes.forward, ids=None))
        for passes in (passes_of("mosaic_tpu", interpret=True), passes_of("xla"))
    )
    for start in ([-70, -2], [10, 200]):
        arguments = q.swapaxes(1, 2), k, v, jnp.asarray(start, jnp.int32)
        (out, lse), (expected, expected_lse) = kernel(*arguments), xla(*arguments)
        np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
        one, other = (np.where(np.isneginf(x), 0.0, x) for x in (lse, expected_lse))
        atol = FLASH["float32"] * np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=atol)
        np.testing.assert_allclose(out, expected, atol=FLASH["float32"])
