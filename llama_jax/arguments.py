"""Arguments of public functions: a wrong type is one sentence, before anything runs."""

import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, SupportsIndex, TypeVar, Union, get_args, get_origin

from jaxtyping import AbstractArray

from llama_jax.errors import LlamaJaxError

F = TypeVar("F", bound=Callable[..., Any])

_NAMES: dict[object, str] = {
    type(None): "None",
    str: "a string",
    SupportsIndex: "an integer",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    bytes: "bytes",
    os.PathLike: "a path",
    Mapping: "a dict",
    Callable: "a function",
}
_REMEDIES = {
    "LlamaConfig": "preset(name) and LlamaConfig.from_dict(fields) make one",
    "Loaded": "load(path) returns one",
    "Mesh": 'make_mesh(parse_mesh("data=8")) makes one',
    "Message": 'a message is {"role": "user", "content": "..."}',
    "Opened": "open_model(path) returns one",
    "Request": "text_request(tokenizer, text) makes one",
    "Runtime": "Runtime() has the defaults",
    "Sampling": "Sampling(temperature=0.5) makes one",
    "Source": "conversion.open_source(path) returns one",
    "SupportsIndex": "tokenizer.encode(text, bos=True, eos=False) makes them of a text",
    "Tokenizer": "Tokenizer.from_file(path) reads one",
    "bytes": "Tokenizer.from_file(path) reads a file",
}


def checked(error: type[LlamaJaxError]) -> Callable[[F], F]:
    """Make a public function or class check the types of its arguments.

    Annotations are the rule, as far as values can be checked fast: one item of each
    type in a list, no leaves of trees. Arrays may be of any library, and scalar arrays
    are numbers.

    Args:
      error: what to raise.

    >>> from llama_jax.errors import PromptError
    >>> @checked(PromptError)
    ... def join(words: Sequence[str]) -> str:
    ...     return " ".join(words)
    >>> join("The cat")
    Traceback (most recent call last):
    llama_jax.errors.PromptError: join: words must be a list of strings, got ...
    """

    def decorate(function: F) -> F:
        if isinstance(function, type):
            cls: Any = function
            cls.__init__ = _checked(cls.__init__, cls.__name__, error)
            return function
        name = function.__qualname__.removesuffix(".__init__")
        checked_function: F = _checked(function, name, error)
        return checked_function

    return decorate


def _checked(function: Any, name: str, error: type[LlamaJaxError]) -> Any:
    signature = inspect.signature(function)

    @functools.cache
    def kinds() -> dict[str, object]:  # when first called: all names are defined then
        kinds = typing.get_type_hints(inspect.unwrap(function))
        for parameter in signature.parameters.values():
            kind = kinds.get(parameter.name)
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                kinds.pop(parameter.name, None)
            if get_origin(kind) is typing.Unpack:
                kinds |= typing.get_type_hints(get_args(kind)[0])
        return kinds

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments | kwargs
        except TypeError:  # an argument is missing or unknown
            return function(*args, **kwargs)
        for argument, value in given.items():
            kind = kinds().get(argument, Any)
            if not _matches(value, kind):
                raise error(f"{name}: {argument} {_problem(value, kind)}")
        return function(*args, **kwargs)

    if hasattr(function, "lower"):  # of jax.jit
        call.lower = function.lower  # type: ignore[attr-defined]
    return call


def _matches(value: object, kind: Any) -> bool:
    """Whether a value is what an annotation says, as far as that is fast to check."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(_matches(value, choice) for choice in inner)
    if origin is Literal:
        return isinstance(value, str | int | None) and value in inner
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        axes = kind.dim_str.split()
        ragged = any("*" in axis or "..." in axis for axis in axes)
        shape, dtype = getattr(value, "shape", None), str(getattr(value, "dtype", ""))
        fits = isinstance(shape, tuple) and (ragged or len(shape) == len(axes))
        return fits and dtype in kind.dtypes
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) or getattr(value, "shape", None) == ()
    if origin in (Sequence, Collection):
        return (
            isinstance(value, origin)
            and not isinstance(value, str | bytes | Mapping)
            and all(_matches(item, inner[0]) for item in _one_of_each_type(value))
        )
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _matches(item, kind)
            for items, kind in zip((value, value.values()), inner, strict=True)
            if kind is not Any
            for item in _one_of_each_type(items)
        )
    if typing.is_typeddict(kind):
        return isinstance(value, Mapping)
    try:
        return isinstance(value, origin or kind)
    except TypeError:  # a protocol that is not for run time
        return True


def _one_of_each_type(items: Iterable[object]) -> Collection[object]:
    return {type(item): item for item in items}.values()


def _problem(value: object, kind: object) -> str:
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else [kind]
    if get_origin(choices[0]) is Literal and {type(None)}.issuperset(choices[1:]):
        words = [*get_args(choices[0]), *[None] * (len(choices) - 1)]
        return f"is {_show(value)}; choose from {', '.join(map(str, words))}"
    text = f"must be {_describe(kind)}, got {_show(value)}"
    for choice in choices:
        item = choice
        while get_origin(item) in (Sequence, Collection):
            item = get_args(item)[0]
            if _matches(value, item if item is choice else get_args(choice)[0]):
                return f"{text}; put it into a list"
        if remedy := _REMEDIES.get(getattr(item, "__name__", "")):
            return f"{text}; {remedy}"
    return text


def _describe(kind: object, *, plural: bool = False) -> str:
    """What an annotation allows, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        words = dict.fromkeys(_describe(choice, plural=plural) for choice in inner)
        *first, last = words
        return f"{', '.join(first)} or {last}" if first else last
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        if "prng_key" in kind.dtypes:
            return "a key of jax.random.key"
        return f"an array [{kind.dim_str.strip()}]"
    if origin in (Sequence, Collection):
        lists = "lists" if plural else "a list"
        return f"{lists} of {_describe(inner[0], plural=True)}"
    if origin is Mapping and Any not in inner:
        keys, values = (_describe(part, plural=True) for part in inner)
        return f"a dict of {keys} to {values}"
    name = getattr(origin or kind, "__name__", str(kind))
    name = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    name = _NAMES.get(kind, _NAMES.get(origin, name))
    return f"{name.split(maxsplit=1)[1]}s" if plural else name


def _show(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape"):
        return f"an array of {value.dtype}, {list(value.shape)}"
    if isinstance(value, list | tuple | dict) and value:
        items = dict.fromkeys(type(item).__name__ for item in value)
        text = f"a {type(value).__name__} of {', '.join(items)}"
        if isinstance(value, dict):
            items = dict.fromkeys(type(item).__name__ for item in value.values())
            text += f" to {', '.join(items)}"
        return text.replace("NoneType", "None")
    if value is None or isinstance(value, str | bytes | int | float | os.PathLike):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"
