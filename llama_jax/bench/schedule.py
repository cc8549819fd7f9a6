"""What the TPU's compiler makes of a kernel: its schedule, on any host with libtpu.

A TPU core runs one *bundle* per cycle: a wide instruction with slots for matrix units
(MXU), the transposer (XLU), vector arithmetic (VALU), transcendental functions (EUP),
vector loads and stores, and scalars. The order is fixed when the program is compiled,
so the compiler's own dump says how long straight code takes, without a TPU and without
noise. This module compiles a function for a chip that need not be there, reads the dump
of each kernel's final bundles, and cuts it into blocks: runs of bundles that are only
ever executed together. How often each is executed, `scalars.follow` finds out.

What a bundle count leaves out: waiting for a DMA, for another core, and the launch of
the kernel. Where memory is the limit, compare the DMA's bytes with the memory's rate.
"""

import atexit
import dataclasses
import functools
import glob
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from llama_jax.planning.target_devices import tpu_devices

DELAY_SLOTS = 4
"""Bundles after a branch that are executed whether it is taken or not."""

_FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
_HEAD = re.compile(r"(?m)^ *(0x[0-9a-f]+|0) +(?:[A-Z][A-Z])? ?: ([ >]*)\{")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_END = re.compile(r"\s\}|^\}")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"\bsbr\.rel\b.*\$region(\d+)")
_LABEL = re.compile(r" *(?:0x[0-9a-f]+|0) +(LB|LH|LE|PB|PF|CT):")
_VALUE = re.compile(
    r"\s+(?:ROOT )?%([\w.\-]+) = \(?\w+\[[\d,]*\](?:\{[^T}]*(?:T\((\d+),)?)?"
)
_CALL = re.compile(
    r"%([\w.\-]+) = .* custom-call\((.*?)\), custom_call_target=\"tpu_custom_call\""
)
_ALLOCATION = re.compile(
    r"#allocation(\d+) \[.*?space=(\w+), size = (0x[0-9a-f]+).*?tag = '([^']*)'"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One core of a TPU: what it does per cycle and per second.

    Attributes:
      slice_name: the smallest slice that libtpu describes.
      kind: what jax calls the device.
      clock: cycles per second.
      hbm: bytes per second of the memory that one core can count on.
      mxus: matrix units of a core, each of `mxu_size` squared.
      mxu_size: rows and columns.
    """

    slice_name: str
    kind: str
    clock: float
    hbm: float
    mxus: int
    mxu_size: int


# HBM rate, matrix units and peak of a chip are Google's published ones
# (cloud.google.com/tpu/docs: v4, v5e, v5p, v6e). The clocks of v4, v5e and v5p follow
# from the peak, which is 2 x mxus x size^2 x clock per core: 275 Tflop/s of v4 and 459
# of v5p are two cores, 197 of v5e one. That rule does not give v6e's (918 Tflop/s with
# two units of 256 would be 3.5 GHz); 1.75 GHz is an estimate, and with it v6e's DMA
# cycles are. v4 and v5p share their memory between the two cores, which XLA uses as
# one ("megacore"); a schedule is of one of them.
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(
        slice_name="v4:2x2x1",
        kind="TPU v4",
        clock=1.05e9,
        hbm=1228e9,
        mxus=4,
        mxu_size=128,
    ),
    "v5e": Chip(
        slice_name="v5e:2x2",
        kind="TPU v5 lite",
        clock=1.5e9,
        hbm=819e9,
        mxus=4,
        mxu_size=128,
    ),
    "v5p": Chip(
        slice_name="v5p:2x2x1",
        kind="TPU v5",
        clock=1.75e9,
        hbm=2765e9,
        mxus=4,
        mxu_size=128,
    ),
    "v6e": Chip(
        slice_name="v6e:2x2",
        kind="TPU v6 lite",
        clock=1.75e9,
        hbm=1640e9,
        mxus=2,
        mxu_size=256,
    ),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """Bundles that are only ever executed one after another.

    Attributes:
      start: address of the first.
      ops: the instructions of each bundle, as the dump writes them.
      slots: how many of each kind of slot they use.
      depth: in how many loops it lies.
      target: address that its branch leads to, where it ends in one.
    """

    start: int
    ops: tuple[tuple[str, ...], ...]
    slots: Mapping[str, int]
    depth: int
    target: int | None

    @property
    def bundles(self) -> int:
        """Cycles that it takes: its bundles, and what they say they wait."""
        waits = re.findall(r"\bvdelay (\d+)", " ".join(sum(self.ops, ())))
        return len(self.ops) + sum(map(int, waits))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One program of a compiled function: a Pallas kernel, or a fusion of XLA's.

    Attributes:
      name: the compiler's.
      blocks: in the order of their addresses.
      capacity: slots of each kind in a bundle.
      prefetched: numbers of the allocations that hold the scalar operands, in order.
      vmem: bytes of the kernel's windows, scratch and spills.
      tiles: rows of a tile of each operand, as it lies in memory; of Pallas kernels.
    """

    name: str
    blocks: tuple[Block, ...]
    capacity: Mapping[str, int]
    prefetched: tuple[int, ...]
    vmem: int
    tiles: tuple[int, ...] | None = None

    @property
    def stem(self) -> str:
        """The name without the number that tells it from its equals."""
        return re.sub(r"(\.\d+)+$", "", self.name)


@functools.cache
def _dump_folder() -> str:
    """Where this process's compiler writes its dumps, from now on.

    libtpu reads the variable once, when it is loaded. Its other flags, if any were
    given, do not count.
    """
    folder = os.path.join(tempfile.mkdtemp(prefix="schedule-"), "dump")
    atexit.register(shutil.rmtree, os.path.dirname(folder), ignore_errors=True)
    # For the C library alone.
    os.putenv("LIBTPU_INIT_ARGS", _FLAGS.format(folder))
    return folder


def schedules(
    function: Callable[..., Any],
    arguments: Sequence[np.ndarray | jax.ShapeDtypeStruct],
    chip: str,
) -> list[Kernel]:
    """Compile for a chip, and read the schedule of every kernel.

    Args:
      function: of arrays, jitted or not.
      arguments: or their shapes.
      chip: one of `CHIPS`.

    Raises:
      RuntimeError: something else in this process had loaded libtpu before.
    """
    folder = _dump_folder()
    place = SingleDeviceSharding(_device(chip))
    shapes = [
        jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=place)
        for each in arguments
    ]
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with describing(CHIPS[chip]):
        # A compiled program that jax still has would write no dump.
        jax.clear_caches()
        program = jitted.lower(*shapes).compile().as_text()
    tiles = operand_tiles(program)
    kernels = [
        dataclasses.replace(kernel, tiles=tiles.get(kernel.name))
        for kernel in read_kernels(folder)
    ]
    if missing := tiles.keys() - {kernel.name for kernel in kernels}:
        raise RuntimeError(
            f"the dump lacks {sorted(missing)}: was libtpu loaded before?"
        )
    return kernels


def operand_tiles(program: str) -> dict[str, tuple[int, ...]]:
    """Rows of a tile of each operand of every Pallas kernel in a compiled program.

    Args:
      program: as text; the layout of a value is part of its type, `s8[8,8]{1,0:T(8,128)
        (4,1)}` having tiles of eight rows.

    Raises:
      ValueError: it has a loop, whose kernels would be counted once.
    """
    rows: dict[str, int] = {}
    found = {}
    for line in program.splitlines():
        if match := _VALUE.match(line):
            rows[match[1]] = int(match[2] or 1)
        if re.search(r"\}? while\(", line):
            raise ValueError("the program has a loop around its kernels")
        if match := _CALL.search(line):
            operands = re.findall(r"%([\w.\-]+)", match[2])
            found[match[1]] = tuple(rows[operand] for operand in operands)
    return found


@functools.cache
def _device(chip: str) -> Any:
    return tpu_devices(CHIPS[chip].slice_name)[0]


def describing(chip: Chip) -> Any:
    """Let kernels that ask what device they are traced for hear of this one."""
    from jax.sharding import AbstractMesh, use_abstract_mesh

    try:
        from jax.sharding import AbstractDevice
    except ImportError:  # an older jax, where such kernels cannot be traced
        return use_abstract_mesh(AbstractMesh((), ()))
    facts: dict[str, Any] = {"device_kind": chip.kind, "num_cores": 1}
    if "platform" in inspect.signature(AbstractDevice).parameters:
        facts["platform"] = "tpu"
    device = AbstractDevice(**facts)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def read_kernels(folder: str) -> Iterator[Kernel]:
    """The kernels of a dump, after the compiler's last pass over each."""
    for final in sorted(glob.glob(glob.escape(folder) + "/*-final_bundles.txt")):
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", final)
        name = os.path.basename(stem).split("-", 1)[1]
        if name == "TLP" or name.startswith("<"):
            continue  # what calls the kernels
        usage = _only(stem, "final_hlo-static-per-bundle-utilization")
        allocations = _only(stem, "post-ra")
        yield read_kernel(name, _text(final), _text(usage), _text(allocations))


def _only(stem: str, kind: str) -> str:
    [path] = (
        path
        for path in glob.glob(f"{glob.escape(stem)}-*-{kind}.txt")
        if re.fullmatch(r"-\d+-", path[len(stem) : -len(kind) - 4])
    )
    return path


def _text(path: str) -> str:
    with open(path) as file:
        return file.read()


def read_kernel(name: str, final: str, usage: str, allocations: str) -> Kernel:
    """A kernel from the texts of its dump.

    Args:
      name: the compiler's.
      final: of the final bundles.
      usage: of the utilization per bundle.
      allocations: of a pass that lists them.

    Raises:
      ValueError: the dump is not of the form that is known.
    """
    kinds, capacity, used = _read_usage(usage)
    heads = list(_HEAD.finditer(final))
    if [int(head[1], 16) for head in heads] != list(range(len(used))):
        raise ValueError(f"{name}: bundles and their utilization do not match")
    ends = [head.start() for head in heads[1:]] + [len(final)]
    texts = [final[head.start() : end] for head, end in zip(heads, ends, strict=True)]
    regions: dict[str, int] = {}
    for address, text in enumerate(texts):
        for region in _REGION.findall(text):
            regions.setdefault(region, address)
    ops = [_operations(text) for text in texts]
    targets: dict[int, int] = {}
    for address, bundle in enumerate(ops):
        for found in filter(None, map(_BRANCH.search, bundle)):
            targets[address] = regions[found[1]]
    starts = {0} | {address for address, text in enumerate(texts) if _LABEL.match(text)}
    if stray := set(targets.values()) - starts:
        raise ValueError(f"{name}: branches to unlabelled bundles {sorted(stray)}")
    starts |= {address + 1 + DELAY_SLOTS for address in targets}
    order = sorted(start for start in starts if start < len(ops))
    blocks = []
    for start, end in zip(order, [*order[1:], len(ops)], strict=True):
        branches = [address for address in range(start, end) if address in targets]
        if branches and branches != [end - 1 - DELAY_SLOTS]:
            raise ValueError(f"{name}: a branch within the block at {start}")
        totals = map(sum, zip(*used[start:end], strict=True))
        blocks.append(
            Block(
                start=start,
                ops=tuple(ops[start:end]),
                slots=dict(zip(kinds, totals, strict=True)),
                depth=max(
                    heads[address][2].count(">") for address in range(start, end)
                ),
                target=targets[branches[0]] if branches else None,
            )
        )
    listed = _ALLOCATION.findall(allocations)
    prefetched = {
        int(tag.rsplit(" ", 1)[1]): int(number)
        for number, _, _, tag in listed
        if tag.startswith("prefetched SMEM operand ")
    }
    vmem = {
        number: int(size, 16) for number, space, size, _ in listed if space == "vmem"
    }
    return Kernel(
        name=name,
        blocks=tuple(blocks),
        capacity=dict(zip(kinds, capacity, strict=True)),
        prefetched=tuple(prefetched[index] for index in sorted(prefetched)),
        vmem=sum(vmem.values()),
    )


def _read_usage(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Kinds of slots, how many of each a bundle has, and those that each uses."""
    kinds: list[str] = []
    rows = []
    for line in text.splitlines():
        if line.startswith("MATMUL"):
            kinds = [kind.strip() for kind in line.split(",")]
        elif re.fullmatch(r"[\d ]*\d[\d ]*", line):
            rows.append([int(number) for number in line.split()])
    if not kinds or not rows or any(len(row) != len(kinds) for row in rows):
        raise ValueError(
            "this libtpu writes its schedules in a form that is not known; pip install "
            "--upgrade libtpu (0.0.52 is known)"
        )
    return kinds, rows[0], rows[1:]


def _operations(text: str) -> tuple[str, ...]:
    """The instructions of one bundle, without the compiler's comments."""
    body = _COMMENT.sub("", text.partition("{")[2])
    end = _END.search(body)
    body = body[: end.start()] if end else body
    return tuple(op.strip() for op in body.split(";;") if op.strip())
