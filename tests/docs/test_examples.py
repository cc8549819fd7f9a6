"""The examples in docstrings, executed."""

import ast
import doctest
import importlib

import pytest
from support.modules import MODULES

import llama_jax

WITH_EXAMPLES = [n for n, path in MODULES.items() if ">>> " in path.read_text("utf-8")]
# Data that functions return or raise, shown in their examples.
WITHOUT = ("LlamaJaxError", "Completion", "Delta", "Score")


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_the_results_that_they_show(name: str) -> None:
    parser = doctest.DocTestParser()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    path, module = MODULES[name], importlib.import_module(name)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        # Docstrings, of functions and of module constants.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text, line = str(node.value.value), node.lineno
            runner.run(
                parser.get_doctest(
                    text, dict(vars(module)), f"{name}:{line}", str(path), line
                )
            )
    assert runner.tries
    assert not runner.failures


def test_public_functions_have_examples() -> None:
    values = {name: getattr(llama_jax, name) for name in llama_jax.__all__}
    assert not [
        name
        for name, value in values.items()
        if callable(value)
        and name not in WITHOUT
        and ">>> " not in (value.__doc__ or "")
    ]
