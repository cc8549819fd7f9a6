"""Jinja for chat templates: the environment of `transformers`, in a sandbox.

A template comes with a checkpoint, so it is untrusted. It sees its variables and
nothing else: no private attribute, no file. It changes no argument, and what it builds
is bounded: all texts and lists together by `MAX_SIZE`, integers by `MAX_BITS`.
"""

import contextvars
import dataclasses
import functools
import itertools
import json
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llama_jax.errors import PromptError

_Value = TypeVar("_Value")

MAX_SIZE = 1 << 26
"""Most characters and items that a template builds in one rendering."""

MAX_BITS = 4096
"""Most bits of an integer."""

_STEP = 64  # characters that a call or a step of a loop counts as


@dataclasses.dataclass
class _Rendering:
    """State of a rendering: what may still be built, and texts around answers."""

    budget: int = dataclasses.field(default_factory=lambda: MAX_SIZE)
    marks: tuple[str, str] = ("", "")


_rendering: contextvars.ContextVar[_Rendering] = contextvars.ContextVar("rendering")


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """Compile a template.

    Raises:
      PromptError: a syntax error, with its line.
    """
    token = _rendering.set(_Rendering())
    try:
        return _Environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(f"line {error.lineno}: {error.message}") from error
    except Exception as error:  # constants are computed here
        raise PromptError(_reason(error)) from error
    finally:
        _rendering.reset(token)


def render(
    template: jinja2.Template,
    variables: Mapping[str, object],
    *,
    marks: tuple[str, str] = ("", ""),
) -> str:
    """Render a template.

    Args:
      template: from `compile_template`.
      variables: by name.
      marks: texts to put before and after the contents of `generation` tags.

    Raises:
      PromptError: in the template's own words, or with the line that failed.
    """
    token = _rendering.set(_Rendering(marks=marks))
    try:
        return template.render(variables)
    except Exception as error:  # whatever a template does wrong
        raise PromptError(_reason(error)) from error
    finally:
        _rendering.reset(token)


class _Raised(jinja2.TemplateError):
    """Raised by `raise_exception`."""


class _TooLarge(jinja2.TemplateError):
    """The template builds too much."""


def _reason(error: Exception) -> str:
    if isinstance(error, _Raised):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{error or type(error).__name__}"


# What a template builds


def _spend(size: int) -> None:
    rendering = _rendering.get()
    rendering.budget -= size
    if rendering.budget < 0:
        raise _TooLarge(f"it builds more than {MAX_SIZE:,} characters")


def _spent(value: _Value) -> _Value:
    """The value, after what it adds to memory is counted."""
    if isinstance(value, str | list | tuple | dict):
        _spend(len(value))
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _TooLarge(f"a number has more than {MAX_BITS:,} bits")
    return value


def _size(value: object) -> int:
    """Characters and items of a value as text."""
    if isinstance(value, str):
        return len(value)
    parts: Iterable[object] = ()
    if isinstance(value, Mapping):
        parts = itertools.chain(value.keys(), value.values())
    elif isinstance(value, list | tuple):
        parts = value
    total = 1
    for part in parts:
        total += _size(part)
        if total > MAX_SIZE:
            raise _TooLarge(f"it builds more than {MAX_SIZE:,} characters")
    return total


def _check_factors(*values: object) -> None:
    """Check what an operation may build: the product of its two largest arguments."""
    factors = sorted(
        abs(value) if isinstance(value, int) else _size(value) for value in values
    )
    if functools.reduce(int.__mul__, factors[-2:], 1) > MAX_SIZE:
        raise _TooLarge(f"it builds more than {MAX_SIZE:,} characters")


def _widths(text: str) -> list[int]:
    """The numbers in a format string, of which some may be widths."""
    return [int(digits[:12]) for digits in re.findall(r"\d+", text)]


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is counted."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if name not in ("d", "default"):  # they build nothing
            values = args[hasattr(function, "jinja_pass_arg") :]  # without a context
            widths = _widths(str(values[0])) if name == "format" else ()
            _check_factors(*values, *kwargs.values(), *widths)
        return _spent(function(*args, **kwargs))

    return call


class _Generator(CodeGenerator):
    """Compiles loops and `~` so that they are counted."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        join = nodes.EnvironmentAttribute("join")
        joined = nodes.Call(join, node.nodes, [], None, None)
        self.visit(joined.set_lineno(node.lineno), frame)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
            finalize=_finalize,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _metered(name, f) for name, f in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception

    @staticmethod
    def step() -> None:
        """Do nothing; the call is counted."""

    @staticmethod
    def join(*parts: object) -> str:
        _size(parts)  # before they become text
        return "".join(map(str, parts))

    def concat(self, parts: Iterable[str]) -> str:
        return "".join(_spent(part) for part in parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_factors(*(() if _are_numbers(left, right) else (left, right)))
        elif operator == "**" and _are_numbers(left, right):
            if isinstance(left, int) and left.bit_length() * right > MAX_BITS:
                raise _TooLarge(f"a number has more than {MAX_BITS:,} bits")
        elif operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            _check_factors(left, right, *values, *_widths(left))
        return _spent(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend(_STEP)
        owner = None
        if not isinstance(__obj, Macro | Namespace):
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            widths = _widths(owner) if hasattr(__obj, "__wrapped__") else ()
            _check_factors(owner, *args, *kwargs.values(), *widths)
        return _spent(super().call(__context, __obj, *args, **kwargs))


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: the text of an answer."""

    tags = {"generation"}  # noqa: RUF012  (so does Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        before, after = _rendering.get().marks
        return f"{before}{caller()}{after}"


class _Namespace(Namespace):
    """A namespace without private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        fields = dict(*values, **kwargs)
        for name in fields:
            _check_name(name)
        Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.TemplateError(f"a namespace has no private name {name!r}")


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _finalize(value: _Value) -> _Value:
    _size(value)  # before it becomes text
    return value


def _raise_exception(message: object) -> None:
    raise _Raised(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, unlike Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
