"""The benchmark of kernels: reading a dump, following it, and what it prints."""

# ruff: noqa: E501 (lines of a dump are long)

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from support.programs import needs_tpu_compiler

from llama_jax.bench import __main__ as entry
from llama_jax.bench import kernels, scalars, schedule
from llama_jax.bench.peers import Heads, Work
from llama_jax.bench.prefetched import prefetched
from llama_jax.errors import ConfigError

# A loop of five steps, by its own counter; of each step whose number in the operand
# is not zero, a body with a matrix product and a copy from HBM is executed.
FINAL = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov.u32 0 /* copy for cssa */  ;;  %s9_s3 = smov.u32 16 }
   0x1 LB: > { %s3_s1 = sld [smem:[#allocation2 + %s2_s0]] /* wanted? */ ;; %s2_s0 = sphi %s1_s0, %s8_s0 /* phi copy */ } /* Start region 4 */
   0x2   : > { %p4_p0 = scmp.eq.s32.totalorder %s3_s1, 0 }
   0x3   : > { %5 = sbr.rel (%p4_p0) target = $region7 }
   0x4   :  {}
   0x5   :  {}
   0x6   :  {}
   0x7   :  {} /* End region 5 */
   0x8   : > { %6 = vmatmul.bf16.gmra.mxu0 %v1_v0 ;; %v2_v1 = vld [vmem:[#allocation1]] }
   0x9   : > { %7 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s20_s7, /*size_in_granules=*/%s9_s3, /*vmem=*/%s21_s8, /*dst_syncflagno=*/[#allocation3] }
   0xa PF: > { %s8_s0 = sadd.s32 1, %s2_s0 } /* Start/End empty region 7 */
   0xb   : > { %p10_p1 = scmp.ge.s32.totalorder %s8_s0, 5 /* loop exit test */ }
   0xc   : > { %11 = sbr.rel (!%p10_p1) target = $region4 }
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
  0x10   :  { %12 = vdelay 3 }
  0x11   :  { %13 = sfence } /* exit bundle: %x = custom-call(%a, /*index=5*/%b) */
"""
USED = {8: "1 0 1", 9: "0 0 1"}
USAGE = "\n".join(
    [
        "== CAPACITY:",
        "MATMUL, VSTORE:SPILL, VLOAD",
        "    4     1     3",
        "== UTILIZATION:",
        *(USED.get(bundle, "0 0 0") for bundle in range(18)),
    ]
)
ALLOCATIONS = """
  #allocation1 [shape = 'f32[8,128]{1,0:T(8,128)}', space=vmem, size = 0x1000, scoped, tag = 'scratch operand']
  #allocation2 [shape = 'u8[512]{0}', space=smem, size = 0x200, scoped, tag = 'prefetched SMEM operand 0']
"""
WANTED = np.array([0, 7, 0, -1, 1], np.int32)


@pytest.fixture
def kernel() -> schedule.Kernel:
    return schedule.read_kernel("tiny.1", FINAL, USAGE, ALLOCATIONS)


def test_a_dump_is_cut_at_labels_and_after_the_delay_slots_of_branches(
    kernel: schedule.Kernel,
) -> None:
    assert [(b.start, len(b.ops), b.target) for b in kernel.blocks] == [
        (0, 1, None),
        (1, 7, 10),
        (8, 2, None),
        (10, 7, 1),
        (17, 1, None),
    ]
    assert [b.depth for b in kernel.blocks] == [0, 1, 1, 1, 0]
    assert kernel.stem == "tiny"
    assert kernel.vmem == 4096
    assert kernel.prefetched == (2,)
    assert kernel.blocks[2].slots == {"MATMUL": 1, "VSTORE:SPILL": 0, "VLOAD": 2}
    assert kernel.capacity == {"MATMUL": 4, "VSTORE:SPILL": 1, "VLOAD": 3}
    # What a bundle says it waits is part of its time.
    assert kernel.blocks[3].bundles == 7 + 3


def test_blocks_are_counted_as_often_as_the_scalars_lead_to_them(
    kernel: schedule.Kernel,
) -> None:
    run = scalars.follow(kernel, [WANTED])
    assert run.counts == (1, 5, 3, 5, 1)
    assert run.bundles == 1 + 5 * 7 + 3 * 2 + 5 * 10 + 1
    assert run.slots == {"MATMUL": 3, "VSTORE:SPILL": 0, "VLOAD": 6}
    assert (run.read, run.written) == (3 * 16 * 32, 0)
    assert scalars.inner_block(kernel, run).start == 10


def test_a_branch_on_what_is_not_known_is_refused(kernel: schedule.Kernel) -> None:
    with pytest.raises(ValueError, match=r"block at 1: .* not known"):
        scalars.follow(kernel, [WANTED[:2]])
    with pytest.raises(ValueError, match="prefetches 1 scalar operands; 0 are given"):
        scalars.follow(kernel)


def test_a_phi_after_skipped_blocks_takes_what_the_way_brought() -> None:
    # Whether the body was executed decides which of two sizes is copied.
    text = FINAL.replace(
        "0xa PF: > {", "0xa PF: > { %s30_s9 = sphi %s31_s9, %s32_s9  ;; "
    )
    text = text.replace("0x2   : > {", "0x2   : > { %s31_s9 = smov.u32 1  ;; ")
    text = text.replace("0x8   : > {", "0x8   : > { %s32_s9 = smov.u32 100  ;; ")
    copy = "%40 = dma.vmem_to_hbm %s21_s8, %s30_s9, %s20_s7  ;; "
    text = text.replace("0xb   : > {", f"0xb   : > {{ {copy}")
    found = schedule.read_kernel("tiny", text, USAGE, ALLOCATIONS)
    assert scalars.follow(found, [WANTED]).written == 32 * (2 * 1 + 3 * 100)


@pytest.mark.parametrize("broken", ["target = $region7", "0x5   :"])
def test_a_dump_of_another_form_is_refused(broken: str) -> None:
    text = FINAL.replace(broken, broken.replace("7", "9").replace("0x5 ", "0x55 "))
    with pytest.raises((ValueError, KeyError)):
        schedule.read_kernel("tiny", text, USAGE, ALLOCATIONS)


def test_scalar_operands_lie_in_tiles() -> None:
    vector = np.array([1, -1], np.int32)
    assert scalars.smem_words(vector, 1) == [1, 2**32 - 1]
    table = np.arange(16 * 256, dtype=np.int32).reshape(16, 256)
    words = scalars.smem_words(table, 8)
    # Row 9, column 130: second tile row, second tile, its row 1 and column 2.
    assert words[(1 * 2 + 1) * 8 * 128 + 1 * 128 + 2] == 9 * 256 + 130
    mask = np.zeros((1, 8, 8), np.int8)
    mask[0, 5, 3], mask[0, 6, 3] = -2, 1
    words = scalars.smem_words(mask, 8)
    assert words[128 + 3] == (0xFE << 8) | (1 << 16)
    assert sum(map(bool, words)) == 1


PROGRAM = """
ENTRY %main (a: s32[8]) -> bf16[8] {
  %a.1 = s32[8]{0:T(128)} parameter(0)
  %mask = s8[1,8,8]{2,1,0:T(8,128)(4,1)} constant({...})
  ROOT %mine.1 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%a.1, /*index=1*/%mask), custom_call_target="tpu_custom_call"
}
"""


def test_the_layout_of_operands_is_read_from_the_program() -> None:
    assert schedule.operand_tiles(PROGRAM) == {"mine.1": (1, 8)}
    loop = "  %w = (s32[]{:T(128)}) while(%tuple), condition=%c, body=%b\n"
    with pytest.raises(ValueError, match="loop around"):
        schedule.operand_tiles(PROGRAM + loop)


def test_what_a_function_hands_to_its_kernel_is_computed() -> None:
    def body(numbers, x, out) -> None:
        out[...] = x[...]

    @jax.jit
    def double(x, lengths):
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(2,),
            in_specs=[pl.BlockSpec((8, 128), lambda i, n: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, n: (i, 0)),
        )
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(body, grid_spec=grid, out_shape=shape)(2 * lengths + 1, x)

    x = jax.ShapeDtypeStruct((16, 128), jnp.float32)
    [(name, [numbers])] = prefetched(double, [x, np.array([3, 4], np.int32)])
    assert name == "body"
    np.testing.assert_array_equal(numbers, [7, 9])
    with pytest.raises(ValueError, match=r"scalar operands \[0\] are not known"):
        list(prefetched(double, [x, jax.ShapeDtypeStruct((2,), jnp.int32)]))


def test_work_is_counted_in_tiles_and_bytes() -> None:
    heads = Heads(4, 2, 128)
    assert kernels.tiles_of(Work("flash", heads, 2048)) == 4 * (1 + 2 + 3 + 4)
    # Keys and values, of two bytes.
    decode = Work("decode", heads, 100, rows=3)
    assert kernels.needed_bytes(decode) == 2 * 2 * 3 * 2 * 100 * 128
    assert kernels.heads_of("llama2-70b") == Heads(64, 8, 128)
    assert kernels.heads_of("N4K2H64") == Heads(4, 2, 64)
    with pytest.raises(ConfigError, match="no preset"):
        kernels.heads_of("4x2")


def test_a_chips_clock_times_its_matrix_units_is_its_published_peak() -> None:
    peaks = {"v4": (275e12, 2), "v5e": (197e12, 1), "v5p": (459e12, 2)}
    for name, (peak, cores) in peaks.items():
        chip = schedule.CHIPS[name]
        flops = 2 * chip.mxus * chip.mxu_size**2 * chip.clock * cores
        assert flops == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(
    ("only", "kinds"),
    [
        (["--only", "decode"], ["decode"] * 3),
        pytest.param(
            [],
            ["flash", "backward", "decode", "decode", "decode"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kernels_are_timed_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], only: list[str], kinds: list[str]
) -> None:
    asked = ["--time", "--shapes", "N4K2H16", "--lengths", "32", *only]
    assert entry.main(["kernels", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["matmul_gflops"] > 0
    assert found["copy_gb_per_s"] > 0
    rows = [row for row in found["rows"] if row["name"] == "xla"]
    assert [row["kind"] for row in rows] == kinds
    assert [row["rows"] for row in rows][-3:] == [1, 8, 64]
    assert all(row["median_seconds"] > 0 and row["part"] > 0 for row in rows)


def test_what_is_not_understood_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["kernels", "--shapes", "llama9", "--time"]) == 2
    assert "llama9" in capsys.readouterr().err
    assert entry.main(["kernels", "--chips", "v5e,v9"]) == 2
    assert "v9 is not known" in capsys.readouterr().err


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="its libtpu writes schedules in another form"
)
def test_the_real_compilers_schedule_is_followed_to_the_byte() -> None:
    arguments = ["--chips", "v5e", "--shapes", "N4K4H128", "--json"]
    command = [sys.executable, "-m", "llama_jax.bench", "kernels", *arguments]

    def rows(*more: str) -> list[dict]:
        done = subprocess.run(
            [*command, *more],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)["rows"]

    [splash] = [
        row
        for row in rows("--only", "flash", "--lengths", "2048")
        if row["name"] == "splash"
    ]
    # Of 4 rows of 512 queries and 2 columns of 1024 slots six tiles are not masked, and
    # each is twice 923 bundles at least, where the matrix units are the limit.
    assert splash["inner"] > 2 * 923
    assert splash["total"] > 4 * 6 * splash["inner"]
    assert splash["total"] < 1.5 * 4 * 6 * splash["inner"]
    decoded = [
        row
        for row in rows("--only", "decode", "--lengths", "1024")
        if row["name"] == "ragged_paged_attention"
    ]
    assert [row["rows"] for row in decoded] == [1, 8, 64]
    for row in decoded:
        cache = 2 * 2 * row["rows"] * 4 * 1024 * 128
        queries = 2 * 2 * row["rows"] * 4 * 128  # in and out
        assert cache <= row["moved"] <= cache + queries


def test_figures_can_be_written_as_json() -> None:
    empty = kernels.Figures(
        total=1,
        around=0,
        inner=1,
        mxu=0.5,
        valu=0.5,
        spills=0,
        fills=0,
        vmem=0,
        moved=0,
    )
    assert json.loads(json.dumps(dataclasses.asdict(empty)))["mxu"] == 0.5
