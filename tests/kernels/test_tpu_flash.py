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
from support.attention_inputs import (
    assert_close_with_gradient,
    assert_equal,
    inputs_with_gradient,
    newest_only,
    quick_jit,
    reference_with_gradient,
    with_gradient,
)
from support.tolerances import FLASH, FLASH_GRADIENT

from llama_jax.kernels import reference
from llama_jax.kernels.partial_attention import passes_of
from llama_jax.kernels.tpu.flash import Blocks, flash_attention
from llama_jax.kernels.tpu.flash_backward import flash_backward
from llama_jax.kernels.tpu.flash_forward import flash_forward
from llama_jax.kernels.tpu.flash_tiles import STRIP, Tiles


class Shape(NamedTuple):
    """Sizes of a call; S is T for packed rows."""

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


# Tiles of every kind, partial blocks on both sides, and little to compute.
SMALL = Shape(B=2, T=40, S=70, N=4, K=2, H=16)
PACKED = SMALL._replace(S=40)
SMALL_BLOCKS = blocks(16, 8, 24)
OTHER = Shape(B=1, T=17, S=33, N=3, K=1, H=8)
OTHER_BLOCKS = blocks(8, 16, 16)


def inputs(shape: Shape, seed: int = 0) -> list[Any]:
    """Random q, k, v, and gradient of the output."""
    b, t, s, n, k, h, dtype = shape
    return inputs_with_gradient((b, t, n, k, s, h), dtype, seed)


def starts(shape: Shape, seed: int = 0) -> Any:
    """Random first slots; the queries of the last row end with the cache."""
    rng = np.random.default_rng(seed)
    begin = rng.integers(shape.S - shape.T + 1, size=shape.B)
    begin[-1] = shape.S - shape.T
    return jnp.asarray(begin, jnp.int32)


def segments(shape: Shape) -> Any:
    """Three segments per row, the middle one longer than a few blocks."""
    first = np.where(np.arange(shape.B) % 2, 2 * shape.T // 5, shape.T // 8)
    at = np.arange(shape.T)[None]
    ids = (at >= first[:, None]).astype(np.int32) + (at >= 5 * shape.T // 6)
    return jnp.asarray(ids, jnp.int32)


@functools.partial(quick_jit, static_argnames="sizes")
def flash(
    q: Any, k: Any, v: Any, do: Any, start: Any, ids: Any, sizes: Blocks | None
) -> tuple[Any, ...]:
    """The output, and the gradients of q, k and v."""
    attend = functools.partial(
        flash_attention, q_start=start, segment_ids=ids, blocks=sizes, interpret=True
    )
    return with_gradient(attend)(q, k, v, do)


def expected(*arrays: Any) -> tuple[Any, ...]:
    """The same by the reference, in float32."""
    *inputs, start, ids = arrays
    return reference_with_gradient(*inputs, q_start=start, segment_ids=ids)


assert_close = functools.partial(
    assert_close_with_gradient, forward=FLASH, backward=FLASH_GRADIENT
)


@pytest.mark.parametrize(
    ("shape", "kind", "sizes"),
    [
        pytest.param(
            *(Shape(1, 1100, 1100, 2, 2, 64), "packed", blocks(2 * STRIP, 256, 512)),
            marks=newest_only,
        ),
        (Shape(2, 200, 200, 4, 2, 80), "packed", blocks(64, 128, 128)),
        pytest.param(
            *(Shape(2, 70, 300, 4, 1, 96, "bfloat16"), "start"),
            *(blocks(32, 64, 128, 128),),
            marks=newest_only,
        ),
        pytest.param(
            *(Shape(2, 300, 300, 8, 2, 128, "bfloat16"), "plain"),
            *(blocks(64, 256, 256),),
            marks=pytest.mark.slow,
        ),
        pytest.param(*(Shape(2, 1, 300, 4, 2, 128), "start", None), marks=newest_only),
        pytest.param(*(Shape(2, 5, 5, 2, 2, 96), "plain", None), marks=newest_only),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, Shape) else None,
)
def test_flash_attention_and_its_gradients_equal_the_reference(
    shape: Shape, kind: str, sizes: Blocks | None
) -> None:
    start = starts(shape) if kind == "start" else None
    ids = segments(shape) if kind == "packed" else None
    arrays = inputs(shape)
    actual = flash(*arrays, start, ids, sizes)
    assert_close(actual, expected(*arrays, start, ids), shape.dtype)


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """Shape, seed, starts and segments, for two compiled programs."""
    shape = draw(st.sampled_from([SMALL, PACKED]))
    seed = draw(st.integers(0, 2**16))
    rows = range(shape.B)
    if shape is SMALL:
        start = [draw(st.integers(0, shape.S - shape.T)) for _ in rows]
        return shape, seed, jnp.asarray(start, jnp.int32), None
    # Runs of any ids, neither sorted nor unique.
    run = st.tuples(st.integers(-2, 2), st.integers(1, shape.T))
    runs = st.lists(run, min_size=shape.T, max_size=shape.T)
    ids = [np.repeat(*np.transpose(draw(runs)))[: shape.T] for _ in rows]
    return shape, seed, None, jnp.asarray(np.stack(ids), jnp.int32)


@newest_only
@settings(max_examples=15)
@given(small_cases())
def test_any_starts_and_any_segments_equal_the_reference(case: Any) -> None:
    shape, seed, start, ids = case
    arrays = inputs(shape, seed)
    actual = flash(*arrays, start, ids, SMALL_BLOCKS)
    assert_close(actual, expected(*arrays, start, ids))


def tiles_of(shape: Shape, sizes: Tiles, start: int, ids: Any = None) -> list[Any]:
    """The mask of every complete tile."""
    mask = np.arange(shape.S)[None] <= start + np.arange(shape.T)[:, None]
    if ids is not None:
        mask &= ids[:, None] == ids[None]
    rows, columns = shape.T // sizes.q, shape.S // sizes.kv
    mask = mask[: rows * sizes.q, : columns * sizes.kv]
    cut = mask.reshape(rows, sizes.q, columns, sizes.kv).swapaxes(1, 2)
    return list(cut.reshape(-1, sizes.q * sizes.kv))


def test_the_small_shapes_have_tiles_of_every_kind() -> None:
    def kinds(tiles: list[Any]) -> tuple[int, int, int]:
        whole = sum(bool(tile.all()) for tile in tiles)
        skipped = sum(not tile.any() for tile in tiles)
        return whole, skipped, len(tiles) - whole - skipped

    sizes = SMALL_BLOCKS.forward
    for start in starts(SMALL):
        assert all(kinds(tiles_of(SMALL, sizes, int(start))))
    packed = [
        kinds(tiles_of(PACKED, sizes, 0, np.asarray(i))) for i in segments(PACKED)
    ]
    assert all(packed[0])
    skipped_by_causal_mask = kinds(tiles_of(PACKED, sizes, 0))[1]
    assert packed[1][1] > skipped_by_causal_mask
    for shape in (SMALL, PACKED):  # and partial blocks on both sides
        assert shape.T % sizes.q
        assert shape.S % sizes.window


@newest_only
def test_a_backward_pass_in_chunks_equals_one_chunk() -> None:
    arrays, ids = inputs(PACKED), segments(PACKED)
    in_chunks = flash(*arrays, None, ids, SMALL_BLOCKS._replace(chunk=24))
    at_once = flash(*arrays, None, ids, SMALL_BLOCKS)
    assert PACKED.S > SMALL_BLOCKS.forward.window == 24
    assert_close(in_chunks, at_once)
    assert_close(in_chunks, expected(*arrays, None, ids))


@newest_only
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_is_deterministic(packed: bool) -> None:
    shape = PACKED if packed else SMALL
    start, ids = (None, segments(shape)) if packed else (starts(shape), None)
    arrays = inputs(shape)
    once = flash(*arrays, start, ids, SMALL_BLOCKS)
    assert_equal(flash(*arrays, start, ids, SMALL_BLOCKS), once)


@newest_only
def test_slots_after_the_last_query_are_ignored() -> None:
    q, k, v, do = inputs(SMALL)
    start = starts(SMALL)
    after = np.arange(SMALL.S)[None] >= np.asarray(start)[:, None] + SMALL.T
    assert after.any()
    after = after[:, None, :, None]
    dirty = [np.where(after, garbage, x) for garbage, x in ((1e30, k), (-1e30, v))]
    clean = flash(q, k, v, do, start, None, SMALL_BLOCKS)
    assert_equal(flash(q, *dirty, do, start, None, SMALL_BLOCKS), clean)
    for grad in clean[2:]:
        assert not np.any(np.where(after, grad, 0))


def gradients(*arguments: Any) -> Any:
    return map(np.asarray, flash(*arguments, SMALL_BLOCKS)[1:])


@newest_only
def test_a_query_has_no_gradient_to_later_slots() -> None:
    q, k, v, do = inputs(SMALL)
    start, last = starts(SMALL), 20
    after = np.arange(SMALL.T) > last
    do = np.where(after[None, :, None, None], 0, do)
    dq, dk, dv = gradients(q, k, v, do, start, None)
    assert not np.any(dq[:, after])
    for row, begin in enumerate(np.asarray(start)):
        for grad in (dk[row], dv[row]):
            assert not np.any(grad[:, begin + last + 1 :])
            assert np.all(grad[:, begin + last])


@newest_only
def test_a_query_has_no_gradient_to_other_segments() -> None:
    q, k, v, do = inputs(PACKED)
    row = np.repeat([4, 1, 4, 3], [11, 9, 13, 7])
    ids = jnp.asarray(np.stack([row, row]), jnp.int32)
    selected = row == 4
    do = np.where(selected[None, :, None, None], do, 0)
    dq, dk, dv = gradients(q, k, v, do, None, ids)
    assert not np.any(dq[:, ~selected])
    for grad in (dk, dv):
        assert not np.any(grad[:, :, ~selected])
        assert np.all(grad[:, :, selected])


@newest_only
def test_queries_before_the_first_slot_attend_to_nothing() -> None:
    q, k, v, _ = inputs(SMALL)
    q, start = q.swapaxes(1, 2), np.asarray([-SMALL.T, -19], np.int32)

    @quick_jit
    def both(q: Any, k: Any, v: Any, start: Any) -> tuple[Any, Any]:
        kernel = flash_forward(
            q, k, v, start, None, tiles=SMALL_BLOCKS.forward, interpret=True
        )
        return kernel, passes_of("xla").forward(q, k, v, start, None)

    kernel, xla = jax.tree.map(np.asarray, both(q, k, v, start))
    out, lse = kernel
    blind = start[:, None] + np.arange(SMALL.T)[None] < 0
    blind = np.broadcast_to(blind[:, None], lse.shape)
    assert np.all(np.isneginf(lse[blind]))
    assert not np.any(out[blind])
    for one, other in zip(kernel, xla, strict=True):
        largest = np.abs(other[~blind]).max()
        np.testing.assert_allclose(
            one[~blind], other[~blind], rtol=0, atol=FLASH["float32"] * largest
        )


@newest_only
def test_very_low_scores_before_a_partial_block_have_finite_gradients() -> None:
    """The padding of the last block has no weight, however small that of the rest."""
    q = np.full((1, 2, 40, 16), 5, np.float32)
    k, v, do = -q[:, :1], np.ones_like(q[:, :1]), np.ones_like(q)
    start = np.asarray([40], np.int32)  # every query sees every slot, as in a ring

    @quick_jit
    def both(q: Any, k: Any, v: Any, do: Any, start: Any) -> tuple[Any, Any, Any]:
        xla = passes_of("xla")
        out, lse = xla.forward(q, k, v, start, None)
        rest = q, k, v, start, None, lse, jnp.sum(out * do, axis=-1), do
        grads = flash_backward(*rest, tiles=Tiles(16, 24, 24), chunk=48, interpret=True)
        return lse, (out, *grads), (out, *xla.backward(*rest))

    lse, kernel, xla = both(q, k, v, do, start)
    assert np.max(lse) < -90  # exp(90) overflows float32
    assert_close(kernel, xla)


@newest_only
def test_the_output_is_the_same_with_and_without_a_gradient() -> None:
    q, k, v, do = inputs(SMALL)
    start = starts(SMALL)
    alone = quick_jit(
        functools.partial(flash_attention, blocks=SMALL_BLOCKS, interpret=True)
    )(q, k, v, q_start=start)
    assert_equal(alone, flash(q, k, v, do, start, None, SMALL_BLOCKS)[0])


@newest_only
def test_vmap_equals_a_loop_of_the_reference() -> None:
    rows = [inputs(OTHER, seed) for seed in range(3)]
    start = np.asarray([[0], [5], [16]], np.int32)
    stacked = [jnp.stack(x) for x in zip(*rows, strict=True)]

    def one(q: Any, k: Any, v: Any, do: Any, start: Any) -> tuple[Any, ...]:
        settings = {"blocks": OTHER_BLOCKS, "interpret": True}
        attend = functools.partial(flash_attention, q_start=start, **settings)
        return with_gradient(attend)(q, k, v, do)

    mapped = quick_jit(jax.vmap(one))(*stacked, start)
    arrays = [np.asarray(x) for x in mapped]
    for at, row in enumerate(rows):
        assert_close([x[at] for x in arrays], expected(*row, start[at], None))


@newest_only
def test_rematerialized_layers_in_a_scan_equal_the_reference() -> None:
    q, k, v, do = inputs(OTHER)
    start, layers = starts(OTHER), jnp.asarray([0.5, 1.0, 2.0])

    def stack(attend: Any, q: Any, k: Any, v: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, weight: Any) -> Any:
            return x + attend(weight * x, k, v, q_start=start), None

        return jax.lax.scan(layer, q, layers)[0]

    def run(attend: Any) -> Any:
        return quick_jit(with_gradient(functools.partial(stack, attend)))(q, k, v, do)

    kernel = functools.partial(flash_attention, blocks=OTHER_BLOCKS, interpret=True)
    assert_close(run(kernel), run(reference.attention))


@newest_only
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
    actual = quick_jit(with_gradient(lambda *x: sharded(*x, ids)))(*arrays)
    assert_close(actual, expected(*arrays, None, ids))
