"""What a compiled program does, read from its text: loops, calls and shapes.

XLA prints an optimized program as computations of instructions. A `while` runs its body
so many times, a fusion or a call its computation once: multiplied from the entry down
that is how often each computation runs.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"\b(pred|[suf]\d+\w*|bf16|c64|c128)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|"
    r"false_computation|async_execution_thread_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_LOOP = re.compile(r"\bcondition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"\bindex=(\d+)")
_DIRECTION = re.compile(r"\bdirection=([A-Z]+)")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


class ArrayShape(NamedTuple):
    """Type and sizes of one array."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Without the padding that a layout adds."""
        return -(-math.prod(self.sizes) * bits_of(self.dtype) // 8)


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: by which others refer to it.
      shapes: of its results; several for a tuple.
      opcode: what it does, such as `all-gather` or `fusion`.
      operands: names.
      argument: what stands between the parentheses, for constants.
      attributes: all that follows.
      root: whether it is what its computation gives.
    """

    name: str
    shapes: tuple[ArrayShape, ...]
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool


Computation = dict[str, Instruction]


class Hlo(NamedTuple):
    """A program: computations by name, and the one that it begins with."""

    computations: Mapping[str, Computation]
    entry: str

    def runs(self) -> dict[str, float]:
        """How often each computation runs in one run of the program.

        A loop whose number of turns the text does not say counts as one turn, and of
        branches each counts as taken.
        """
        found: dict[str, float] = {}

        def visit(name: str, times: float) -> None:
            found[name] = found.get(name, 0.0) + times
            for instruction in self.computations[name].values():
                turns = 1.0
                if instruction.opcode == "while":
                    turns = float(self.turns(name, instruction) or 1)
                for called in called_by(instruction):
                    if called in self.computations:
                        visit(called, times * turns)

        visit(self.entry, 1.0)
        return found

    def fused(self) -> set[str]:
        """Computations that are the inside of a fusion."""
        return {
            called
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.opcode == "fusion"
            for called in called_by(instruction)
        }

    def turns(self, inside: str, loop: Instruction) -> int | None:
        """How often a loop runs its body; None where only the data can say."""
        if said := _TRIPS.search(loop.attributes):
            return int(said[1])
        match = _LOOP.search(loop.attributes)
        if match is None:
            return None
        condition, body = (self.computations.get(name, {}) for name in match.groups())
        root = root_of(condition)
        if root is None or root.opcode != "compare" or len(root.operands) != 2:
            return None
        sides = [condition.get(name) for name in root.operands]
        direction = (_DIRECTION.search(root.attributes) or ("", ""))[1]
        if direction == "GT":
            sides.reverse()
        elif direction != "LT":
            return None
        counter, end = sides[0], _constant(sides[1])
        index = counter and _INDEX.search(counter.attributes)
        if not index or end is None:
            return None
        before = self._element(self.computations[inside], loop.operands, int(index[1]))
        start = _constant(before)
        step = self._step(body, int(index[1]))
        # A counter that the compiler starts where the text does not say counts from 0.
        return max(-(-(end - (start or 0)) // (step or 1)), 0)

    def _element(
        self, computation: Computation, operands: tuple[str, ...], index: int
    ) -> Instruction | None:
        made = computation.get(operands[0]) if operands else None
        if made is None or made.opcode != "tuple" or index >= len(made.operands):
            return None
        found = computation.get(made.operands[index])
        while found and found.opcode in ("copy", "bitcast", "convert"):
            found = computation.get(found.operands[0])
        return found

    def _step(self, body: Computation, index: int) -> int | None:
        """By how much a turn counts further."""
        root = root_of(body)
        if root is None or root.opcode != "tuple":
            return None
        one = body.get(root.operands[index])
        while one and one.opcode in ("copy", "bitcast"):
            one = body.get(one.operands[0])
        if one is not None and one.opcode == "fusion":
            name = next(iter(called_by(one)), "")
            body = self.computations.get(name, {})
            one = root_of(body)
        if one is None or one.opcode != "add":
            return None
        for name in one.operands:
            if (number := _constant(body.get(name))) is not None:
                return number
        return None


def parse(text: str) -> Hlo:
    """An optimized program (`compiled.as_text()`), as far as counting needs it."""
    computations: dict[str, Computation] = {}
    entry, inside = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = header[2]
            computations[inside] = {}
            entry = inside if header[1] else entry
        elif inside and (named := _NAMED.match(line)):
            found = _instruction(named[2], bool(named[1]), line[named.end() :])
            if found is not None:
                computations[inside][found.name] = found
    return Hlo(computations, entry)


def called_by(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs."""
    if instruction.opcode == "while":
        if match := _LOOP.search(instruction.attributes):
            yield match[2]
            yield match[1]
        return
    if instruction.opcode in ("async-update", "async-done"):
        return  # what was started runs once
    for names in _CALLED.findall(instruction.attributes):
        for name in names.strip("{}").split(","):
            yield name.strip().removeprefix("%")


def root_of(computation: Computation) -> Instruction | None:
    """What a computation gives."""
    return next((i for i in computation.values() if i.root), None)


def bits_of(dtype: str) -> int:
    """Of a number, by XLA's name of its type."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[suf](\d+)", dtype)
    assert digits is not None, dtype
    return int(digits[1])


def shapes_in(text: str) -> tuple[ArrayShape, ...]:
    """All array types that a text names."""
    return tuple(
        ArrayShape(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(text)
    )


def _instruction(name: str, root: bool, text: str) -> Instruction | None:
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    argument = rest[opening + 1 : closing - 1]
    operands = tuple(
        part.rsplit(" ", 1)[-1].removeprefix("%")
        for part in re.sub(r"/\*.*?\*/", "", argument).replace("{", "(").split(", ")
        if "%" in part or re.fullmatch(r"\s*[A-Za-z_][\w.-]*", part)
    )
    return Instruction(
        name,
        shapes_in(shape),
        rest[:opening],
        operands,
        argument,
        rest[closing:],
        root,
    )


_PARENTHESIS = re.compile(r"[()]")


def _closing(text: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in _PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    text = instruction.argument.strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None
