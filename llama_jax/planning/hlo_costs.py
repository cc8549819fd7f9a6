"""What a compiled program sends between chips, and what it multiplies, by its text."""

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llama_jax.planning.hlo import ArrayShape, Computation, Hlo, Instruction

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_NAMED_MESH = re.compile(r"replica_groups=@?\w*mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{\d+,\d+\}(?:,\{\d+,\d+\})*)\}")
_GEMM = re.compile(r'"lhs_contracting_dimensions":\["(\d+)"')


class Collective(NamedTuple):
    """One kind of exchange over some axes of the mesh, all of a program's together.

    Attributes:
      kind: XLA's name, such as `all-gather`.
      axes: of the mesh whose chips take part, joined by `+`.
      dtype: of what is sent.
      times: how often in a step.
      nbytes: that each chip receives in a step.
    """

    kind: str
    axes: str
    dtype: str
    times: float
    nbytes: float


def collectives(program: Hlo, mesh: Mapping[str, int]) -> list[Collective]:
    """Every exchange of one run of a program, largest first.

    What is started and awaited apart counts once. A chip receives all of what is
    gathered but its own part, that part twice of a sum (scattered, then gathered), once
    of a sum that stays scattered.

    Args:
      program: compiled for all chips of the mesh.
      mesh: sizes by axis, in the order in which its devices are numbered.
    """
    runs, fused = program.runs(), program.fused()
    counts: dict[tuple[str, str, str], list[float]] = collections.defaultdict(
        lambda: [0.0, 0.0]
    )
    # A TPU's asynchronous exchange is written down wherever something is fused with a
    # piece of it, each time with its channel: it happens where that runs least.
    started: dict[str, tuple[float, tuple[str, str, str], float]] = {}
    for name, times in runs.items():
        computation = program.computations[name]
        for instruction in computation.values():
            kind = _kind(instruction)
            if kind is None:
                continue
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            size, axes = _group(instruction, mesh)
            sent = _operands(computation, instruction)
            if size < 2 or not sent:
                continue
            nbytes = sum(shape.nbytes for shape in sent) * _received(kind, size)
            key = kind, axes, sent[0].dtype
            channel = _CHANNEL.search(instruction.attributes)
            if name in fused and channel:
                before = started.get(channel[1])
                if before is None or times < before[0]:
                    started[channel[1]] = times, key, nbytes
                continue
            counts[key][0] += times
            counts[key][1] += times * nbytes
    for times, key, nbytes in started.values():
        counts[key][0] += times
        counts[key][1] += times * nbytes
    found = [Collective(*key, *both) for key, both in counts.items()]
    return sorted(found, key=lambda one: -one.nbytes)


def product_flops(program: Hlo) -> float:
    """Operations of all matrix products of one run, on one chip.

    Two per multiplication and addition. Pallas kernels are not looked into.
    """
    total = 0.0
    for name, times in program.runs().items():
        computation = program.computations[name]
        for instruction in computation.values():
            total += times * _flops(computation, instruction)
    return total


def kernels(program: Hlo) -> int:
    """How many Pallas kernels a program calls, each place counted once."""
    targets = ("tpu_custom_call", "mosaic_gpu", "triton_kernel_call", "mosaic_gpu_v2")
    return sum(
        any(f'custom_call_target="{target}"' in one.attributes for target in targets)
        or "__gpu$xla.gpu.triton" in one.attributes
        for computation in program.computations.values()
        for one in computation.values()
        if one.opcode == "custom-call"
    )


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in _KINDS else None


def _received(kind: str, size: int) -> float:
    """Bytes that come in for each byte of a chip's own operand."""
    if kind == "all-gather":
        return size - 1.0
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    others = (size - 1) / size
    return 2 * others if kind == "all-reduce" else others


def _operands(computation: Computation, one: Instruction) -> list[ArrayShape]:
    found: list[ArrayShape] = []
    for name in one.operands:
        if name in computation:
            found += computation[name].shapes
    return found


def _group(one: Instruction, mesh: Mapping[str, int]) -> tuple[int, str]:
    """How many chips take part with each other, and along which axes."""
    sizes = tuple(mesh.values())
    chips = math.prod(sizes)
    members: np.ndarray | list[int]
    if pairs := _PAIRS.search(one.attributes):
        numbers = np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
        moved = numbers[numbers[:, 0] != numbers[:, 1]]
        if not len(moved):
            return 1, ""
        source, target = (np.array(np.unravel_index(one, sizes)) for one in moved.T)
        return 2, _axes(mesh, (source != target).any(axis=1))
    if iota := _IOTA.search(one.attributes):
        groups, dims, order = (
            [int(n) for n in part.split(",")] if part else None
            for part in iota.groups()
        )
        assert groups is not None and dims is not None  # noqa: PT018
        numbers = np.arange(math.prod(dims)).reshape(dims)
        members = numbers.transpose(order).reshape(groups)[0]
    elif named := _NAMED_MESH.search(one.attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        taken = re.findall(r"'(\w+)'", named[2])
        numbers = np.arange(chips).reshape([int(size) for size in axes.values()])
        index = tuple(slice(None) if axis in taken else 0 for axis in axes)
        members = numbers[index].ravel()
    elif listed := _LISTED.search(one.attributes):
        members = [int(n) for n in listed[1].split(",") if n]
    else:
        members = np.arange(chips)
    places = np.array(np.unravel_index(np.asarray(members, int), sizes))
    return len(members), _axes(mesh, (places != places[:, :1]).any(axis=1))


def _axes(mesh: Mapping[str, int], differ: np.ndarray) -> str:
    return "+".join(axis for axis, on in zip(mesh, differ, strict=True) if on)


def _flops(computation: Computation, one: Instruction) -> float:
    if one.opcode not in ("dot", "convolution", "custom-call") or not one.shapes:
        return 0.0
    operands = [computation.get(name) for name in one.operands[:2]]
    if len(operands) < 2 or operands[0] is None or operands[1] is None:
        return 0.0
    if not operands[0].shapes or not operands[1].shapes:
        return 0.0
    left, right = operands[0].shapes[0].sizes, operands[1].shapes[0].sizes
    out = one.shapes[0].sizes
    if one.opcode == "convolution":
        return _convolution_flops(one.attributes, left, right, out)
    if one.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", one.attributes)
        summed = [int(n) for n in match[1].split(",") if n] if match else []
    else:
        match = _GEMM.search(one.attributes)
        if "__cublas$" not in one.attributes or match is None:
            return 0.0
        summed = [int(match[1])]
    return 2.0 * math.prod(out) * math.prod(left[index] for index in summed)


def _convolution_flops(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """A TPU writes its products as convolutions, whose padding multiplies nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        return 0.0
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def numbers(name: str, default: int) -> list[int]:
        spatial = len(of_left) - 2
        return [
            int(n) for n in fields.get(name, f"x{default}" * spatial).split("x") if n
        ]

    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")]
    total *= right[of_right.index("i")]
    pads = [part.split("_")[0] for part in fields.get("pad", "").split("x") if part]
    strides, inner = numbers("stride", 1), numbers("lhs_dilate", 1)
    spread = numbers("rhs_dilate", 1)
    for place in range(len(of_left) - 2):
        label = str(place)
        size, kernel = left[of_left.index(label)], right[of_right.index(label)]
        starts = np.arange(out[of_out.index(label)]) * strides[place]
        starts = starts - (int(pads[place]) if pads else 0)
        met = 0
        for tap in range(kernel):
            at = starts + tap * spread[place]
            inside = (at >= 0) & (at <= (size - 1) * inner[place])
            met += int(np.sum(inside & (at % inner[place] == 0)))
        total *= met
    if groups := re.search(r"batch_group_count=(\d+)", attributes):
        total /= int(groups[1])
    return total
