"""The architecture, read from the source: what each layer imports and may do."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.modules import FOLDERS, MODULES
from support.paths import ROOT

import llama_jax

# Packages, and modules at the top of `llama_jax`, lowest layer first. A module imports
# from its own layer and from lower ones.
LAYERS = (
    ("_version", "kernels"),
    ("errors", "arguments", "config", "runtime", "types", "file_kinds"),
    ("params", "weights"),
    ("sharding", "distributed"),
    ("model", "text"),
    ("checkpoint",),
    ("conversion",),
    ("loading",),
    ("generation", "data"),
    ("train",),
    ("rlhf", "evaluation", "serve"),
    ("planning",),
    ("bench",),
    ("cli",),
    ("sample", "finetune", "plan", "evaluate", "doctor", "__main__"),
)
LAYER = {name: number for number, row in enumerate(LAYERS) for name in row}
MAX_LINES = 400


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text("utf-8"))


def part(name: str) -> str:
    """The entry of `LAYERS` that a module belongs to."""
    inner = name.removeprefix("llama_jax").removeprefix(".")
    return "__main__" if name.endswith(".__main__") else inner.partition(".")[0]


def is_command(name: str) -> bool:
    return LAYER.get(part(name), 0) >= LAYER["cli"]


def imports(name: str, nodes: ast.AST | None = None) -> Iterator[str]:
    """Full names of what a module imports, at its top or inside functions."""
    for node in ast.walk(nodes or tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports must be absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".replace("__version__", "_version")
                yield inner if inner in MODULES else node.module


def test_modules_import_from_lower_layers() -> None:
    unknown = {part(name) for name in MODULES} - LAYER.keys() - {""}
    assert not unknown, f"not in LAYERS: {unknown}"
    offenders = [
        f"{name} imports {imported}"
        for name in MODULES
        if part(name)  # the package itself imports its public names on demand
        for imported in imports(name)
        if imported.startswith("llama_jax")
        and (not part(imported) or LAYER[part(imported)] > LAYER[part(name)])
    ]
    assert not offenders


def test_no_two_modules_import_each_other() -> None:
    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name in done:
            return
        for imported in imports(name):
            is_package = imported in MODULES and MODULES[imported].stem == "__init__"
            if imported in MODULES and not is_package:
                follow(imported, (*path, name))
        done.add(name)

    done: set[str] = set()
    for name in MODULES:
        follow(name, ())
    assert done == set(MODULES)


def test_the_top_of_the_package_holds_what_the_architecture_page_lists() -> None:
    own = {name for name in MODULES if name.count(".") == 1}
    top = {name.removeprefix("llama_jax.") for name in own}
    assert top <= LAYER.keys()
    assert {file.name for file in FOLDERS["llama_jax"].iterdir()} <= {
        *(f"{name}.py" for name in LAYER),
        *LAYER,
        *("__init__.py", "_version.py", "py.typed", "assets", "__pycache__"),
    }


def test_only_the_model_imports_flax() -> None:
    users = {
        part(name)
        for name in MODULES
        if any(imported.partition(".")[0] == "flax" for imported in imports(name))
    }
    assert users == {"model"}


def test_kernels_need_jax_numpy_and_each_other() -> None:
    allowed = {"jax", "jaxlib", "numpy", "jaxtyping", *sys.stdlib_module_names}
    offenders = [
        f"{name} imports {imported}"
        for name in MODULES
        if part(name) == "kernels"
        for imported in imports(name)
        if part(imported) != "kernels" and imported.partition(".")[0] not in allowed
    ]
    assert not offenders


TERMINAL = {
    "os.environ", "os.getenv", "os._exit", "os.abort",
    "sys.argv", "sys.exit", "sys.stdin", "sys.stdout", "sys.stderr",
    "sys.__stdin__", "sys.__stdout__", "sys.__stderr__", "signal.signal",
}  # fmt: skip
CALLS = {"print", "input", "exit", "quit"}


def test_only_commands_use_arguments_environment_terminal_and_exit() -> None:
    offenders = []
    for name in MODULES:
        if is_command(name):
            continue
        if "argparse" in set(imports(name)):
            offenders.append(f"{name} imports argparse")
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS:
                offenders.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in TERMINAL:
                offenders.append(f"{name}:{node.lineno} {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom):
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                offenders += [f"{name} imports {one}" for one in named & TERMINAL]
    assert not offenders


def test_modules_import_at_their_top_only_what_is_always_installed() -> None:
    required = {"jax", "flax", "numpy", "jaxtyping", "sentencepiece", "llama_jax"}
    required |= {"jinja2"}
    required |= {"ml_dtypes", *sys.stdlib_module_names}  # ml_dtypes comes with jax
    offenders = [
        f"{name} imports {imported}"
        for name in MODULES
        for node in tree(name).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for imported in imports(name, node)
        if (package := imported.partition(".")[0]) not in required
        and not (package == "optax" and LAYER[part(name)] >= LAYER["train"])
        # Imported when a server starts.
        and not (package == "starlette" and part(name) == "serve")
    ]
    assert not offenders


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"orbax", "tensorstore", "torch", "optax", "transformers", "jax", "flax"}
    out = run_python("import sys, llama_jax; print(*sys.modules)")
    assert not heavy & set(out.split())


def test_the_public_names_are_those_that_type_checkers_see() -> None:
    listed = {
        (node.module.removeprefix("llama_jax."), alias.name)
        for block in tree("llama_jax").body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert listed == {(home, name) for name, home in llama_jax._HOME_OF.items()}
    for name in llama_jax.__all__:
        assert getattr(llama_jax, name) is not None
    with pytest.raises(AttributeError, match="lod"):
        llama_jax.lod  # noqa: B018


def test_generating_imports_no_training_and_no_writing_stack() -> None:
    heavy = {"orbax", "orbax.checkpoint", "tensorstore", "torch", "optax"}
    heavy |= {"tiktoken", "tokenizers"}
    out = run_python(
        "import sys, llama_jax.loading, llama_jax.conversion\n"
        "import llama_jax.generation.completion\n"
        "import jax\n"
        "assert not jax._src.xla_bridge._backends, 'a device was touched'\n"
        "print(*sys.modules)"
    )
    imported = set(out.split())
    assert "llama_jax.generation.generate" in imported
    assert not heavy & imported


def test_no_module_is_longer_than_one_idea() -> None:
    lines = {name: MODULES[name].read_text("utf-8").count("\n") for name in MODULES}
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}


def test_everything_public_has_a_docstring() -> None:
    def missing(body: list[ast.stmt], path: str) -> Iterator[str]:
        for node in body:
            if not isinstance(
                node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) or node.name.startswith("_"):
                continue
            inner = f"{path}.{node.name}"
            overloads = "overload" in {ast.unparse(d) for d in node.decorator_list}
            if not ast.get_docstring(node) and not overloads:
                yield inner
            if isinstance(node, ast.ClassDef):
                yield from missing(node.body, inner)

    offenders = [name for name in MODULES if not ast.get_docstring(tree(name))]
    for name in MODULES:
        offenders += missing(tree(name).body, name)
    assert not offenders


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a checkout: git does not list its files")
    names = [name.decode() for name in listed.stdout.split(b"\0") if name]
    assert "pyproject.toml" in names
    pattern = re.compile(rb"(?<![\w./-])/(work|root)/\w")
    offenders = [
        f"{name}: {match.group().decode()}…"
        for name in names
        if (ROOT / name).is_file()
        and (match := pattern.search((ROOT / name).read_bytes()))
    ]
    assert not offenders
