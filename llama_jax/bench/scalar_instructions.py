"""Parse the scalar instructions of a TPU kernel's dump, and translate them to Python.

Registers are unsigned 32-bit numbers; predicates are 0 or 1.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

MASK = 0xFFFFFFFF
_ALLOCATION_WORDS = 1 << 20

NAME = re.compile(r"%[sp]\d+_[sp]\d+")
_OP = re.compile(r"(?:(%\w+) = )?([a-z][\w.]*)(.*)", re.DOTALL)
_PREDICATE = re.compile(r"\((!?)(%p\w+)(?:, ([^)]+))?\)")
OPERAND = re.compile(
    r"%[sp]\d+_[sp]\d+|#allocation\d+(?:_spill)?(?: \+ \$0x[0-9a-f]+)?"
    r"|\$?-?0x[0-9a-f]+|\d+"
)
_THREAD = re.compile(r"\[thread:[^]]*\]")


class Unknown:
    """A value that is known on a TPU only, or that is computed from one."""

    def _same(self, *_: object) -> "Unknown":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _same
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __neg__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = _same
    __eq__ = __ne__ = _same  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise ValueError("what is executed depends on an unknown value")


UNKNOWN = Unknown()

Value = int | Unknown
"""A number, as far as it is known."""


@dataclasses.dataclass
class Op:
    """One scalar instruction: `result = name(operands) if predicate else otherwise`."""

    result: str | None
    name: str
    operands: list[str]
    predicate: str | None
    negated: bool
    otherwise: str | None
    text: str

    @property
    def reads(self) -> set[str]:
        """Registers that it reads."""
        operands = [*self.operands, self.predicate or "", self.otherwise or ""]
        return {name for name in operands if NAME.fullmatch(name)}


def parse(text: str) -> Op | None:
    """Parse an instruction; None if it is not one."""
    match = _OP.fullmatch(text)
    if match is None:
        return None
    result, name, rest = match.groups()
    guard = _PREDICATE.search(rest)
    if guard:
        rest = rest[: guard.start()] + rest[guard.end() :]
    rest = _THREAD.sub("", rest)
    return Op(
        result=result if result and NAME.fullmatch(result) else None,
        name=name,
        operands=OPERAND.findall(rest),
        predicate=guard and guard[2],
        negated=bool(guard and guard[1]),
        otherwise=guard and guard[3],
        text=rest,
    )


def _signed(operand: str) -> str:
    return f"(({operand} ^ 0x80000000) - 0x80000000)"


_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BINARY = {
    "sadd": "({} + {}) & 0xFFFFFFFF",
    "ssub": "({} - {}) & 0xFFFFFFFF",
    "smul": "({} * {}) & 0xFFFFFFFF",
    "sand": "{} & {}",
    "sor": "{} | {}",
    "sxor": "{} ^ {}",
    "sshll": "({} << {}) & 0xFFFFFFFF",
    "sshrl": "{} >> {}",
    "por": "bool_or({}, {})",
    "pand": "bool_and({}, {})",
    "pnand": "1 - bool_and({}, {})",
    "pnor": "1 - bool_or({}, {})",
    "pxor": "{} ^ {}",
}


def expression(op: Op, value: Callable[[str], str]) -> str | None:
    """The instruction as a Python expression; None if it is unknown."""
    name, *kind = op.name.split(".")
    operands = [value(operand) for operand in op.operands]
    if name in ("smov", "int_to_ptr") and len(operands) == 1:
        return operands[0]
    if name == "inlined_call_operand" and "no memory space" in op.text:
        index = re.search(r"index: (\d+), kind: input", op.text)
        return f"registers_in.get({index[1]}, UNKNOWN)" if index else None
    if name == "scalar_lea":
        return f"({' + '.join(operands)}) & 0xFFFFFFFF"
    if name == "pneg":
        return f"1 - {operands[0]}"
    if name == "pmov":
        return operands[0]
    if name == "scalar_select":
        return f"choose({', '.join(operands)})"
    if name == "sld":
        return f"memory.get(({' + '.join(operands)}) & 0xFFFFFFFF, UNKNOWN)"
    if name == "scmp":
        if "s32" in kind:
            operands = [_signed(operand) for operand in operands]
        return f"compare({operands[0]} {_COMPARE[kind[0]]} {operands[1]})"
    if name == "sshra":
        return f"({_signed(operands[0])} >> {operands[1]}) & 0xFFFFFFFF"
    if name in ("smin", "smax"):
        if "s32" in kind:
            low, high = (_signed(operand) for operand in operands)
            return f"{name[1:]}({low}, {high}) & 0xFFFFFFFF"
        return f"{name[1:]}({operands[0]}, {operands[1]})"
    if name in _BINARY and len(operands) == 2 and kind in ([], ["u32"], ["s32"]):
        return _BINARY[name].format(*operands)
    return None


def address(symbol: str) -> int:
    """The address of an allocation; all allocations and their spills are disjoint."""
    name, _, offset = symbol.partition(" + $")
    number, spill = re.fullmatch(r"#allocation(\d+)(_spill)?", name).groups()  # type: ignore[union-attr]
    base = (2 * int(number) + bool(spill) + 1) * _ALLOCATION_WORDS
    return base + int(offset or "0", 16)


def _and(left: Value, right: Value) -> Value:
    known = [x for x in (left, right) if not isinstance(x, Unknown)]
    return 0 if 0 in known else UNKNOWN if len(known) < 2 else 1


def _or(left: Value, right: Value) -> Value:
    known = [x for x in (left, right) if not isinstance(x, Unknown)]
    return 1 if 1 in known else UNKNOWN if len(known) < 2 else 0


def _choose(condition: Value, yes: Value, no: Value) -> Value:
    if isinstance(condition, Unknown):
        return UNKNOWN
    return yes if condition else no


def _compare(outcome: bool | Unknown) -> Value:
    return outcome if isinstance(outcome, Unknown) else int(outcome)


HELPERS: Mapping[str, object] = {
    "UNKNOWN": UNKNOWN,
    "bool_and": _and,
    "bool_or": _or,
    "choose": _choose,
    "compare": _compare,
}
"""Names that expressions of `expression` use."""
