"""The benchmark of kernels: parsing a dump, executing its scalars, and its report."""

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
from support.commands import run_command
from support.programs import needs_tpu_compiler

from llama_jax.bench import kernel_times, schedule
from llama_jax.bench.__main__ import main
from llama_jax.bench.attention_work import Heads, Work, parse_heads
from llama_jax.bench.kernel_schedules import Figures
from llama_jax.bench.machine import Bandwidth, MatmulRate
from llama_jax.bench.scalar_execution import execute, inner_block, smem_words
from llama_jax.bench.scalar_operands import scalar_operands
from llama_jax.bench.schedule_dump import Schedule, read_schedule
from llama_jax.errors import ConfigError

# A loop of five steps. If the step's number in the operand is not zero, it runs a body
# with a matrix product and a copy from HBM.
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
def tiny() -> Schedule:
    return read_schedule("tiny.1", FINAL, USAGE, ALLOCATIONS)


def test_blocks_end_at_labels_and_after_the_delay_slots_of_branches(
    tiny: Schedule,
) -> None:
    assert [(b.start, len(b.ops), b.target) for b in tiny.blocks] == [
        (0, 1, None),
        (1, 7, 10),
        (8, 2, None),
        (10, 7, 1),
        (17, 1, None),
    ]
    assert [b.depth for b in tiny.blocks] == [0, 1, 1, 1, 0]
    assert tiny.stem == "tiny"
    assert tiny.vmem == 4096
    assert tiny.prefetched == (2,)
    assert tiny.blocks[2].slots == {"MATMUL": 1, "VSTORE:SPILL": 0, "VLOAD": 2}
    assert tiny.capacity == {"MATMUL": 4, "VSTORE:SPILL": 1, "VLOAD": 3}
    # A delay is part of the time.
    assert tiny.blocks[3].bundles == 7 + 3


def test_blocks_are_counted_as_often_as_the_scalars_select_them(
    tiny: Schedule,
) -> None:
    run = execute(tiny, [WANTED])
    assert run.counts == (1, 5, 3, 5, 1)
    assert run.bundles == 1 + 5 * 7 + 3 * 2 + 5 * 10 + 1
    assert run.slots == {"MATMUL": 3, "VSTORE:SPILL": 0, "VLOAD": 6}
    assert (run.read, run.written) == (3 * 16 * 32, 0)
    assert inner_block(tiny, run).start == 10


def test_a_branch_on_an_unknown_value_is_an_error(tiny: Schedule) -> None:
    with pytest.raises(ValueError, match=r"block at 1: .* unknown"):
        execute(tiny, [WANTED[:2]])
    with pytest.raises(ValueError, match="prefetches 1 scalar operands, got 0"):
        execute(tiny)


def test_a_phi_after_skipped_blocks_takes_the_value_of_the_path() -> None:
    # One of two sizes is copied, depending on whether the body was executed.
    text = FINAL.replace(
        "0xa PF: > {", "0xa PF: > { %s30_s9 = sphi %s31_s9, %s32_s9  ;; "
    )
    text = text.replace("0x2   : > {", "0x2   : > { %s31_s9 = smov.u32 1  ;; ")
    text = text.replace("0x8   : > {", "0x8   : > { %s32_s9 = smov.u32 100  ;; ")
    copy = "%40 = dma.vmem_to_hbm %s21_s8, %s30_s9, %s20_s7  ;; "
    text = text.replace("0xb   : > {", f"0xb   : > {{ {copy}")
    schedule = read_schedule("tiny", text, USAGE, ALLOCATIONS)
    assert execute(schedule, [WANTED]).written == 32 * (2 * 1 + 3 * 100)


@pytest.mark.parametrize("broken", ["target = $region7", "0x5   :"])
def test_a_dump_in_another_format_is_an_error(broken: str) -> None:
    text = FINAL.replace(broken, broken.replace("7", "9").replace("0x5 ", "0x55 "))
    with pytest.raises((ValueError, KeyError)):
        read_schedule("tiny", text, USAGE, ALLOCATIONS)


def test_scalar_operands_are_laid_out_in_tiles() -> None:
    vector = np.array([1, -1], np.int32)
    assert smem_words(vector, 1) == [1, 2**32 - 1]
    table = np.arange(16 * 256, dtype=np.int32).reshape(16, 256)
    words = smem_words(table, 8)
    # Row 9, column 130: second tile row, second tile, its row 1 and column 2.
    assert words[(1 * 2 + 1) * 8 * 128 + 1 * 128 + 2] == 9 * 256 + 130
    mask = np.zeros((1, 8, 8), np.int8)
    mask[0, 5, 3], mask[0, 6, 3] = -2, 1
    words = smem_words(mask, 8)
    assert words[128 + 3] == (0xFE << 8) | (1 << 16)
    assert sum(map(bool, words)) == 1


PROGRAM = """
ENTRY %main (a: s32[8]) -> bf16[8] {
  %a.1 = s32[8]{0:T(128)} parameter(0)
  %mask = s8[1,8,8]{2,1,0:T(8,128)(4,1)} constant({...})
  ROOT %mine.1 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%a.1, /*index=1*/%mask), custom_call_target="tpu_custom_call"
}
"""


def test_the_tiles_of_operands_are_read_from_the_program() -> None:
    assert schedule.operand_tiles(PROGRAM) == {"mine.1": (1, 8)}
    loop = "  %w = (s32[]{:T(128)}) while(%tuple), condition=%c, body=%b\n"
    with pytest.raises(ValueError, match="loop around"):
        schedule.operand_tiles(PROGRAM + loop)


def test_scalar_operands_are_evaluated_from_known_arguments() -> None:
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
    [(name, [numbers])] = scalar_operands(double, [x, np.array([3, 4], np.int32)])
    assert name == "body"
    np.testing.assert_array_equal(numbers, [7, 9])
    with pytest.raises(ValueError, match=r"scalar operands \[0\] are unknown"):
        list(scalar_operands(double, [x, jax.ShapeDtypeStruct((2,), jnp.int32)]))


def test_work_is_counted_in_tiles_and_bytes() -> None:
    heads = Heads(4, 2, 128)
    assert Work("flash", heads, 2048).num_tiles == 4 * (1 + 2 + 3 + 4)
    # Keys and values, of two bytes.
    decode = Work("decode", heads, 100, rows=3)
    assert decode.cache_bytes == 2 * 2 * 3 * 2 * 100 * 128
    assert parse_heads("llama2-70b") == Heads(64, 8, 128)
    assert parse_heads("N4K2H64") == Heads(4, 2, 64)
    with pytest.raises(ConfigError, match="not a preset"):
        parse_heads("4x2")


def test_the_clock_times_the_matrix_units_is_the_published_peak() -> None:
    peaks = {"v4": (275e12, 2), "v5e": (197e12, 1), "v5p": (459e12, 2)}
    for name, (peak, cores) in peaks.items():
        core = schedule.CORES[name]
        flops = 2 * core.mxus * core.mxu_size**2 * core.clock * cores
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
def test_kernels_are_timed_on_this_machine(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    only: list[str],
    kinds: list[str],
) -> None:
    rates = {
        "measure_bandwidth": Bandwidth(reduction=1.0, matvec=1.0, copy=2.0),
        "measure_matmul_rate": MatmulRate(gflops=10.0, size="8,8,8"),
    }
    for name, rate in rates.items():
        monkeypatch.setattr(kernel_times, name, lambda *_, rate=rate: rate)
    flags = ["--time", "--shapes", "N4K2H16", "--lengths", "32", *only]
    assert main(["kernels", *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["matmul_gflops"], report["copy_gb_per_s"]) == (10, 2)
    rows = [row for row in report["rows"] if row["name"] == "xla"]
    assert [row["kind"] for row in rows] == kinds
    assert [row["rows"] for row in rows][-3:] == [1, 8, 64]
    assert all(row["median_seconds"] > 0 and row["part"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--shapes", "llama9", "--time"], "--shapes llama9: not a preset"),
        (["--chips", "v5e,v9"], "--chips v9: unknown"),
    ],
)
def test_invalid_arguments_are_rejected(
    capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    status, _, err = run_command(main, capsys, "kernels", *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert reason in err


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason="its libtpu writes schedules in another format",
)
def test_schedules_of_the_real_compiler_are_executed_to_the_byte() -> None:
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
    # Of 4 rows of 512 queries and 2 columns of 1024 slots, six tiles are visible. Each
    # takes at least twice 923 bundles, the limit of the matrix units.
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


def test_figures_are_json_objects() -> None:
    empty = Figures(
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
