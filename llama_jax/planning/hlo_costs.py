"""Communication and matrix products of a compiled program, from its HLO text."""

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
    """All collectives of a program of one kind, mesh axes and dtype.

    Attributes:
      kind: XLA's name, such as `all-gather`.
      axes: the mesh axes whose chips communicate, joined by `+`.
      dtype: of the data.
      times: runs in a step.
      nbytes: bytes that each chip receives in a step.
    """

    kind: str
    axes: str
    dtype: str
    times: float
    nbytes: float


def collectives(program: Hlo, mesh: Mapping[str, int]) -> list[Collective]:
    """Count the collectives of one run of a program, largest first.

    An asynchronous collective counts once, not at start and done. In an all-gather a
    chip receives everything but its own part; in a reduce-scatter, as much; in an
    all-reduce, twice as much.

    Args:
      program: compiled for all chips of the mesh.
      mesh: sizes by axis, in the order in which its devices are numbered.
    """
    runs, fused = program.runs(), program.fused()
    counts: dict[tuple[str, str, str], list[float]] = collections.defaultdict(
        lambda: [0.0, 0.0]
    )
    # A TPU program repeats an asynchronous collective in every fusion that computes
    # during it, always with the same channel: it happens where that runs least often.
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
            sent = _operand_shapes(computation, instruction)
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
    totals = [Collective(*key, *count) for key, count in counts.items()]
    return sorted(totals, key=lambda collective: -collective.nbytes)


def product_flops(program: Hlo) -> float:
    """Count the FLOPs of all matrix products of one run, on one chip.

    A multiply-add counts as two. Products inside Pallas kernels are not counted.
    """
    total = 0.0
    for name, times in program.runs().items():
        computation = program.computations[name]
        for instruction in computation.values():
            total += times * _flops(computation, instruction)
    return total


def kernel_calls(program: Hlo) -> int:
    """Count the calls to Pallas kernels in a program's text."""
    targets = ("tpu_custom_call", "mosaic_gpu", "triton_kernel_call", "mosaic_gpu_v2")
    return sum(
        any(f'custom_call_target="{target}"' in call.attributes for target in targets)
        or "__gpu$xla.gpu.triton" in call.attributes
        for computation in program.computations.values()
        for call in computation.values()
        if call.opcode == "custom-call"
    )


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in _KINDS else None


def _received(kind: str, size: int) -> float:
    """Bytes received per byte of a chip's own operand, in a group of this size."""
    if kind == "all-gather":
        return size - 1.0
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    others = (size - 1) / size
    return 2 * others if kind == "all-reduce" else others


def _operand_shapes(
    computation: Computation, instruction: Instruction
) -> list[ArrayShape]:
    return [
        shape
        for name in instruction.operands
        if name in computation
        for shape in computation[name].shapes
    ]


def _group(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[int, str]:
    """The number of chips that communicate with each other, and along which axes."""
    text, sizes = instruction.attributes, tuple(mesh.values())
    chips = math.prod(sizes)
    members: np.ndarray | list[int]
    if pairs := _PAIRS.search(text):
        numbers = np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
        moved = numbers[numbers[:, 0] != numbers[:, 1]]
        if not len(moved):
            return 1, ""
        source, target = (np.array(np.unravel_index(ids, sizes)) for ids in moved.T)
        return 2, _axes(mesh, (source != target).any(axis=1))
    if iota := _IOTA.search(text):
        groups, dims, order = (
            [int(n) for n in part.split(",")] if part else None
            for part in iota.groups()
        )
        assert groups is not None and dims is not None  # noqa: PT018
        numbers = np.arange(math.prod(dims)).reshape(dims)
        members = numbers.transpose(order).reshape(groups)[0]
    elif named := _NAMED_MESH.search(text):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        communicating = re.findall(r"'(\w+)'", named[2])
        numbers = np.arange(chips).reshape([int(size) for size in axes.values()])
        index = tuple(slice(None) if axis in communicating else 0 for axis in axes)
        members = numbers[index].ravel()
    elif listed := _LISTED.search(text):
        members = [int(n) for n in listed[1].split(",") if n]
    else:
        members = np.arange(chips)
    coordinates = np.array(np.unravel_index(np.asarray(members, int), sizes))
    return len(members), _axes(mesh, (coordinates != coordinates[:, :1]).any(axis=1))


def _axes(mesh: Mapping[str, int], differ: np.ndarray) -> str:
    return "+".join(axis for axis, on in zip(mesh, differ, strict=True) if on)


def _flops(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0
    operands = [computation.get(name) for name in instruction.operands[:2]]
    shapes = [operand.shapes[0] for operand in operands if operand and operand.shapes]
    if len(shapes) < 2 or not instruction.shapes:
        return 0.0
    left, right = (shape.sizes for shape in shapes)
    out, attributes = instruction.shapes[0].sizes, instruction.attributes
    if instruction.opcode == "convolution":
        return _convolution_flops(attributes, left, right, out)
    if instruction.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", attributes)
        contracted = [int(n) for n in match[1].split(",") if n] if match else []
    else:
        match = _GEMM.search(attributes)
        if "__cublas$" not in attributes or match is None:
            return 0.0
        contracted = [int(match[1])]
    return 2.0 * math.prod(out) * math.prod(left[index] for index in contracted)


def _convolution_flops(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """TPU programs write products as convolutions; padding is not multiplied."""
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
    strides, dilations = numbers("stride", 1), numbers("rhs_dilate", 1)
    base_dilations = numbers("lhs_dilate", 1)
    for axis in range(len(of_left) - 2):
        label = str(axis)
        size, kernel = left[of_left.index(label)], right[of_right.index(label)]
        starts = np.arange(out[of_out.index(label)]) * strides[axis]
        starts = starts - (int(pads[axis]) if pads else 0)
        products = 0
        for tap in range(kernel):
            at = starts + tap * dilations[axis]
            inside = (at >= 0) & (at <= (size - 1) * base_dilations[axis])
            products += int(np.sum(inside & (at % base_dilations[axis] == 0)))
        total *= products
    if groups := re.search(r"batch_group_count=(\d+)", attributes):
        total /= int(groups[1])
    return total
