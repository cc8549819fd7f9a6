"""Compile a function for a TPU core, and read its schedules; any host with libtpu does.

The compiler fixes the order of all instructions, so its own dump says how long
straight-line code takes, without a TPU and without noise. This module compiles a
function for a chip that need not be present and reads the final bundles of each program
as blocks. `scalar_execution.execute` counts how often each block runs.

A count of bundles leaves out waiting for a DMA or another core, and the launch of the
kernel. Where memory is the limit, compare the bytes of the DMAs with its bandwidth.
"""

import atexit
import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from llama_jax.bench.schedule_dump import Schedule, read_schedules
from llama_jax.planning.target_devices import abstract_device, tpu_devices
from llama_jax.types import PyTree

_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
_VALUE = re.compile(
    r"\s+(?:ROOT )?%([\w.\-]+) = \(?\w+\[[\d,]*\](?:\{[^T}]*(?:T\((\d+),)?)?"
)
_CALL = re.compile(
    r"%([\w.\-]+) = .* custom-call\((.*?)\), custom_call_target=\"tpu_custom_call\""
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Core:
    """One core of a TPU.

    Attributes:
      slice_name: the smallest slice that libtpu knows.
      kind: jax's `device_kind`.
      clock: cycles per second.
      hbm: memory bandwidth in bytes per second.
      mxus: number of matrix units, each of `mxu_size` squared.
      mxu_size: rows and columns.
    """

    slice_name: str
    kind: str
    clock: float
    hbm: float
    mxus: int
    mxu_size: int


# Memory bandwidth, matrix units and peak are Google's published numbers
# (cloud.google.com/tpu/docs: v4, v5e, v5p, v6e). The clocks of v4, v5e and v5p follow
# from the peak, which is 2 x mxus x size^2 x clock per core: 275 Tflop/s of v4 and 459
# of v5p are two cores, 197 of v5e one. That rule does not hold for v6e (918 Tflop/s
# with two units of 256 would be 3.5 GHz): 1.75 GHz is an estimate, and so are the DMA
# cycles of v6e. The two cores of v4 and v5p share their memory, and XLA uses them as
# one ("megacore"); a schedule is that of one core.
CORES: Mapping[str, Core] = {
    "v4": Core(
        slice_name="v4:2x2x1",
        kind="TPU v4",
        clock=1.05e9,
        hbm=1228e9,
        mxus=4,
        mxu_size=128,
    ),
    "v5e": Core(
        slice_name="v5e:2x2",
        kind="TPU v5 lite",
        clock=1.5e9,
        hbm=819e9,
        mxus=4,
        mxu_size=128,
    ),
    "v5p": Core(
        slice_name="v5p:2x2x1",
        kind="TPU v5",
        clock=1.75e9,
        hbm=2765e9,
        mxus=4,
        mxu_size=128,
    ),
    "v6e": Core(
        slice_name="v6e:2x2",
        kind="TPU v6 lite",
        clock=1.75e9,
        hbm=1640e9,
        mxus=2,
        mxu_size=256,
    ),
}


@functools.cache
def _dump_folder() -> str:
    """Make this process's compiler write dumps to a new folder, and return it.

    libtpu reads the variable once, when it is loaded. This replaces other flags in it.
    """
    folder = os.path.join(tempfile.mkdtemp(prefix="schedule-"), "dump")
    atexit.register(shutil.rmtree, os.path.dirname(folder), ignore_errors=True)
    # Not os.environ: only the C library reads it.
    os.putenv("LIBTPU_INIT_ARGS", _FLAGS.format(folder))
    return folder


def compile_schedules(
    function: Callable[..., PyTree],
    arguments: Sequence[np.ndarray | jax.ShapeDtypeStruct],
    chip: str,
) -> list[Schedule]:
    """Compile a function for a chip, and read the schedules of its programs.

    Args:
      function: of arrays, jitted or not.
      arguments: arrays or shapes.
      chip: one of `CORES`.

    Raises:
      RuntimeError: libtpu was already loaded in this process.
    """
    folder = _dump_folder()
    sharding = SingleDeviceSharding(_device(chip))
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arguments
    ]
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with tracing_on(CORES[chip]):
        # A program in jax's cache would not be dumped.
        jax.clear_caches()
        program = jitted.lower(*shapes).compile().as_text()
    tiles = operand_tiles(program)
    schedules = [
        dataclasses.replace(schedule, tiles=tiles.get(schedule.name))
        for schedule in read_schedules(folder)
    ]
    if missing := tiles.keys() - {schedule.name for schedule in schedules}:
        raise RuntimeError(
            f"the dump lacks {sorted(missing)}: libtpu was loaded before; start a new "
            "process"
        )
    return schedules


def operand_tiles(program: str) -> dict[str, tuple[int, ...]]:
    """Rows of a tile of each operand of every Pallas kernel in a compiled program.

    Args:
      program: its text; a value's type contains its layout, for example
        `s8[8,8]{1,0:T(8,128)(4,1)}` with tiles of eight rows.

    Raises:
      ValueError: it has a loop, whose kernels would be counted once.
    """
    rows: dict[str, int] = {}
    tiles = {}
    for line in program.splitlines():
        if match := _VALUE.match(line):
            rows[match[1]] = int(match[2] or 1)
        if re.search(r"\}? while\(", line):
            raise ValueError("the program has a loop around its kernels")
        if match := _CALL.search(line):
            operands = re.findall(r"%([\w.\-]+)", match[2])
            tiles[match[1]] = tuple(rows[operand] for operand in operands)
    return tiles


@functools.cache
def _device(chip: str) -> jax.Device:
    return tpu_devices(CORES[chip].slice_name)[0]


def tracing_on(core: Core) -> AbstractContextManager[object]:
    """A context in which kernels are traced for this core."""
    return abstract_device(core.kind, num_cores=1, platform="tpu")
