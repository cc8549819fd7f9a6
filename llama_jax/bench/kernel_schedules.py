"""Our attention kernels next to jax's, by their schedules for a TPU.

For each work (a model's heads, a length) and chip, every kernel is compiled by the real
compiler, its control flow is followed from the first bundle to the last, and the
executed bundles are counted, including grid steps that do nothing, prologues and
epilogues. All kernels are counted alike:

* *total*: bundles of everything in the compiled function: the Pallas kernels, and what
  XLA puts around them (*around*: sums over heads or partial results, copies). In the
  backward pass, the forward kernel (by its name) is left out.
* *per tile*: the total divided by the 512x512 tiles on and below the diagonal, of all
  heads; the same number for every kernel, whatever its own tiles.
* *inner*: the block in which the largest kernel spends most bundles: its length, how
  full its MXU and VALU slots are, and its vector register spills and fills.
* *DMA*: HBM cycles for the bytes that the kernels copy, at the chip's bandwidth;
  *needed*: the same for the cache alone.

Not counted: waiting for a DMA, launching a kernel, and what else the chip does.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.bench.attention_work import Call, Candidate, Work
from llama_jax.bench.jax_kernels import jax_kernels
from llama_jax.bench.our_kernels import our_kernels
from llama_jax.bench.scalar_execution import execute, inner_block
from llama_jax.bench.scalar_operands import KernelScalars, scalar_operands
from llama_jax.bench.schedule import CORES, compile_schedules, tracing_on
from llama_jax.bench.schedule_dump import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """The cost of one kernel for one work on one chip; see the module.

    Attributes:
      total: bundles.
      around: bundles of programs around the Pallas kernels.
      inner: bundles of the inner block.
      mxu: fraction of its matrix slots in use.
      valu: fraction of its vector arithmetic slots in use.
      spills: vector registers that it spills.
      fills: spilled vector registers that it loads.
      vmem: bytes of VMEM of the largest kernel.
      moved: bytes that the Pallas kernels copy from and to HBM.
    """

    total: int
    around: int
    inner: int
    mxu: float
    valu: float
    spills: int
    fills: int
    vmem: int
    moved: int


def measure_figures(call: Call, chip: str, *, backward: bool = False) -> Figures:
    """Compile a function for a chip, and count the bundles it would execute.

    Args:
      call: function and arguments.
      chip: one of `schedule.CORES`.
      backward: leave out kernels named as the forward pass.

    Raises:
      ValueError: what is executed depends on unknown values.
    """
    with tracing_on(CORES[chip]):
        scalars = list(scalar_operands(*call))
    schedules = compile_schedules(*call, chip)
    runs = []
    for schedule in schedules:
        if backward and re.search("fwd|forward", schedule.name):
            continue
        operands = _operands_of(schedule, schedules, scalars)
        runs.append((schedule, execute(schedule, operands)))
    pallas = [run for run in runs if run[0].tiles is not None]
    largest, execution = max(pallas, key=lambda run: run[1].bundles)
    inner = inner_block(largest, execution)

    def used(kind: str) -> float:
        return inner.slots[kind] / (largest.capacity[kind] * inner.bundles)

    return Figures(
        total=sum(run.bundles for _, run in runs),
        around=sum(run.bundles for schedule, run in runs if schedule.tiles is None),
        inner=inner.bundles,
        mxu=used("MATMUL"),
        valu=used("VALU"),
        spills=inner.slots["VSTORE:SPILL"],
        fills=inner.slots["VLOAD:FILL"],
        vmem=largest.vmem,
        moved=sum(run.read + run.written for _, run in pallas),
    )


def _operands_of(
    schedule: Schedule,
    schedules: Sequence[Schedule],
    scalars: Sequence[KernelScalars],
) -> list[np.ndarray]:
    """Scalar operands of the call with the schedule's name, or of the unnamed one."""
    if schedule.tiles is None:
        return []
    matches = [operands for name, operands in scalars if name == schedule.stem]
    if not matches:
        stems = {other.stem for other in schedules if other.tiles is not None}
        matches = [operands for name, operands in scalars if name not in stems]
    if not matches or any(str(other) != str(matches[0]) for other in matches):
        raise ValueError(f"{schedule.name}: more than one call could be its own")
    return matches[0]


def compare(
    chip: str, shape: str, work: Work, *, sweep: bool
) -> Iterator[tuple[dict[str, object], str]]:
    """Compare all kernels for one work on one chip; yields objects and lines.

    The last line has no object: the ratio of our best kernel to jax's.
    """
    best: dict[bool, int] = {}
    for ours, candidate in [
        *((False, kernel) for kernel in jax_kernels(work, chip, sweep=sweep)),
        *((True, kernel) for kernel in our_kernels(work, sweep=sweep)),
    ]:
        row: dict[str, Any] = {"chip": chip, "shape": shape, **work.describe()}
        row |= {"name": candidate.name, "tile": candidate.tile}
        try:
            backward = work.kind == "backward"
            figures = measure_figures(candidate.build(), chip, backward=backward)
        except Exception as error:  # kernels and compilers raise all kinds of errors
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            row["refused"] = f"{type(error).__name__}: {reason}"
            yield row, f"{_label(candidate)} refused: {row['refused'][:90]}"
            continue
        best[ours] = min(figures.total, best.get(ours, figures.total))
        derived = _derived(work, chip, figures)
        row |= {**dataclasses.asdict(figures), **derived}
        yield row, f"{_label(candidate)} {_line(work, figures, derived)}"
    if len(best) == 2:
        yield {}, f"our best / jax's best: {best[True] / best[False]:.3f}"


def _derived(work: Work, chip: str, figures: Figures) -> dict[str, float]:
    """Figures derived from others, by the kind of work."""
    if work.kind != "decode":
        return {"per_tile": figures.total / work.num_tiles}
    cycles_per_byte = CORES[chip].clock / CORES[chip].hbm
    return {
        "dma_cycles": figures.moved * cycles_per_byte,
        "needed_cycles": work.cache_bytes * cycles_per_byte,
    }


def _label(candidate: Candidate) -> str:
    return f"{candidate.name:<22} {candidate.tile:<24}"


def _line(work: Work, figures: Figures, derived: dict[str, float]) -> str:
    text = f"{figures.total:>12,} (around {figures.around:,})"
    if work.kind == "decode":
        dma, needed = derived["dma_cycles"], derived["needed_cycles"]
        text += f"  DMA {dma:,.0f}, needed {needed:,.0f}"
        text += f"  total/DMA {figures.total / dma:.2f}"
    else:
        text += f"  per tile {derived['per_tile']:,.0f}"
    return text + (
        f"  inner {figures.inner} MXU {figures.mxu:.0%} VALU {figures.valu:.0%}"
        f" spills {figures.spills} fills {figures.fills}"
        f"  VMEM {figures.vmem / 2**20:.1f} MiB"
    )
