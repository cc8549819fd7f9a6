"""Public functions refuse wrong types in one sentence, without executed annotations.

Users do not execute annotations as this test run does. Each argument of each public
function gets every value of `HOSTILE` that its annotation does not allow.
"""

import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

import flax.linen as nn
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


RESULTS = (
    llama_jax.Completion,
    conversion.Source,
)  # not made by users


def public() -> Iterator[Any]:
    """The public functions, and the classes that users make."""
    for module in (llama_jax, conversion):
        for name in module.__all__:
            value = getattr(module, name)
            skipped = tuple | BaseException | nn.Module
            if isinstance(value, type):
                checked = not issubclass(value, skipped) and value not in RESULTS
            else:
                checked = callable(value) and get_origin(value) is None
            if checked:
                yield pytest.param(value, id=name)


def arguments(function: Callable[..., Any]) -> Iterator[tuple[str, Any, bool]]:
    """The name and type of each argument, and whether it must be given."""
    for name, parameter in inspect.signature(function).parameters.items():
        kind, required = parameter.annotation, parameter.default is parameter.empty
        if get_origin(kind) is typing.Unpack:
            for key, type in typing.get_type_hints(get_args(kind)[0]).items():
                yield key, type, False
        elif parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            yield name, kind, required


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
    alike = [value, jnp.asarray(value)] if isinstance(value, np.ndarray) else [value]
    return kind is Any or any(is_bearable(each, kind, conf=TOWER) for each in alike)


@pytest.mark.wrong_types
@pytest.mark.parametrize("function", [*public()])
def test_wrong_types_are_refused_in_one_sentence(function: Callable[..., Any]) -> None:
    known = list(arguments(function))
    right = {name: example(kind) for name, kind, required in known if required}
    for name, kind, _ in known:
        for value in HOSTILE:
            if is_accepted(value, kind):
                continue
            with pytest.raises(LlamaJaxError) as error:
                function(**(right | {name: value}))
            assert "\n" not in str(error.value)


LOADED = llama_jax.load()
DIALOG: Any = [{"role": "user", "content": "Hi"}]


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: llama_jax.text_completion(LOADED, "The cat"),
            "text_completion: prompts must be a list of strings, got 'The cat'; put it "
            "into a list",
        ),
        (
            lambda: llama_jax.chat_completion(LOADED, DIALOG),
            "chat_completion: dialogs must be a list of lists of Messages, got a list "
            "of dict; put it into a list",
        ),
        (
            lambda: llama_jax.generate(LOADED, [[1, 2]]),  # type: ignore[list-item]
            "generate: requests must be a list of Requests, got a list of list; "
            "text_request(tokenizer, text) makes one",
        ),
        (
            lambda: llama_jax.Sampling(logit_bias={"a": 1.0}),  # type: ignore[dict-item]
            "Sampling: logit_bias must be a dict of integers to numbers, got a dict of "
            "str to float",
        ),
        (
            lambda: llama_jax.Runtime(dtype="float64"),  # type: ignore[arg-type]
            "Runtime: dtype is 'float64'; choose from float32, bfloat16, float16",
        ),
        (
            lambda: llama_jax.Llama({}, llama_jax.Runtime()),  # type: ignore[arg-type]
            "Llama: config must be a LlamaConfig, got {}",
        ),
        (
            lambda: llama_jax.apply(LOADED.model, {}, jnp.asarray([[1]])),
            "apply: params are not of this model: Tried to access",
        ),
        (
            lambda: llama_jax.init_cache(LOADED.model.config, 1, 8, "float31"),
            "cache: dtype is 'float31'; name one",
        ),
        (lambda: llama_jax.LlamaConfig.from_dict([1]), "config: is [1]; it must be"),  # type: ignore[arg-type]
        (lambda: LOADED.tokenizer.decode("a"), "tokenizer: the ids must be a list"),  # type: ignore[arg-type]
        (
            lambda: LOADED.tokenizer.decode([1.0]),
            "tokenizer: the ids must be a list",
        ),  # type: ignore[list-item]
        (
            lambda: LOADED.tokenizer.encode(b"a", bos=True, eos=False),  # type: ignore[arg-type]
            "tokenizer: the text must be a string, got b'a'",
        ),
    ],
)
def test_the_sentence_says_what_to_give(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(LlamaJaxError, match="^" + re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_missing_argument_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match=r"missing .*name"):
        llama_jax.preset()  # type: ignore[call-arg]


def test_arrays_of_numpy_are_accepted() -> None:
    lengths = np.asarray([3])
    tokens = np.asarray([[1, 5, 7]], np.int32)
    logits, cache = llama_jax.prefill(
        LOADED.language_model, LOADED.params, tokens, lengths, 8
    )
    assert logits.shape == (1, 2048)
    assert cache.num_slots == 8
