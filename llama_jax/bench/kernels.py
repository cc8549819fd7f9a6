"""Attention kernels side by side, ours and jax's, by their schedules for a TPU.

For every work (a model's heads, a length) and chip, each kernel is compiled by the real
compiler, its control flow followed from the first bundle to the last, and the bundles
that are executed are counted: steps of the grid that do nothing, prologues and
epilogues included. One accounting for all:

* *total*: bundles of everything in the compiled function: the Pallas kernels, and what
  XLA puts around them (*around*: sums over heads or partial results, copies).
  Of the backward pass the forward kernel (by its name) is left out.
* *per tile*: the total divided by the 512x512 tiles on and under the diagonal, all
  heads together; one for every kernel, whatever its own tile.
* *inner*: the block in which the largest kernel spends most bundles: how many it has,
  how full its MXU and VALU slots are, and its vector registers' spills and refills.
* *DMA*: cycles that HBM needs for the bytes that the kernels' own copies move, at the
  chip's rate; *needed* is the same of the cache alone.

Not counted: waiting for a DMA, the launch of a kernel, and what else the chip does.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.bench import scalars, schedule
from llama_jax.bench.peers import (
    Built,
    Candidate,
    Heads,
    Kind,
    Work,
    causal_shapes,
    pages,
    peers,
    with_gradient,
)
from llama_jax.bench.prefetched import prefetched
from llama_jax.errors import ConfigError
from llama_jax.kernels import QuantizedSlots
from llama_jax.presets import PRESETS
from llama_jax.types import Array

KINDS: tuple[Kind, ...] = ("flash", "backward", "decode")
LENGTHS = {"flash": (2048, 4096, 16384), "decode": (4096, 32768)}
ROWS = (1, 8, 64)
_TILE = 512
_OURS_SWEEP = (
    (512, 512),
    (512, 1024),
    (1024, 512),
    (1024, 1024),
    (2048, 512),
    (2048, 1024),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What one kernel needs for one work on one chip; see the module.

    Attributes:
      total: bundles.
      around: bundles of it that are XLA's.
      inner: bundles of the innermost block.
      mxu: part of its matrix slots that are used.
      valu: of its vector arithmetic.
      spills: vector registers that it stores for want of others.
      fills: and that it loads again.
      vmem: bytes, of the largest kernel.
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


def figures(built: Built, chip: str, *, backward: bool = False) -> Figures:
    """Compile a function for a chip, and count what would be executed.

    Args:
      built: function and arguments.
      chip: one of `schedule.CHIPS`.
      backward: leave out kernels whose name says that they are the forward pass.

    Raises:
      ValueError: what is executed cannot be told.
    """
    with schedule.describing(schedule.CHIPS[chip]):
        calls = list(prefetched(*built))
    compiled = schedule.schedules(*built, chip)
    runs = []
    for kernel in compiled:
        if backward and re.search("fwd|forward", kernel.name):
            continue
        operands = _operands_of(kernel, compiled, calls)
        runs.append((kernel, scalars.follow(kernel, operands)))
    ours = [run for run in runs if run[0].tiles is not None]
    largest, execution = max(ours, key=lambda run: run[1].bundles)
    inner = scalars.inner_block(largest, execution)

    def part(kind: str) -> float:
        return inner.slots[kind] / (largest.capacity[kind] * inner.bundles)

    return Figures(
        total=sum(run.bundles for _, run in runs),
        around=sum(run.bundles for kernel, run in runs if kernel.tiles is None),
        inner=inner.bundles,
        mxu=part("MATMUL"),
        valu=part("VALU"),
        spills=inner.slots["VSTORE:SPILL"],
        fills=inner.slots["VLOAD:FILL"],
        vmem=largest.vmem,
        moved=sum(run.read + run.written for _, run in ours),
    )


def _operands_of(
    kernel: schedule.Kernel,
    compiled: Sequence[schedule.Kernel],
    calls: Sequence[tuple[str, list[np.ndarray]]],
) -> list[np.ndarray]:
    """The scalars of a kernel: those of the call of its name, or of the one unnamed."""
    if kernel.tiles is None:
        return []
    by_name = [operands for name, operands in calls if name == kernel.stem]
    if not by_name:
        stems = {other.stem for other in compiled if other.tiles is not None}
        by_name = [operands for name, operands in calls if name not in stems]
    if any(str(one) != str(by_name[0]) for one in by_name) or not by_name:
        raise ValueError(f"{kernel.name}: which call it is of cannot be told")
    return by_name[0]


def ours(work: Work, *, sweep: bool) -> Iterator[Candidate]:
    """Our kernels for the work, at their own tiles or at all of a sweep."""
    if work.kind != "decode":
        for tile in (None, *_OURS_SWEEP) if sweep else (None,):
            name = f"{tile[0]}x{tile[1]}" if tile else "its own"
            yield Candidate(
                "llama_jax", name, functools.partial(_our_flash, work, tile)
            )
    else:
        yield Candidate("llama_jax", "cache", lambda: _our_decode(work))
        pages_of = f"pages of {work.page}"
        yield Candidate("llama_jax paged", pages_of, lambda: _our_paged(work))


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"llama_jax.kernels.{module}"), name)


def _our_flash(work: Work, tile: tuple[int, int] | None) -> Built:
    flash_tpu = importlib.import_module("llama_jax.kernels.tpu.flash")
    options = {}
    if tile:
        tiles = flash_tpu.Tiles(*tile)
        options["blocks"] = flash_tpu.Blocks(forward=tiles, backward=tiles)

    def attend(q: Array, k: Array, v: Array) -> Array:
        out = flash_tpu.flash_attention(q.swapaxes(1, 2), k, v, **options)
        return out.swapaxes(1, 2)

    return Built(with_gradient(work, attend), causal_shapes(work))


def _our_decode(work: Work) -> Built:
    decode = _function("tpu.decode", "decode_attention")
    slots, structure = _held(work, work.rows, work.length)

    def attend(q: Array, q_start: Array, *held: Array) -> Array:
        k, v = structure.unflatten(held)
        return decode(q, k, v, q_start=q_start)

    return Built(attend, [_queries(work), _last(work), *slots])


def _our_paged(work: Work) -> Built:
    paged = _function("tpu.paged", "paged_attention")
    count, table = pages(work)
    slots, structure = _held(work, count, work.page)

    def attend(q: Array, q_start: Array, table: Array, *held: Array) -> Array:
        k, v = structure.unflatten(held)
        return paged(q, k, v, table, q_start=q_start)

    return Built(attend, [_queries(work), _last(work), table, *slots])


def _queries(work: Work) -> jax.ShapeDtypeStruct:
    heads = work.heads
    return jax.ShapeDtypeStruct((work.rows, 1, heads.n, heads.h), jnp.bfloat16)


def _held(work: Work, rows: int, slots: int) -> tuple[list[Any], Any]:
    """Keys and values in a cache or pages: their arrays, and how they belong."""
    shape = (rows, work.heads.k, slots, work.heads.h)
    part: Any = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if work.eight_bits:
        numbers: Any = jax.ShapeDtypeStruct(shape, jnp.int8)
        scales: Any = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
        part = QuantizedSlots(numbers, scales)
    return jax.tree.flatten((part, part))


def _last(work: Work) -> np.ndarray:
    """Every row's query at its last slot."""
    return np.full(work.rows, work.length - 1, np.int32)


def tiles_of(work: Work) -> int:
    """512x512 tiles on and under the diagonal, of all heads and rows."""
    side = -(-work.length // _TILE)
    return work.rows * work.heads.n * side * (side + 1) // 2


def needed_bytes(work: Work) -> int:
    """Of the cache that one query per row sees; of eight bits with their scales."""
    of_slot = work.heads.h + 4 if work.eight_bits else 2 * work.heads.h
    return 2 * work.rows * work.heads.k * work.length * of_slot


def heads_of(name: str) -> Heads:
    """Of a preset, or spelt: `N32K8H128`.

    Raises:
      ConfigError: it is neither.
    """
    if name in PRESETS:
        config = PRESETS[name]
        return Heads(config.num_heads, config.num_kv_heads, config.head_dim)
    if found := re.fullmatch(r"N(\d+)K(\d+)H(\d+)", name):
        return Heads(*map(int, found.groups()))
    raise ConfigError(f"--shapes {name}: no preset, and not like N32K8H128")


def works(
    kinds: Sequence[Kind],
    shapes: Sequence[str],
    lengths: Sequence[int] | None,
    *,
    page: int = 128,
    eight_bits: bool = False,
) -> Iterator[tuple[str, Work]]:
    """What is measured, each with its shape's name; at usual lengths unless told."""
    for kind in kinds:
        usual = LENGTHS["decode" if kind == "decode" else "flash"]
        for name in shapes:
            for length in lengths or usual:
                for rows in ROWS if kind == "decode" else (1,):
                    heads = heads_of(name)
                    yield name, Work(kind, heads, length, rows, page, eight_bits)


def compare(
    chip: str, shape: str, work: Work, *, sweep: bool
) -> Iterator[tuple[dict[str, Any], str]]:
    """Everyone's figures for one work on one chip, as data and as a line.

    The last is a line alone: how the best of ours compares with the best of jax's.
    """
    best: dict[bool, int] = {}
    for mine, candidate in [
        *((False, peer) for peer in peers(work, chip, sweep=sweep)),
        *((True, own) for own in ours(work, sweep=sweep)),
    ]:
        row: dict[str, Any] = {"chip": chip, "shape": shape, **work._asdict()}
        row |= {"name": candidate.name, "tile": candidate.tile}
        row["heads"] = work.heads._asdict()
        try:
            found = figures(candidate.build(), chip, backward=work.kind == "backward")
        except Exception as error:  # whatever a kernel or its compiler refuses with
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            row["refused"] = f"{type(error).__name__}: {reason}"
            yield row, f"{_label(candidate)} refused: {row['refused'][:90]}"
            continue
        best[mine] = min(found.total, best.get(mine, found.total))
        extra = _extra(work, chip, found)
        row |= {**dataclasses.asdict(found), **extra}
        yield row, f"{_label(candidate)} {_line(work, found, extra)}"
    if len(best) == 2:
        ratio = best[True] / best[False]
        yield {}, f"best of ours / best of jax's: {ratio:.3f}"


def _extra(work: Work, chip: str, found: Figures) -> dict[str, float]:
    """What follows from the figures, by the kind of work."""
    if work.kind != "decode":
        return {"per_tile": found.total / tiles_of(work)}
    cycles = schedule.CHIPS[chip].clock / schedule.CHIPS[chip].hbm
    return {
        "dma_cycles": found.moved * cycles,
        "needed_cycles": needed_bytes(work) * cycles,
    }


def _label(candidate: Candidate) -> str:
    return f"{candidate.name:<22} {candidate.tile:<24}"


def _line(work: Work, found: Figures, extra: dict[str, float]) -> str:
    text = f"{found.total:>12,} (around {found.around:,})"
    if work.kind == "decode":
        text += (
            f"  DMA {extra['dma_cycles']:,.0f}, needed {extra['needed_cycles']:,.0f}"
            f"  total/DMA {found.total / extra['dma_cycles']:.2f}"
        )
    else:
        text += f"  per tile {extra['per_tile']:,.0f}"
    return text + (
        f"  inner {found.inner} MXU {found.mxu:.0%} VALU {found.valu:.0%}"
        f" spills {found.spills} fills {found.fills}"
        f"  VMEM {found.vmem / 2**20:.1f} MiB"
    )
