"""The TPU's flash attention, forward and backward, against the reference."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support.tolerances import FLASH, FLASH_GRADIENT

from llama_jax.kernels import reference
from llama_jax.kernels.blocks import passes_of
from llama_jax.kernels.tpu.flash import Blocks, flash_attention
from llama_jax.kernels.tpu.flash_backward import flash_backward
from llama_jax.kernels.tpu.flash_forward import flash_forward
from llama_jax.kernels.tpu.flash_tiles import STRIP, Tiles

# Compiling what the interpreter makes of a kernel takes the time, not running it.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Shape(NamedTuple):
    """Sizes of an attention; S is T where rows are packed."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "float32"


def blocks(q: int, kv: int, window: int, chunk: int = 8192) -> Blocks:
    """The same tiles for both passes."""
    return Blocks(Tiles(q, kv, window), Tiles(q, kv, window), chunk)


# Tiles of every kind, ragged ends of both sides, and little to compute.
SMALL = Shape(B=2, T=40, S=70, N=4, K=2, H=16)
PACKED = SMALL._replace(S=40)
SMALL_BLOCKS = blocks(16, 8, 24)
OTHER = Shape(B=1, T=17, S=33, N=3, K=1, H=8)
OTHER_BLOCKS = blocks(8, 16, 16)


def inputs(shape: Shape, seed: int = 0) -> list[Any]:
    """Random q, k, v, and what comes back for the output."""
    rng = np.random.default_rng(seed)
    queries = shape.B, shape.T, shape.N, shape.H
    slots = shape.B, shape.K, shape.S, shape.H
    return [
        jnp.asarray(rng.normal(size=size), shape.dtype)
        for size in (queries, slots, slots, queries)
    ]


def starts(shape: Shape, seed: int = 0) -> Any:
    """Where the rows' queries begin: the last row's end with the cache."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(shape.S - shape.T + 1, size=shape.B)
    begin[-1] = shape.S - shape.T
    return jnp.asarray(begin, jnp.int32)


def segments(shape: Shape) -> Any:
    """Three sequences to a row, the middle one longer than a few blocks."""
    first = np.where(np.arange(shape.B) % 2, 2 * shape.T // 5, shape.T // 8)
    place = np.arange(shape.T)
    ids = (place >= first[:, None]).astype(np.int32) + (place >= 5 * shape.T // 6)
    return jnp.asarray(ids, jnp.int32)


def differentiated(attend: Any, q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
    out, backward = jax.vjp(attend, q, k, v)
    return out, *backward(do)


@functools.partial(jax.jit, static_argnames="sizes", compiler_options=FAST)
def flash(
    q: Any, k: Any, v: Any, do: Any, start: Any, ids: Any, sizes: Blocks | None
) -> tuple[Any, ...]:
    """The output, and the gradients of q, k and v."""
    attend = functools.partial(
        flash_attention, q_start=start, segment_ids=ids, blocks=sizes, interpret=True
    )
    return differentiated(attend, q, k, v, do)


@functools.partial(jax.jit, compiler_options=FAST)
def judged(q: Any, k: Any, v: Any, do: Any, start: Any, ids: Any) -> tuple[Any, ...]:
    """The same by the reference, in float32."""
    exact = (x.astype(jnp.float32) for x in (q, k, v, do))
    attend = functools.partial(reference.attention, q_start=start, segment_ids=ids)
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


def assert_same(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("shape", "kind", "sizes"),
    [
        (Shape(1, 1100, 1100, 2, 2, 64), "packed", blocks(2 * STRIP, 256, 512)),
        (Shape(2, 200, 200, 4, 2, 80), "packed", blocks(64, 128, 128)),
        (Shape(2, 70, 300, 4, 1, 96, "bfloat16"), "start", blocks(32, 64, 128, 128)),
        (Shape(2, 300, 300, 8, 2, 128, "bfloat16"), "plain", blocks(64, 256, 256)),
        (Shape(2, 1, 300, 4, 2, 128), "start", None),
        (Shape(2, 5, 5, 2, 2, 96), "plain", None),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, Shape) else None,
)
def test_flash_attention_and_its_gradients_equal_the_reference(
    shape: Shape, kind: str, sizes: Blocks | None
) -> None:
    start = starts(shape) if kind == "start" else None
    ids = segments(shape) if kind == "packed" else None
    arrays = inputs(shape)
    found = flash(*arrays, start, ids, sizes)
    assert_near(found, judged(*arrays, start, ids), shape.dtype)


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """Shape, seed, starts and segments: two programs, whatever they are fed."""
    shape = draw(st.sampled_from([SMALL, PACKED]))
    seed = draw(st.integers(0, 2**16))
    rows = range(shape.B)
    if shape is SMALL:
        start = [draw(st.integers(0, shape.S - shape.T)) for _ in rows]
        return shape, seed, jnp.asarray(start, jnp.int32), None
    # Runs of any ids, which need be neither sorted nor different.
    run = st.tuples(st.integers(-2, 2), st.integers(1, shape.T))
    runs = st.lists(run, min_size=shape.T, max_size=shape.T)
    ids = [np.repeat(*np.transpose(draw(runs)))[: shape.T] for _ in rows]
    return shape, seed, None, jnp.asarray(np.stack(ids), jnp.int32)


@settings(max_examples=15)
@given(small_cases())
def test_any_starts_and_any_segments_equal_the_reference(case: Any) -> None:
    shape, seed, start, ids = case
    arrays = inputs(shape, seed)
    found = flash(*arrays, start, ids, SMALL_BLOCKS)
    assert_near(found, judged(*arrays, start, ids))


def tiles_of(shape: Shape, sizes: Tiles, start: int, ids: Any = None) -> list[Any]:
    """Of each tile that holds its full size, what the mask says in its place."""
    mask = np.arange(shape.S) <= start + np.arange(shape.T)[:, None]
    if ids is not None:
        mask &= ids[:, None] == ids
    rows, columns = shape.T // sizes.q, shape.S // sizes.kv
    mask = mask[: rows * sizes.q, : columns * sizes.kv]
    cut = mask.reshape(rows, sizes.q, columns, sizes.kv).swapaxes(1, 2)
    return list(cut.reshape(-1, sizes.q * sizes.kv))


def test_the_small_shapes_have_tiles_of_every_kind() -> None:
    def kinds(tiles: list[Any]) -> tuple[int, int, int]:
        whole = sum(bool(tile.all()) for tile in tiles)
        left_out = sum(not tile.any() for tile in tiles)
        return whole, left_out, len(tiles) - whole - left_out

    sizes = SMALL_BLOCKS.forward
    for start in starts(SMALL):
        assert all(kinds(tiles_of(SMALL, sizes, int(start))))
    of_rows = [
        kinds(tiles_of(PACKED, sizes, 0, np.asarray(i))) for i in segments(PACKED)
    ]
    assert all(of_rows[0])
    behind = kinds(tiles_of(PACKED, sizes, 0))[1]  # of the causal mask alone
    assert of_rows[1][1] > behind
    for shape in (SMALL, PACKED):  # and ragged ends of both sides
        assert shape.T % sizes.q
        assert shape.S % sizes.window


def test_a_backward_pass_in_chunks_equals_one_at_once() -> None:
    arrays, ids = inputs(PACKED), segments(PACKED)
    in_chunks = flash(*arrays, None, ids, SMALL_BLOCKS._replace(chunk=24))
    at_once = flash(*arrays, None, ids, SMALL_BLOCKS)
    assert PACKED.S > SMALL_BLOCKS.forward.window == 24
    assert_near(in_chunks, at_once)
    assert_near(in_chunks, judged(*arrays, None, ids))


@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_give_the_same_bits(packed: bool) -> None:
    shape = PACKED if packed else SMALL
    start, ids = (None, segments(shape)) if packed else (starts(shape), None)
    arrays = inputs(shape)
    once = flash(*arrays, start, ids, SMALL_BLOCKS)
    assert_same(flash(*arrays, start, ids, SMALL_BLOCKS), once)


def test_slots_behind_a_row_never_show() -> None:
    q, k, v, do = inputs(SMALL)
    start = starts(SMALL)
    behind = np.arange(SMALL.S) >= np.asarray(start)[:, None] + SMALL.T
    assert behind.any()
    behind = behind[:, None, :, None]
    dirty = [np.where(behind, garbage, x) for garbage, x in ((1e30, k), (-1e30, v))]
    clean = flash(q, k, v, do, start, None, SMALL_BLOCKS)
    assert_same(flash(q, *dirty, do, start, None, SMALL_BLOCKS), clean)
    for grad in clean[2:]:
        assert not np.any(np.where(behind, grad, 0))


def gradients(*arguments: Any) -> Any:
    return map(np.asarray, flash(*arguments, SMALL_BLOCKS)[1:])


def test_a_query_has_no_gradient_to_later_slots() -> None:
    q, k, v, do = inputs(SMALL)
    start, last = starts(SMALL), 20
    behind = np.arange(SMALL.T) > last
    do = np.where(behind[:, None, None], 0, do)
    dq, dk, dv = gradients(q, k, v, do, start, None)
    assert not np.any(dq[:, behind])
    for row, begin in enumerate(np.asarray(start)):
        for grad in (dk[row], dv[row]):
            assert not np.any(grad[:, begin + last + 1 :])
            assert np.all(grad[:, begin + last])


def test_a_query_has_no_gradient_to_other_segments() -> None:
    q, k, v, do = inputs(PACKED)
    row = np.repeat([4, 1, 4, 3], [11, 9, 13, 7])
    ids = jnp.asarray(np.stack([row, row]), jnp.int32)
    chosen = row == 4
    do = np.where(chosen[:, None, None], do, 0)
    dq, dk, dv = gradients(q, k, v, do, None, ids)
    assert not np.any(dq[:, ~chosen])
    for grad in (dk, dv):
        assert not np.any(grad[:, :, ~chosen])
        assert np.all(grad[:, :, chosen])


def test_queries_before_the_first_slot_see_nothing() -> None:
    q, k, v, _ = inputs(SMALL)
    q, start = q.swapaxes(1, 2), np.asarray([-SMALL.T, -19], np.int32)

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(q: Any, k: Any, v: Any, start: Any) -> tuple[Any, Any]:
        found = flash_forward(
            q, k, v, start, None, tiles=SMALL_BLOCKS.forward, interpret=True
        )
        return found, passes_of("xla").forward(q, k, v, start, None)

    found, wanted = jax.tree.map(np.asarray, both(q, k, v, start))
    out, lse = found
    blind = start[:, None] + np.arange(SMALL.T) < 0
    blind = np.broadcast_to(blind[:, None], lse.shape)
    assert np.all(np.isneginf(lse[blind]))
    assert not np.any(out[blind])
    for one, other in zip(found, wanted, strict=True):
        largest = np.abs(other[~blind]).max()
        np.testing.assert_allclose(
            one[~blind], other[~blind], rtol=0, atol=FLASH["float32"] * largest
        )


def test_very_low_scores_before_a_ragged_end_leave_gradients_finite() -> None:
    """What fills the last block must not count, however little its neighbours do."""
    q = np.full((1, 2, 40, 16), 5, np.float32)
    k, v, do = -q[:, :1], np.ones_like(q[:, :1]), np.ones_like(q)
    start = np.asarray([40], np.int32)  # all of them see all, as in a ring

    @functools.partial(jax.jit, compiler_options=FAST)
    def both(q: Any, k: Any, v: Any, do: Any, start: Any) -> tuple[Any, Any, Any]:
        known = passes_of("xla")
        out, lse = known.forward(q, k, v, start, None)
        rest = q, k, v, start, None, lse, jnp.sum(out * do, axis=-1), do
        found = flash_backward(*rest, tiles=Tiles(16, 24, 24), chunk=48, interpret=True)
        return lse, (out, *found), (out, *known.backward(*rest))

    lse, found, wanted = both(q, k, v, do, start)
    assert np.max(lse) < -90  # exp(90) is more than float32 holds
    assert_near(found, wanted)


def test_the_output_is_the_same_with_and_without_a_derivative() -> None:
    q, k, v, do = inputs(SMALL)
    start = starts(SMALL)
    alone = jax.jit(
        functools.partial(flash_attention, blocks=SMALL_BLOCKS, interpret=True),
        compiler_options=FAST,
    )(q, k, v, q_start=start)
    np.testing.assert_array_equal(
        alone, flash(q, k, v, do, start, None, SMALL_BLOCKS)[0]
    )


def test_vmap_equals_a_loop_of_the_reference() -> None:
    rows = [inputs(OTHER, seed) for seed in range(3)]
    start = np.asarray([[0], [5], [16]], np.int32)
    stacked = [np.stack(x) for x in zip(*rows, strict=True)]

    def one(q: Any, k: Any, v: Any, do: Any, start: Any) -> tuple[Any, ...]:
        settings = {"blocks": OTHER_BLOCKS, "interpret": True}
        attend = functools.partial(flash_attention, q_start=start, **settings)
        return differentiated(attend, q, k, v, do)

    mapped = jax.jit(jax.vmap(one), compiler_options=FAST)(*stacked, start)
    arrays = [np.asarray(x) for x in mapped]
    for at, row in enumerate(rows):
        assert_near([x[at] for x in arrays], judged(*row, start[at], None))


def test_rematerialized_layers_in_a_scan_equal_the_reference() -> None:
    q, k, v, do = inputs(OTHER)
    start, layers = starts(OTHER), jnp.asarray([0.5, 1.0, 2.0])

    def stack(attend: Any, q: Any, k: Any, v: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, weight: Any) -> Any:
            return x + attend(weight * x, k, v, q_start=start), None

        return jax.lax.scan(layer, q, layers)[0]

    def run(attend: Any) -> Any:
        both = functools.partial(differentiated, functools.partial(stack, attend))
        return jax.jit(both, compiler_options=FAST)(q, k, v, do)

    ours = functools.partial(flash_attention, blocks=OTHER_BLOCKS, interpret=True)
    assert_near(run(ours), run(reference.attention))


def test_rows_and_heads_over_eight_devices_equal_one() -> None:
    shape = PACKED._replace(B=4)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    rows = P("data", None, "model")
    slots = P("data", "model")
    ids = segments(shape)

    def attend(q: Any, k: Any, v: Any, ids: Any) -> Any:
        settings = {"blocks": SMALL_BLOCKS, "interpret": True}
        return flash_attention(q, k, v, segment_ids=ids, **settings)

    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(rows, slots, slots, P("data")),
        out_specs=rows,
        check_vma=False,
    )
    arrays = inputs(shape)
    found = jax.jit(
        functools.partial(differentiated, lambda *x: sharded(*x, ids)),
        compiler_options=FAST,
    )(*arrays)
    assert_near(found, judged(*arrays, None, ids))
