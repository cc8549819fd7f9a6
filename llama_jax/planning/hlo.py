"""Parse the text of a compiled program (HLO): computations, loops, calls and shapes.

XLA prints an optimized program as computations of instructions. A `while` runs its body
once per trip, a fusion or a call runs its computation once; multiplied from the entry
down, this gives the number of runs of each computation.
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
    """Dtype and shape of an array."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes, without the padding that a layout adds."""
        return -(-math.prod(self.sizes) * bits_of(self.dtype) // 8)


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      name: other instructions refer to it by this name.
      shapes: of its results; several for a tuple.
      opcode: the operation, such as `all-gather` or `fusion`.
      operands: names.
      argument: the text between the parentheses, for constants.
      attributes: all text that follows.
      root: whether it is the result of its computation.
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
    """A program: its computations by name, and the name of the entry computation."""

    computations: Mapping[str, Computation]
    entry: str

    def runs(self) -> dict[str, float]:
        """Number of runs of each computation in one run of the program.

        A loop whose trip count the text does not give counts as one trip. Every branch
        counts as taken.
        """
        counts: dict[str, float] = {}

        def visit(name: str, times: float) -> None:
            counts[name] = counts.get(name, 0.0) + times
            for instruction in self.computations[name].values():
                trips = 1.0
                if instruction.opcode == "while":
                    trips = float(self.trip_count(name, instruction) or 1)
                for called in called_by(instruction):
                    if called in self.computations:
                        visit(called, times * trips)

        visit(self.entry, 1.0)
        return counts

    def fused(self) -> set[str]:
        """Names of the computations that fusions call."""
        return {
            called
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.opcode == "fusion"
            for called in called_by(instruction)
        }

    def trip_count(self, caller: str, loop: Instruction) -> int | None:
        """Number of times a loop runs its body; None if it depends on data.

        Args:
          caller: name of the computation that contains the loop.
          loop: a `while` instruction.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
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
        initial = self._element(self.computations[caller], loop.operands, int(index[1]))
        start = _constant(initial)
        step = self._step(body, int(index[1]))
        # If the text does not give the counter's first value, it is taken to be 0.
        return max(-(-(end - (start or 0)) // (step or 1)), 0)

    def _element(
        self, computation: Computation, operands: tuple[str, ...], index: int
    ) -> Instruction | None:
        operand = computation.get(operands[0]) if operands else None
        if operand is None or operand.opcode != "tuple":
            return None
        if index >= len(operand.operands):
            return None
        element = computation.get(operand.operands[index])
        while element and element.opcode in ("copy", "bitcast", "convert"):
            element = computation.get(element.operands[0])
        return element

    def _step(self, body: Computation, index: int) -> int | None:
        """The increment of a loop's counter in each trip."""
        root = root_of(body)
        if root is None or root.opcode != "tuple":
            return None
        counter = body.get(root.operands[index])
        while counter and counter.opcode in ("copy", "bitcast"):
            counter = body.get(counter.operands[0])
        if counter is not None and counter.opcode == "fusion":
            name = next(iter(called_by(counter)), "")
            body = self.computations.get(name, {})
            counter = root_of(body)
        if counter is None or counter.opcode != "add":
            return None
        for name in counter.operands:
            if (number := _constant(body.get(name))) is not None:
                return number
        return None


def parse(text: str) -> Hlo:
    """Parse an optimized program (`compiled.as_text()`)."""
    computations: dict[str, Computation] = {}
    entry, inside = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = header[2]
            computations[inside] = {}
            entry = inside if header[1] else entry
        elif inside and (named := _NAMED.match(line)):
            rest = line[named.end() :]
            if instruction := _instruction(named[2], bool(named[1]), rest):
                computations[inside][instruction.name] = instruction
    return Hlo(computations, entry)


def called_by(instruction: Instruction) -> Iterator[str]:
    """Names of the computations that an instruction calls."""
    if instruction.opcode == "while":
        if match := _LOOP.search(instruction.attributes):
            yield match[2]
            yield match[1]
        return
    if instruction.opcode in ("async-update", "async-done"):
        return  # async-start has counted it
    for names in _CALLED.findall(instruction.attributes):
        for name in names.strip("{}").split(","):
            yield name.strip().removeprefix("%")


def root_of(computation: Computation) -> Instruction | None:
    """The instruction that is the result of a computation."""
    return next((i for i in computation.values() if i.root), None)


def bits_of(dtype: str) -> int:
    """Bits per number of a dtype in XLA's spelling."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[suf](\d+)", dtype)
    assert digits is not None, dtype
    return int(digits[1])


def shapes_in(text: str) -> tuple[ArrayShape, ...]:
    """All array shapes in a text."""
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
    """Index after the parenthesis that closes the one at `start`."""
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
