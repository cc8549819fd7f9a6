"""Parse the compiler's dump of a TPU program's schedule into blocks of bundles.

A *bundle* is what a TPU core runs in one cycle: a wide instruction with slots for
matrix units (MXU), the transposer (XLU), vector arithmetic (VALU), transcendental
functions (EUP), vector loads and stores, and scalars.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Mapping

DELAY_SLOTS = 4
"""Bundles after a branch that run whether it is taken or not."""

_HEAD = re.compile(r"(?m)^ *(0x[0-9a-f]+|0) +(?:[A-Z][A-Z])? ?: ([ >]*)\{")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_END = re.compile(r"\s\}|^\}")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"\bsbr\.rel\b.*\$region(\d+)")
_LABEL = re.compile(r" *(?:0x[0-9a-f]+|0) +(LB|LH|LE|PB|PF|CT):")
_ALLOCATION = re.compile(
    r"#allocation(\d+) \[.*?space=(\w+), size = (0x[0-9a-f]+).*?tag = '([^']*)'"
)


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive bundles that always run together.

    Attributes:
      start: address of the first bundle.
      ops: instructions of each bundle, as in the dump.
      slots: number of slots used, by kind.
      depth: number of loops around it.
      target: address of its branch; None if it does not end in one.
    """

    start: int
    ops: tuple[tuple[str, ...], ...]
    slots: Mapping[str, int]
    depth: int
    target: int | None

    @property
    def bundles(self) -> int:
        """Cycles that it takes: its bundles and their explicit delays."""
        waits = re.findall(r"\bvdelay (\d+)", " ".join(sum(self.ops, ())))
        return len(self.ops) + sum(map(int, waits))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The schedule of a Pallas kernel or of an XLA fusion.

    Attributes:
      name: the compiler's name of it.
      blocks: in the order of their addresses.
      capacity: slots in a bundle, by kind.
      prefetched: numbers of the allocations of its scalar operands, in order.
      vmem: bytes of windows, scratch and spills.
      tiles: rows of a tile in the layout of each operand; None for XLA fusions.
    """

    name: str
    blocks: tuple[Block, ...]
    capacity: Mapping[str, int]
    prefetched: tuple[int, ...]
    vmem: int
    tiles: tuple[int, ...] | None = None

    @property
    def stem(self) -> str:
        """The name without the number that makes it unique."""
        return re.sub(r"(\.\d+)+$", "", self.name)


def read_schedules(folder: str) -> Iterator[Schedule]:
    """Read all schedules of a dump, after the compiler's last pass."""
    for final in sorted(glob.glob(glob.escape(folder) + "/*-final_bundles.txt")):
        stem = re.sub(r"-\d+-final_bundles\.txt$", "", final)
        name = os.path.basename(stem).split("-", 1)[1]
        if name == "TLP" or name.startswith("<"):
            continue  # it calls the others
        usage = _only(stem, "final_hlo-static-per-bundle-utilization")
        allocations = _only(stem, "post-ra")
        yield read_schedule(name, _text(final), _text(usage), _text(allocations))


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


def read_schedule(name: str, final: str, usage: str, allocations: str) -> Schedule:
    """Parse a schedule from the texts of its dump.

    Args:
      name: the compiler's name of it.
      final: text of the final bundles.
      usage: text of the slot utilization per bundle.
      allocations: text of a pass that lists allocations.

    Raises:
      ValueError: the dump has another format.
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
        for branch in filter(None, map(_BRANCH.search, bundle)):
            targets[address] = regions[branch[1]]
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
    return Schedule(
        name=name,
        blocks=tuple(blocks),
        capacity=dict(zip(kinds, capacity, strict=True)),
        prefetched=tuple(prefetched[index] for index in sorted(prefetched)),
        vmem=sum(vmem.values()),
    )


def _read_usage(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Kinds of slots, the number of each in a bundle, and the numbers used."""
    kinds: list[str] = []
    rows = []
    for line in text.splitlines():
        if line.startswith("MATMUL"):
            kinds = [kind.strip() for kind in line.split(",")]
        elif re.fullmatch(r"[\d ]*\d[\d ]*", line):
            rows.append([int(number) for number in line.split()])
    if not kinds or not rows or any(len(row) != len(kinds) for row in rows):
        raise ValueError(
            "this libtpu writes schedules in an unknown format; pip install --upgrade "
            "libtpu (0.0.52 works)"
        )
    return kinds, rows[0], rows[1:]


def _operations(text: str) -> tuple[str, ...]:
    """The instructions of one bundle, without comments."""
    body = _COMMENT.sub("", text.partition("{")[2])
    end = _END.search(body)
    body = body[: end.start()] if end else body
    return tuple(op.strip() for op in body.split(";;") if op.strip())
