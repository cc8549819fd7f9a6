"""The notebooks as they lie there; `.ci/notebooks.py` runs them."""

import ast
import importlib
import importlib.util
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "notebooks"
INSTALL = "%pip install --quiet llama-jax"
MOST_LINES = {"code": 22, "markdown": 10}
MOST_COLUMNS = {"code": 88, "markdown": 96}  # as ruff and the README have it
MOST_CELLS = 24

# Notebooks call the library; what starts programs or reads the environment does not.
ALLOWED = {"llama_jax", "jax", "numpy", *sys.stdlib_module_names}
ALLOWED -= {"os", "subprocess", "sys"}

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the notebooks are not where the tests are"
)
every_notebook = pytest.mark.parametrize(
    "file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem
)


def read(file: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def sources(file: pathlib.Path, kind: str) -> Iterator[str]:
    """What stands in the cells of a kind."""
    for cell in read(file)["cells"]:
        if cell["cell_type"] == kind:
            yield "".join(cell["source"])


def code(file: pathlib.Path) -> ast.Module:
    """The Python of a notebook: all of it but the install line."""
    cells = list(sources(file, "code"))[1:]
    return ast.parse("\n".join(cells), file.name)


def imported(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Modules, with the name that is taken from each, if one is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield from ((node.module, alias.name) for alias in node.names)


@every_notebook
def test_a_notebook_is_of_format_4_5_and_every_cell_has_an_id(
    file: pathlib.Path,
) -> None:
    notebook = read(file)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in ids), ids
    assert len(set(ids)) == len(ids), ids


@every_notebook
def test_a_notebook_holds_nothing_of_a_run(file: pathlib.Path) -> None:
    notebook = read(file)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for cell in notebook["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert set(cell) == {*common, "outputs", "execution_count"}, cell["id"]
            assert cell["outputs"] == [], cell["id"]
            assert cell["execution_count"] is None, cell["id"]
        else:
            assert set(cell) == common, cell["id"]
        assert cell["metadata"] == {}, cell["id"]


@every_notebook
def test_the_first_cell_of_code_installs_and_no_other_is_but_python(
    file: pathlib.Path,
) -> None:
    install, *others = sources(file, "code")
    assert install == INSTALL
    for cell in others:
        ast.parse(cell)  # so that there is no other magic and no shell


@every_notebook
def test_a_notebook_is_thin(file: pathlib.Path) -> None:
    cells = read(file)["cells"]
    assert len(cells) <= MOST_CELLS
    for cell in cells:
        kind, lines = cell["cell_type"], "".join(cell["source"]).splitlines()
        assert len(lines) <= MOST_LINES[kind], cell["id"]
        assert max(map(len, lines)) <= MOST_COLUMNS[kind], cell["id"]


@every_notebook
def test_a_notebook_imports_the_library_jax_numpy_and_what_python_has(
    file: pathlib.Path,
) -> None:
    for module, _ in imported(code(file)):
        assert module.partition(".")[0] in ALLOWED, module


@every_notebook
def test_every_name_of_the_library_that_a_notebook_uses_exists(
    file: pathlib.Path,
) -> None:
    tree = code(file)
    for module, name in imported(tree):
        if module.partition(".")[0] == "llama_jax":
            found = importlib.import_module(module)
            assert name is None or hasattr(found, name), f"{module}.{name}"
    used = [
        ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    ]
    dotted = [text for text in used if re.fullmatch(r"llama_jax(\.\w+)+", text)]
    assert dotted
    for text in "".join(sources(file, "markdown")).split("`"):
        dotted += re.findall(r"(?<!-m )\bllama_jax(?:\.\w+)+", text)
    for text in dotted:
        value: Any = importlib.import_module("llama_jax")
        for name in text.split(".")[1:]:
            value = getattr(value, name)  # which says what is missing


@every_notebook
def test_every_command_that_a_notebook_names_exists(file: pathlib.Path) -> None:
    text = "\n".join(sources(file, "markdown"))
    commands = re.findall(r"python -m (\S+)", text)
    assert commands
    for command in commands:
        assert importlib.util.find_spec(command), command


def test_the_readme_lists_every_notebook_and_no_other() -> None:
    listed = re.findall(r"\(notebooks/(\S+)\)", (ROOT / "README.md").read_text("utf-8"))
    there = sorted(file.name for file in FOLDER.glob("*.ipynb"))
    assert listed == there
    numbers = [int(name.partition("_")[0]) for name in there]
    assert numbers == list(range(1, len(there) + 1))
