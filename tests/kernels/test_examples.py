"""The examples in the docstrings of `llama_jax.kernels` are correct."""

import doctest
import sys
from collections.abc import Callable
from typing import Any

import pytest

from llama_jax import kernels


@pytest.mark.parametrize(
    "function",
    [
        kernels.attention,
        kernels.explain,
        kernels.paged_attention,
        kernels.quantize_slots,
        kernels.token_losses,
    ],
    ids=lambda function: function.__name__,
)
def test_examples_run_as_printed(function: Callable[..., Any]) -> None:
    module = sys.modules[function.__module__]
    [example] = doctest.DocTestFinder(recurse=False).find(
        function, function.__name__, module=module
    )
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
