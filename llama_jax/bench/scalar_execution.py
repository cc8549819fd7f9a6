"""Count how often each block of a schedule runs, by executing its scalar instructions.

Which blocks of a TPU kernel run depends on scalars alone: grid counters, loop bounds,
and what the kernel reads from its prefetched operands (empty blocks of a mask, lengths
of rows). The dump contains all of it, as some forty instructions on 32-bit registers
and scalar memory. `execute` runs these, and no vector instructions, from the first
bundle to the last, and counts. So prologues, skipped blocks, empty grid steps and the
last row's epilogue count as often as they happen, in any schedule.

Registers have the compiler's unique names, so latencies do not matter. Values computed
from vectors are unknown; a branch that depends on one is an error.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.bench.scalar_instructions import (
    HELPERS,
    MASK,
    OPERAND,
    UNKNOWN,
    Op,
    Value,
    address,
    expression,
    parse,
)
from llama_jax.bench.schedule_dump import Block, Schedule

_MOST_BLOCKS = 200_000_000
_GRANULE = 32
"""Bytes per unit of a DMA's size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """One run of a schedule.

    Attributes:
      counts: runs of each block, in order.
      bundles: cycles of all blocks.
      slots: slots used by all blocks, by kind.
      read: bytes that DMAs copied from HBM.
      written: bytes that DMAs copied to HBM.
    """

    counts: tuple[int, ...]
    bundles: int
    slots: Mapping[str, int]
    read: int
    written: int


def execute(schedule: Schedule, operands: Sequence[np.ndarray] = ()) -> Execution:
    """Execute the scalar instructions of a schedule, and count its blocks.

    Args:
      schedule: of a Pallas kernel or fusion.
      operands: its prefetched scalars, in order.

    Raises:
      ValueError: a branch depends on an unknown value, or operands are missing.
    """
    if len(operands) != len(schedule.prefetched):
        raise ValueError(
            f"{schedule.name} prefetches {len(schedule.prefetched)} scalar operands, "
            f"got {len(operands)}"
        )
    memory: dict[Value, Value] = {}
    for index, operand in enumerate(operands):
        base = address(f"#allocation{schedule.prefetched[index]}")
        tile = schedule.tiles[index] if schedule.tiles else 1
        memory |= {base + i: word for i, word in enumerate(smem_words(operand, tile))}
    # The address of the core's index; there is one core.
    memory.setdefault(address("#allocation0"), 0)
    # A single number may be passed in a register instead of memory.
    registers_in = {
        i: int(x.reshape(-1)[0]) & MASK for i, x in enumerate(operands) if x.size == 1
    }
    transfers = {"read": 0, "written": 0}
    code = _translate(schedule, memory, registers_in, transfers)
    counts = [0] * len(code)
    block, entered = 0, "above"
    for _ in range(_MOST_BLOCKS):
        counts[block] += 1
        try:
            following, taken = code[block](entered)
        except ValueError as error:
            start = schedule.blocks[block].start
            raise ValueError(f"{schedule.name}, block at {start}: {error}") from error
        entered = "above" if not taken else "back" if following <= block else "jump"
        block = following
        if block == len(code):
            break
    else:
        raise ValueError(f"{schedule.name}: does not terminate")
    slots = {
        kind: sum(
            n * b.slots[kind] for n, b in zip(counts, schedule.blocks, strict=True)
        )
        for kind in schedule.capacity
    }
    return Execution(
        counts=tuple(counts),
        bundles=sum(
            n * b.bundles for n, b in zip(counts, schedule.blocks, strict=True)
        ),
        slots=slots,
        read=transfers["read"],
        written=transfers["written"],
    )


def smem_words(array: np.ndarray, tile: int) -> list[int]:
    """The words of a scalar operand in the layout of scalar memory.

    Args:
      array: of 8, 16 or 32 bits; vectors are laid out in order.
      tile: rows of a tile; the last two of more axes are laid out tile by tile, each
        of 128 columns, and rows of less than 32 bits share words.
    """
    array = np.asarray(array)
    per_word = 4 // array.itemsize
    if array.ndim < 2 and per_word > 1:
        raise ValueError("the layout of vectors of less than 32 bits is unknown")
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
    """Registers that branches, DMA predicates or scalar memory depend on."""
    by_result: dict[str, list[Op]] = {}
    wanted: set[str] = set()
    for op in (op for block in blocks for op in block):
        if op.result:
            by_result.setdefault(op.result, []).append(op)
        if op.name in ("sbr.rel", "sst") or _kind_of_transfer(op):
            wanted |= op.reads
    needed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in needed:
            needed.add(name)
            for op in by_result.get(name, ()):
                wanted |= op.reads
    return needed


def _translate(
    schedule: Schedule,
    memory: dict[Value, Value],
    registers_in: Mapping[int, int],
    transfers: dict[str, int],
) -> list[Callable[[str], tuple[int, bool]]]:
    """Translate each block to a function that executes it.

    Its argument says how it was entered: "above" from the preceding block, "jump" by a
    branch forward, or "back" by a branch to the head of a loop. It returns the number
    of the next block, and whether its branch was taken.
    """
    parsed = [
        [[op for op in map(parse, bundle) if op is not None] for bundle in block.ops]
        for block in schedule.blocks
    ]
    needed = _needed([[op for bundle in block for op in bundle] for block in parsed])
    registers: list[Value] = []
    register_names: dict[str, str] = {}

    def value(operand: str) -> str:
        if operand.startswith("#"):
            return str(address(operand))
        if not operand.startswith("%"):
            return str(int(operand.lstrip("$"), 0) & MASK)
        if operand not in register_names:
            register_names[operand] = f"registers[{len(registers)}]"
            registers.append(UNKNOWN)
        return register_names[operand]

    heads = {
        number
        for number, block in enumerate(schedule.blocks)
        if any(b.target == block.start <= b.start for b in schedule.blocks)
    }
    number_at = {block.start: number for number, block in enumerate(schedule.blocks)}
    namespace: dict[str, Any] = {
        **HELPERS,
        "memory": memory,
        "registers": registers,
        "registers_in": registers_in,
        "transfers": transfers,
    }
    source = []
    for number, (block, bundles) in enumerate(
        zip(schedule.blocks, parsed, strict=True)
    ):
        source.append(f"def block{number}(entered):")
        source += [
            f"    {line}" for line in _lines(bundles, number in heads, needed, value)
        ]
        following = number + 1
        if block.target is None:
            source.append(f"    return {following}, False")
        else:
            target = number_at[block.target]
            source.append(f"    return ({target} if taken else {following}), taken")
    exec("\n".join(source), namespace)
    return [namespace[f"block{number}"] for number in range(len(schedule.blocks))]


def _lines(
    bundles: Sequence[Sequence[Op]],
    head: bool,
    needed: set[str],
    value: Callable[[str], str],
) -> Iterable[str]:
    """The block as Python statements; they set `taken` if it ends in a branch.

    Operands of a phi at the head of a loop: the values from before the loop and from
    its end. Elsewhere: the values from a jump over the preceding blocks and from them.
    """
    phis = [op for ops in bundles for op in ops if op.name == "sphi"]
    phis = [op for op in phis if op.result in needed]
    if phis:  # all at once: one's result may be another's operand
        left = ", ".join(value(op.result or "") for op in phis)
        if any(len(op.operands) != 2 for op in phis):
            raise ValueError("a phi has an unknown form")
        jumped = ('if entered == "back"', 1) if head else ('if entered == "jump"', 0)
        for keyword, index in (jumped, ("else", 1 - jumped[1])):
            right = ", ".join(value(op.operands[index]) for op in phis)
            yield f"{keyword}: {left} = {right}"
    for ops in bundles:
        # Stores last, since a load in the same bundle reads the old value; renaming of
        # addresses after what computes them.
        for op in sorted(ops, key=_order):
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
                computed = expression(op, value) or "UNKNOWN"
                if guard:
                    # A skipped instruction keeps the old value, or is of no use.
                    other = value(op.otherwise) if op.otherwise else "UNKNOWN"
                    pair = (other, computed) if op.negated else (computed, other)
                    predicate = value(op.predicate or "")
                    computed = f"choose({predicate}, {pair[0]}, {pair[1]})"
                yield f"{value(op.result or '')} = {computed}"
    yield "pass"


def _kind_of_transfer(op: Op) -> str | None:
    """Whether a DMA reads or writes HBM; None if neither."""
    return {"dma.hbm_to_vmem": "read", "dma.vmem_to_hbm": "written"}.get(op.name)


def _order(op: Op) -> int:
    return {"int_to_ptr": 1, "sst": 2}.get(op.name.split(".")[0], 0)


def _store(op: Op, guard: str, value: Callable[[str], str]) -> Iterable[str]:
    target, _, stored = op.text.rpartition("]]")
    terms = [value(operand) for operand in OPERAND.findall(target)]
    [source] = map(value, OPERAND.findall(stored))
    index = f"({' + '.join(terms)}) & 0xFFFFFFFF"
    yield f"{f'if {guard}: ' if guard else ''}memory[{index}] = {source}"


def _transfer(op: Op, guard: str, value: Callable[[str], str]) -> Iterable[str]:
    kind = _kind_of_transfer(op)
    if kind is None:
        return
    granules = value(op.operands[1])  # between source and target
    condition = f"if {guard}: " if guard else ""
    yield f"{condition}transfers[{kind!r}] += {_GRANULE} * {granules}"


def inner_block(schedule: Schedule, execution: Execution) -> Block:
    """The block in which a schedule spends most of its cycles."""
    pairs = zip(execution.counts, schedule.blocks, strict=True)
    return max(pairs, key=lambda pair: pair[0] * pair[1].bundles)[1]
