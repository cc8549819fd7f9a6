"""How often each block of a kernel is executed: its scalar instructions, followed.

Which blocks of a TPU kernel run depends on scalars alone: the grid's counters, the
bounds of loops, and what the kernel reads from its prefetched operands (the blocks of a
mask that are empty, the lengths of rows). All of it is in the dump, as some forty
instructions on 32-bit registers and scalar memory. `follow` executes these, and nothing
that works on vectors, from the first bundle to the last, and counts. So a prologue, a
skipped block, an empty step of the grid and the last row's epilogue are counted as
often as they happen, for any kernel alike, whoever wrote it.

Registers are taken by the compiler's own unique names, so that latencies need no care.
What is computed from vectors is unknown; a branch that depends on it is refused.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.bench.instructions import (
    HELPERS,
    MASK,
    OPERAND,
    UNKNOWN,
    Op,
    address,
    expression,
    parse,
)
from llama_jax.bench.schedule import Block, Kernel

_MOST_BLOCKS = 200_000_000
_GRANULE = 32
"""Bytes of a unit that DMA sizes are written in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """One run of a kernel.

    Attributes:
      counts: how often each block was executed, in the blocks' order.
      bundles: cycles of all of them.
      slots: used by all of them, by kind.
      read: bytes that its DMAs brought from HBM.
      written: bytes that they took there.
    """

    counts: tuple[int, ...]
    bundles: int
    slots: Mapping[str, int]
    read: int
    written: int


def follow(kernel: Kernel, operands: Sequence[np.ndarray] = ()) -> Execution:
    """Execute a kernel's scalar instructions, and count its blocks.

    Args:
      kernel: from `schedule.schedules`.
      operands: its prefetched scalars, in their order.

    Raises:
      ValueError: a branch depends on what is not known, or operands are missing.
    """
    if len(operands) != len(kernel.prefetched):
        raise ValueError(
            f"{kernel.name} prefetches {len(kernel.prefetched)} scalar operands; "
            f"{len(operands)} are given"
        )
    memory: dict[Any, Any] = {}
    for index, operand in enumerate(operands):
        base = address(f"#allocation{kernel.prefetched[index]}")
        tile = kernel.tiles[index] if kernel.tiles else 1
        memory |= {base + i: word for i, word in enumerate(smem_words(operand, tile))}
    # The address of the core's own number; there is one core.
    memory.setdefault(address("#allocation0"), 0)
    # One number need not be in memory: the caller may hand it over in a register.
    handed = {
        i: int(x.reshape(-1)[0]) & MASK for i, x in enumerate(operands) if x.size == 1
    }
    transfers = {"read": 0, "written": 0}
    code = _translate(kernel, memory, handed, transfers)
    counts = [0] * len(code)
    block, entered = 0, "above"
    for _ in range(_MOST_BLOCKS):
        counts[block] += 1
        try:
            following, taken = code[block](entered)
        except ValueError as error:
            start = kernel.blocks[block].start
            raise ValueError(f"{kernel.name}, block at {start}: {error}") from error
        entered = "above" if not taken else "back" if following <= block else "jump"
        block = following
        if block == len(code):
            break
    else:
        raise ValueError(f"{kernel.name}: does not end")
    slots = {
        kind: sum(n * b.slots[kind] for n, b in zip(counts, kernel.blocks, strict=True))
        for kind in kernel.capacity
    }
    return Execution(
        counts=tuple(counts),
        bundles=sum(n * b.bundles for n, b in zip(counts, kernel.blocks, strict=True)),
        slots=slots,
        read=transfers["read"],
        written=transfers["written"],
    )


def smem_words(array: np.ndarray, tile: int) -> list[int]:
    """A scalar operand as its words lie in scalar memory.

    Args:
      array: of 8, 16 or 32 bits; a vector lies as it is.
      tile: of more axes, the last two lie in tiles of so many rows and 128 columns,
        one after another; of bytes and halves, rows share words.
    """
    array = np.asarray(array)
    per_word = 4 // array.itemsize
    if array.ndim < 2 and per_word > 1:
        raise ValueError("a vector of less than 32 bits has no known place")
    if array.ndim < 2:
        return [int(x) & MASK for x in array.reshape(-1)]
    stacked = array.reshape(-1, *array.shape[-2:])
    _, rows, columns = stacked.shape
    padded = np.pad(stacked, ((0, 0), (0, -rows % tile), (0, -columns % 128)))
    depth, rows, columns = padded.shape
    shape = (depth, rows // tile, tile // per_word, per_word, columns // 128, 128)
    tiles = padded.reshape(shape).transpose(0, 1, 4, 2, 5, 3)
    bits = tiles.astype(np.int64) & ((1 << 8 * array.itemsize) - 1)
    shifts = 8 * array.itemsize * np.arange(per_word)
    return [int(word) for word in np.sum(bits << shifts, axis=-1).reshape(-1)]


def _needed(blocks: Sequence[Sequence[Op]]) -> set[str]:
    """Registers that a branch, a DMA's predicate or scalar memory depends on."""
    by_result: dict[str, list[Op]] = {}
    wanted: set[str] = set()
    for op in (op for block in blocks for op in block):
        if op.result:
            by_result.setdefault(op.result, []).append(op)
        if op.name in ("sbr.rel", "sst") or _kind_of_transfer(op):
            wanted |= op.reads
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            for op in by_result.get(name, ()):
                wanted |= op.reads
    return found


def _translate(
    kernel: Kernel,
    memory: dict[Any, Any],
    handed: Mapping[int, int],
    transfers: dict[str, int],
) -> list[Callable[[str], tuple[int, bool]]]:
    """A function of each block, which executes it.

    It is told how it is entered: from the block above, by a jump forward over others,
    or back to it, as the head of a loop is but once. It returns the number of the next
    block, and whether its branch to it is taken.
    """
    parsed = [
        [[op for op in map(parse, bundle) if op is not None] for bundle in block.ops]
        for block in kernel.blocks
    ]
    needed = _needed([[op for bundle in block for op in bundle] for block in parsed])
    registers: list[Any] = []
    places: dict[str, str] = {}

    def value(operand: str) -> str:
        if operand.startswith("#"):
            return str(address(operand))
        if not operand.startswith("%"):
            return str(int(operand.lstrip("$"), 0) & MASK)
        if operand not in places:
            places[operand] = f"registers[{len(registers)}]"
            registers.append(UNKNOWN)
        return places[operand]

    heads = {
        number
        for number, block in enumerate(kernel.blocks)
        if any(b.target == block.start <= b.start for b in kernel.blocks)
    }
    number_at = {block.start: number for number, block in enumerate(kernel.blocks)}
    namespace: dict[str, Any] = {
        **HELPERS,
        "memory": memory,
        "registers": registers,
        "handed": handed,
        "transfers": transfers,
    }
    source = []
    for number, (block, bundles) in enumerate(zip(kernel.blocks, parsed, strict=True)):
        source.append(f"def block{number}(entered):")
        source += [
            f"    {line}" for line in _lines(bundles, number in heads, needed, value)
        ]
        following = number + 1
        if block.target is None:
            source.append(f"    return {following}, False")
        else:
            there = number_at[block.target]
            source.append(f"    return ({there} if taken else {following}), taken")
    exec("\n".join(source), namespace)
    return [namespace[f"block{number}"] for number in range(len(kernel.blocks))]


def _lines(
    bundles: Sequence[Sequence[Op]],
    head: bool,
    needed: set[str],
    value: Callable[[str], str],
) -> Iterable[str]:
    """The block as Python statements: `taken` says if its branch is.

    A phi's operands are, at the head of a loop, what comes from before and from the
    loop's end; elsewhere what a jump over the blocks above brings, and those blocks.
    """
    phis = [op for ops in bundles for op in ops if op.name == "sphi"]
    phis = [op for op in phis if op.result in needed]
    if phis:  # all at once: one's result may be another's operand
        left = ", ".join(value(op.result or "") for op in phis)
        if any(len(op.operands) != 2 for op in phis):
            raise ValueError("a phi of a form that is not known")
        jumped = ('if entered == "back"', 1) if head else ('if entered == "jump"', 0)
        for keyword, index in (jumped, ("else", 1 - jumped[1])):
            right = ", ".join(value(op.operands[index]) for op in phis)
            yield f"{keyword}: {left} = {right}"
    for ops in bundles:
        # Stores last, since a load beside one reads what was there before; what only
        # renames an address after what computes it.
        for op in sorted(ops, key=_turn):
            guard = ""
            if op.predicate:
                guard = value(op.predicate)
                guard = f"not {guard}" if op.negated else guard
            if op.name == "sbr.rel":
                yield f"taken = {guard or 'True'}"
            elif op.name == "sst":
                yield from _store(op, guard, value)
            elif op.name.startswith("dma."):
                yield from _transfer(op, guard, value)
            elif op.result in needed and op.name != "sphi":
                found = expression(op, value) or "UNKNOWN"
                if guard:
                    # What is skipped leaves what was there, or nothing of use.
                    other = value(op.otherwise) if op.otherwise else "UNKNOWN"
                    sign = (other, found) if op.negated else (found, other)
                    bare = value(op.predicate or "")
                    found = f"choose({bare}, {sign[0]}, {sign[1]})"
                yield f"{value(op.result or '')} = {found}"
    yield "pass"


def _kind_of_transfer(op: Op) -> str | None:
    """Whether a DMA reads the memory of the chip, or writes it; None if neither."""
    return {"dma.hbm_to_vmem": "read", "dma.vmem_to_hbm": "written"}.get(op.name)


def _turn(op: Op) -> int:
    return {"int_to_ptr": 1, "sst": 2}.get(op.name.split(".")[0], 0)


def _store(op: Op, guard: str, value: Callable[[str], str]) -> Iterable[str]:
    target, _, stored = op.text.rpartition("]]")
    places = [value(operand) for operand in OPERAND.findall(target)]
    [source] = map(value, OPERAND.findall(stored))
    where = f"({' + '.join(places)}) & 0xFFFFFFFF"
    yield f"{f'if {guard}: ' if guard else ''}memory[{where}] = {source}"


def _transfer(op: Op, guard: str, value: Callable[[str], str]) -> Iterable[str]:
    kind = _kind_of_transfer(op)
    if kind is None:
        return
    granules = value(op.operands[1])  # after where from, before where to
    condition = f"if {guard}: " if guard else ""
    yield f"{condition}transfers[{kind!r}] += {_GRANULE} * {granules}"


def inner_block(kernel: Kernel, execution: Execution) -> Block:
    """The block in which the kernel spends most of its cycles."""
    pairs = zip(execution.counts, kernel.blocks, strict=True)
    return max(pairs, key=lambda pair: pair[0] * pair[1].bundles)[1]
