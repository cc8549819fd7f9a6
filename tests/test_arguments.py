"""Public functions refuse wrong types in one sentence, without executed annotations.

Users do not execute annotations as this test run does. Each argument of each public
function gets every value of `HOSTILE` that its annotation does not allow.
"""

import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import AbstractArray

import llama_jax
from llama_jax import conversion
from llama_jax.errors import LlamaJaxError

TOWER = BeartypeConf(is_pep484_tower=True)  # an int is a float
HOSTILE: list[Any] = [
    None, "The cat", b"bytes", 2, 2.5, {}, {"role": "user", "content": "Hi"},
    [1, 2], ["a", "b"], [[1, 2]], [{"role": "user", "content": "Hi"}], [None],
    pathlib.Path("x"), np.asarray([1, 2]), np.asarray([[0.5]]), object(), LlamaJaxError,
]  # fmt: skip


def public() -> Iterator[Any]:
    for module in (llama_jax, conversion):
        for name in module.__all__:
            value = getattr(module, name)
            function = callable(value) and not isinstance(value, type)
            if function and get_origin(value) is None:
                yield pytest.param(value, id=name)


def example(kind: Any) -> Any:
    """A value of a type; nothing but its type is right."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return example(inner[0])
    if origin is Literal:
        return inner[0]
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return jnp.zeros((1,) * len(kind.dim_str.split()), int)
    for base, value in ((dict, {}), (list, []), (str, "x"), (float, 1.0), (int, 1)):
        if isinstance(origin or kind, type) and issubclass(base, origin or kind):
            return value
    if kind is Any or origin or getattr(kind, "_is_protocol", False):
        return mock.MagicMock()
    return kind.__new__(kind, *[None] * len(getattr(kind, "_fields", ())))


def is_accepted(value: Any, kind: Any) -> bool:
    """Whether the annotation allows a value, or a value like it: arrays of NumPy."""
    if isinstance(value, np.ndarray):
        value = jnp.asarray(value)
    return kind is Any or is_bearable(value, kind, conf=TOWER)


@pytest.mark.wrong_types
@pytest.mark.parametrize("function", [*public()])
def test_wrong_types_are_refused_in_one_sentence(function: Callable[..., Any]) -> None:
    hints = typing.get_type_hints(inspect.unwrap(function))
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    right = {p.name: example(hints[p.name]) for p in parameters if p.default is p.empty}
    for name in [parameter.name for parameter in parameters]:
        for value in HOSTILE:
            if is_accepted(value, hints[name]):
                continue
            with pytest.raises(LlamaJaxError) as error:
                function(**(right | {name: value}))
            assert "\n" not in str(error.value)
