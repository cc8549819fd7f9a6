"""The GPU kernels: numbers in interpret mode, programs by the GPU's compilers."""

import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_inputs import (
    arrays,
    assert_equal,
    inputs_with_gradient,
    newest_only,
    no_bfloat16_product,
    quantized,
    wide,
    with_gradient,
)
from support.gpus import (
    assert_close,
    assert_equals_reference,
    compiled,
    h100,
    lowered,
    pages_of,
    program,
    run,
)

from llama_jax.errors import MeshError
from llama_jax.kernels import reference
from llama_jax.kernels.gpu import (
    cudnn,
    decode_triton,
    flash_mosaic,
    flash_triton,
    triton_tiles,
)
from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.planning import target_devices

Shape = jax.ShapeDtypeStruct

small = functools.partial(
    flash_triton.flash_attention, block_q=16, block_kv=16, interpret=True
)
decode = functools.partial(decode_triton.decode_attention, interpret=True)
paged = functools.partial(decode_triton.paged_attention, interpret=True)
hopper = functools.partial(flash_mosaic.flash_attention, block_kv=64, interpret=True)
needs_simulator = pytest.mark.skipif(
    not hasattr(flash_mosaic.plgpu, "InterpretGPUParams"),
    reason="this jax has no interpret mode for Mosaic GPU",
)

# A row with a segment in two pieces, and a row of one segment.
SEGMENTS = jnp.asarray([[7] * 11 + [1] * 19 + [7] * 10, [3] * 40], jnp.int32)


def starts(*slots: int) -> Any:
    return jnp.asarray(slots, jnp.int32)


@pytest.mark.parametrize(
    ("shape", "dtype", "settings"),
    [
        ((2, 37, 4, 2, 37, 64), "float32", {}),
        pytest.param(
            *((2, 18, 2, 2, 50, 80), "float32", {"q_start": starts(0, 32)}),
            marks=newest_only,
        ),
        ((2, 40, 4, 1, 40, 96), "bfloat16", {"segment_ids": SEGMENTS}),
        pytest.param(
            *((2, 1, 4, 2, 30, 128), "bfloat16", {"q_start": starts(0, 29)}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "over a cache", "packed", "one query"],
)
def test_flash_and_its_gradient_equal_the_reference(
    shape: Any, dtype: str, settings: dict[str, Any]
) -> None:
    assert_equals_reference(small, shape, dtype=dtype, **settings)


@newest_only
def test_flash_is_deterministic_and_ignores_slots_after_the_last_query() -> None:
    inputs = inputs_with_gradient((2, 5, 2, 1, 40, 16))
    q, k, v, d_out = inputs
    first = starts(3, 20)
    both = program(with_gradient(small, q_start=first), *inputs)
    after = (np.arange(40) >= np.asarray(first)[:, None] + 5)[:, None, :, None]
    clean = both(*inputs)
    dirty = (jnp.where(after, jnp.nan, x) for x in (k, v))
    assert_equal(both(q, *dirty, d_out), clean)
    assert all(not np.where(after, grad, 0).any() for grad in clean[2:])


def test_blocks_without_a_common_segment_are_skipped() -> None:
    ids = jnp.asarray([[0] * 16 + [1] * 32 + [0] * 16], jnp.int32)
    edges = triton_tiles.edges(ids, triton_tiles.Tiles(16, 16, 4, 2))
    np.testing.assert_array_equal(edges.first_kv, [[0, 1, 1, 0]])
    np.testing.assert_array_equal(edges.last_q, [[4, 3, 3, 4]])


@pytest.mark.parametrize(
    ("shape", "dtype", "first", "int8"),
    [
        ((3, 1, 8, 2, 200, 64), "float32", (0, 70, 199), False),
        pytest.param(
            (2, 3, 4, 4, 100, 80), "bfloat16", (0, 97), False, marks=newest_only
        ),
        pytest.param((1, 20, 8, 2, 70, 96), "float32", (50,), False, marks=newest_only),
        pytest.param(
            (2, 1, 8, 1, 200, 128), "bfloat16", (5, 197), True, marks=newest_only
        ),
    ],
    ids=str,
)
def test_decoding_equals_the_reference(
    shape: Any, dtype: str, first: Any, int8: bool
) -> None:
    b, t, n, heads, s, h = shape
    q, *slots = arrays((b, t, n, h), *[(b, heads, s, h)] * 2, dtype=dtype)
    if int8:
        slots = quantized(*slots)
    attend = functools.partial(decode, q_start=starts(*first), block_kv=32, splits=3)
    out = run(attend, q, *slots)
    assert out.dtype == dtype
    exact = functools.partial(reference.attention, q_start=starts(*first))
    assert_close(out, run(exact, *wide((q, *slots))))


@newest_only
@pytest.mark.parametrize(("size", "int8"), [(16, False), (12, True)])
def test_paged_decoding_equals_the_reference(size: int, int8: bool) -> None:
    k, v, table = pages_of(2, 2, size, 6, 64, "float32")
    (q,) = arrays((2, 1, 8, 64))
    if int8:
        k, v = quantized(k, v)
    first = starts(4, 6 * size - 1)
    attend = functools.partial(paged, q_start=first, block_kv=32, splits=2)
    exact = functools.partial(reference.paged_attention, q_start=first)
    inputs = q, k, v, table
    assert_close(run(attend, *inputs), run(exact, *inputs))


@newest_only
def test_decoding_a_row_ignores_later_slots_and_other_rows() -> None:
    q, k, v = arrays((2, 1, 2, 16), *[(2, 1, 90, 16)] * 2)

    def step(q: Any, k: Any, v: Any, first: Any) -> Any:
        return decode(q, k, v, q_start=first, block_kv=16, splits=3)

    attend = program(step, q, k, v, starts(40, 60))
    clean = attend(q, k, v, starts(40, 60))
    after = (np.arange(90) > 40)[:, None]
    k, v = (jnp.where(after, jnp.nan, x).at[1].set(7) for x in (k, v))
    dirty = attend(q, k, v, starts(40, 3))
    np.testing.assert_array_equal(clean[0], dirty[0])


@needs_simulator
@pytest.mark.parametrize(
    ("shape", "dtype", "settings"),
    [
        ((2, 20, 1, 1, 200, 128), "float16", {"q_start": starts(100, 10)}),
        ((2, 40, 1, 1, 40, 96), "bfloat16", {"segment_ids": SEGMENTS}),
    ],
    ids=["over a cache", "packed"],
)
def test_hoppers_flash_equals_the_reference(
    shape: Any, dtype: str, settings: dict[str, Any]
) -> None:
    b, t, n, heads, s, h = shape
    inputs = arrays((b, t, n, h), *[(b, heads, s, h)] * 2, dtype=dtype)
    attend = program(functools.partial(hopper, **settings), *inputs)
    out = attend(*inputs)
    assert out.dtype == dtype
    exact = functools.partial(reference.attention, **settings)
    assert_close(out, run(exact, *wide(inputs)))
    assert_equal(attend(*inputs), out)


@needs_simulator
def test_the_gradient_of_hoppers_flash_equals_the_reference() -> None:
    shape = 1, 140, 2, 1, 140, 64
    assert_equals_reference(hopper, shape, dtype="bfloat16")


@pytest.mark.parametrize(
    ("queries", "settings"),
    [
        (6, {}),
        (1, {"q_start": starts(0, 3)}),
        (1, {}),
        (3, {"q_start": starts(0, 3)}),
        (6, {"segment_ids": starts(0, 0, 1, 1, 1, 2)[None].repeat(2, 0)}),
    ],
    ids=["causal", "one query", "one slot", "over a cache", "packed"],
)
@no_bfloat16_product
def test_the_arguments_of_cudnn_describe_the_reference(
    queries: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA takes the same arguments, and needs no cuDNN."""
    attention = jax.nn.dot_product_attention

    def by_xla(*arguments: Any, implementation: str, **others: Any) -> Any:
        assert implementation == "cudnn"
        return attention(*arguments, **others, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    inputs = arrays((2, queries, 4, 16), *[(2, 2, 6, 16)] * 2, dtype="bfloat16")
    attend = functools.partial(cudnn.cudnn_attention, **settings)
    exact = functools.partial(reference.attention, **settings)
    assert_close(run(attend, *inputs), run(exact, *wide(inputs)))


@pytest.mark.parametrize(
    ("queries", "settings", "calls", "mask"),
    [
        (64, {}, ["fmhaSoftmax", "fmhaSoftmaxBackward"], "CAUSAL"),
        (1, {"q_start": starts(0, 3)}, ["fmhaSoftmax"], "PADDING"),
        (
            *(4, {"q_start": starts(0, 3)}),
            *(["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"], "NO_MASK"),
        ),
    ],
    ids=["causal", "one query", "over a cache"],
)
def test_cudnn_is_called_forward_and_backward(
    queries: int,
    settings: dict[str, Any],
    calls: list[str],
    mask: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
    q = Shape((2, queries, 8, 128), jnp.bfloat16)
    slots = Shape((2, 2, 64, 128), jnp.bfloat16)
    attend = functools.partial(cudnn.cudnn_attention, **settings)

    def total(*inputs: Any) -> Any:
        return attend(*inputs).astype(jnp.float32).sum()

    backward = len(calls) == 2  # cuDNN has none for odd lengths
    text = lowered(jax.grad(total, (0, 1, 2)) if backward else attend, q, slots, slots)
    assert re.findall(r"__cudnn\$(\w+)", text) == calls
    assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {mask}


@pytest.mark.parametrize(
    ("width", "dtype", "packed"),
    [
        (64, "float16", True),
        (80, "float32", False),
        (96, "bfloat16", True),
        (128, "bfloat16", False),
    ],
)
def test_flash_and_its_gradient_lower_for_cuda(
    width: int, dtype: str, packed: bool
) -> None:
    def total(q: Any, k: Any, v: Any, numbers: Any) -> Any:
        name = "segment_ids" if packed else "q_start"
        out = flash_triton.flash_attention(q, k, v, **{name: numbers})
        return out.astype(jnp.float32).sum()

    q, slots = Shape((2, 200, 8, width), dtype), Shape((2, 2, 200, width), dtype)
    numbers = Shape((2, 200) if packed else (2,), jnp.int32)
    text = lowered(jax.grad(total, (0, 1, 2)), q, slots, slots, numbers)
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_hoppers_flash_lowers_for_cuda() -> None:
    q = Shape((2, 200, 8, 128), jnp.bfloat16)
    slots, ids = Shape((2, 2, 200, 128), jnp.bfloat16), Shape((2, 200), jnp.int32)

    def attend(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return flash_mosaic.flash_attention(q, k, v, segment_ids=ids)

    assert "mosaic_gpu" in lowered(attend, q, slots, slots, ids)


def caches(rows: int, heads: int, slots: int, width: int, dtype: str) -> Any:
    """Shapes of dense and paged slots, floating point and int8, with their tables."""
    table = Shape((rows, slots // 64), jnp.int32)
    for shape in ((rows, heads, slots, width), (rows * slots // 64, heads, 64, width)):
        tables = () if shape[0] == rows else (table,)
        yield Shape(shape, dtype), tables
        quantized_slots = Shape(shape, jnp.int8), Shape(shape[:-1], jnp.float32)
        yield QuantizedSlots(*quantized_slots), tables


def any_decode(q: Any, k: Any, v: Any, start: Any, *table: Any) -> Any:
    attend = decode_triton.paged_attention if table else decode_triton.decode_attention
    return attend(q, k, v, *table, q_start=start)


@pytest.mark.parametrize(("width", "dtype"), [(128, "bfloat16"), (80, "float32")])
def test_decoding_lowers_for_cuda(width: int, dtype: str) -> None:
    q, start = Shape((2, 1, 8, width), dtype), Shape((2,), jnp.int32)
    for slots, table in caches(2, 2, 512, width, dtype):
        text = lowered(any_decode, q, slots, slots, start, *table)
        assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.gpu_compile
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("shape", "argument"),
    [
        ((1, 4096, 32, 32, 4096, 128), None),  # 7B
        ((1, 4096, 64, 8, 4096, 128), None),  # 70B
        ((2, 200, 64, 8, 4096, 128), "q_start"),
        ((2, 4096, 32, 32, 4096, 128), "segment_ids"),
        ((2, 1000, 32, 32, 1000, 64), None),
        ((1, 1000, 32, 32, 1000, 80), None),
        ((1, 1000, 32, 32, 1000, 96), None),
    ],
    ids=str,
)
def test_hoppers_flash_compiles_for_an_h100(
    assets: pathlib.Path, shape: Any, argument: str | None, dtype: str
) -> None:
    b, t, n, heads, s, h = shape
    device = h100(assets)
    q, slots = Shape((b, t, n, h), dtype), Shape((b, heads, s, h), dtype)
    numbers = {"q_start": Shape((b,), jnp.int32), "segment_ids": Shape((b, t), "int32")}

    def attend(q: Any, k: Any, v: Any, *numbers: Any) -> Any:
        settings = dict(zip([argument], numbers, strict=True)) if argument else {}
        return flash_mosaic.flash_attention(q, k, v, **settings)

    extra = [numbers[argument]] if argument else []
    program = compiled(attend, device, q, slots, slots, *extra)
    text = program.as_text()
    assert "mosaic_gpu" in text
    # The log-sum-exp and small tables: no copy of queries, keys or values.
    assert program.memory_analysis().temp_size_in_bytes < 5 * b * n * (t + 256) + 4096


@pytest.mark.gpu_compile
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("width", [80, 128])
def test_flash_and_its_gradient_compile_for_an_h100(
    assets: pathlib.Path, width: int, dtype: str
) -> None:
    device = h100(assets)

    def total(q: Any, k: Any, v: Any, start: Any) -> Any:
        out = flash_triton.flash_attention(q, k, v, q_start=start)
        return out.astype(jnp.float32).sum()

    q, slots = Shape((2, 2000, 32, width), dtype), Shape((2, 8, 2000, width), dtype)
    start = Shape((2,), jnp.int32)
    program = compiled(jax.grad(total, (0, 1, 2)), device, q, slots, slots, start)
    assert program.as_text().count("__gpu$xla.gpu.triton") == 3


@pytest.mark.gpu_compile
@pytest.mark.parametrize(("rows", "n", "heads"), [(1, 64, 8), (8, 32, 32)])
def test_decoding_compiles_for_an_h100_and_copies_no_cache(
    assets: pathlib.Path, rows: int, n: int, heads: int
) -> None:
    device = h100(assets)
    q, start = Shape((rows, 1, n, 128), jnp.bfloat16), Shape((rows,), jnp.int32)
    for slots, table in caches(rows, heads, 4096, 128, "bfloat16"):
        program = compiled(any_decode, device, q, slots, slots, start, *table)
        assert program.as_text().count("__gpu$xla.gpu.triton") == 1
        # Partial outputs of every split, far less than any layer of the cache.
        assert program.memory_analysis().temp_size_in_bytes < 2**21


@pytest.mark.gpu_compile
def test_tiles_that_exceed_an_h100s_shared_memory_are_rejected(
    assets: pathlib.Path,
) -> None:
    device = h100(assets)
    big = functools.partial(flash_triton.flash_attention, block_q=512, block_kv=512)
    q = Shape((1, 1024, 8, 128), jnp.bfloat16)
    slots = Shape((1, 8, 1024, 128), jnp.bfloat16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit"):
        compiled(big, device, q, slots, slots)


@pytest.mark.gpu_compile
def test_an_invalid_description_of_a_gpu_is_rejected(assets: pathlib.Path) -> None:
    h100(assets)
    with pytest.raises(MeshError, match="'1x1x8': XLA's GPU plugin does not accept it"):
        target_devices.gpu_devices("1x1x8", "not a description")


def test_compiling_for_a_gpu_without_xlas_plugin_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target_devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps jax-cuda13-plugin"):
        target_devices.gpu_devices("1x1x8", "")


UNSUPPORTED = [
    (
        flash_triton.flash_attention,
        (1, 8, 3, 2, 8, 16),
        "float32",
        {},
        "must be a multiple",
    ),
    (flash_triton.flash_attention, (1, 8, 2, 2, 8, 512), "float32", {}, "at most 256"),
    (
        *(flash_triton.flash_attention, (1, 8, 2, 2, 8, 16), "float32"),
        *({"block_q": 24}, "block_q must be a power of two, .* got 24"),
    ),
    (
        *(flash_triton.flash_attention, (2, 40, 2, 2, 50, 16), "float32"),
        *({"segment_ids": SEGMENTS}, "leave out segment_ids with a cache"),
    ),
    (flash_mosaic.flash_attention, (1, 8, 2, 2, 8, 64), "float32", {}, "bfloat16"),
    (
        *(flash_mosaic.flash_attention, (1, 8, 2, 2, 8, 64), "bfloat16"),
        *({"block_kv": 100}, "multiples of 64"),
    ),
    (flash_mosaic.flash_attention, (1, 8, 2, 2, 8, 40), "bfloat16", {}, "of 16"),
    (cudnn.cudnn_attention, (1, 8, 2, 2, 8, 64), "float32", {}, "not float32"),
    (cudnn.cudnn_attention, (1, 8, 2, 2, 8, 60), "bfloat16", {}, "multiple of 8"),
    (
        *(decode_triton.decode_attention, (1, 1, 2, 2, 8, 16), "float32"),
        *({"q_start": starts(1), "block_kv": 20}, "a power of two"),
    ),
    (
        *(decode_triton.decode_attention, (1, 1, 3, 2, 8, 16), "float32"),
        *({"q_start": starts(1)}, "do not match"),
    ),
]


@pytest.mark.parametrize(
    ("attend", "shape", "dtype", "settings", "message"), UNSUPPORTED
)
def test_calls_that_a_kernel_does_not_support_are_rejected(
    attend: Any, shape: Any, dtype: str, settings: dict[str, Any], message: str
) -> None:
    b, t, n, heads, s, h = shape
    inputs = arrays((b, t, n, h), *[(b, heads, s, h)] * 2, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        attend(*inputs, **settings)


def test_cudnn_rejects_int8_slots() -> None:
    q, *slots = arrays((1, 2, 2, 64), *[(1, 2, 4, 64)] * 2, dtype="bfloat16")
    with pytest.raises(ValueError, match="int8 slots"):
        cudnn.cudnn_attention(q, *quantized(*slots))
