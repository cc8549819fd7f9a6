"""The layers of the house, read from the source: who may import whom, and do what."""

import ast
import functools
import importlib.util
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import llama_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent


def folder(package: str) -> pathlib.Path:
    """Where a package lies: in the checkout, or where the wheel was installed."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return pathlib.Path(spec.origin).parent


FOLDERS = {
    name: folder(name)
    for name in ("llama_jax", "llama_jax.kernels", "llama_jax.conversion")
}

# Packages, and modules at the top of `llama_jax`, lowest layer first. A module imports
# from its own layer and from lower ones.
LAYERS = (
    ("_version", "kernels"),
    ("errors", "config", "runtime", "types"),
    ("params", "weights"),
    ("sharding", "clusters", "sockets", "meeting", "distributed"),
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
COMMANDS = LAYER["cli"]
# Imports upwards that are still to be turned around.
UPWARDS = {
    ("sharding", "model"),
}
MAX_LINES = 400


def modules() -> dict[str, pathlib.Path]:
    """Every module of the library by its full name."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if "assets" not in parts:
                name = ".".join((package, *parts)).removesuffix(".__init__")
                found[name] = file
    return found


MODULES = modules()
every_module = pytest.mark.parametrize("name", MODULES)


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text("utf-8"))


def is_package(name: str) -> bool:
    return MODULES[name].name == "__init__.py"


def part(name: str) -> str:
    """What stands in the rows for a module."""
    inner = name.removeprefix("llama_jax").removeprefix(".")
    return "__main__" if name.endswith(".__main__") else inner.partition(".")[0]


def imports(name: str, nodes: ast.AST | None = None) -> Iterator[str]:
    """What a module imports, anywhere in it, by full name."""
    for node in ast.walk(nodes or tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".replace("__version__", "_version")
                yield inner if inner in MODULES else node.module


def test_modules_import_from_lower_layers() -> None:
    offenders = []
    for name in MODULES:
        own = part(name)
        if not own:
            continue  # the package itself names what it offers, and imports it late
        assert own in LAYER, f"{own} is in no layer; give it one"
        for imported in filter(lambda one: one.startswith("llama_jax"), imports(name)):
            assert part(imported), f"{name} imports the package that it is part of"
            other = part(imported)
            if LAYER[other] > LAYER[own] and (own, other) not in UPWARDS:
                offenders.append(f"{name} imports {imported}")
    assert not offenders


def test_no_two_modules_import_each_other() -> None:
    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path, name))
        if name in done:
            return
        for imported in imports(name):
            # A package's modules may be imported while it imports them.
            if imported in MODULES and not is_package(imported):
                follow(imported, (*path, name))
        done.add(name)

    done: set[str] = set()
    for name in MODULES:
        follow(name, ())
    assert done == set(MODULES)


@every_module
def test_only_the_model_knows_flax(name: str) -> None:
    found = {imported.partition(".")[0] for imported in imports(name)}
    assert ("flax" in found) == (name == "llama_jax.model.transformer")


@pytest.mark.parametrize("name", [n for n in MODULES if part(n) == "kernels"])
def test_kernels_need_jax_numpy_and_each_other(name: str) -> None:
    allowed = {"jax", "jaxlib", "numpy", "jaxtyping", *sys.stdlib_module_names}
    for imported in imports(name):
        if imported.startswith("llama_jax"):
            assert part(imported) == "kernels", imported
        else:
            assert imported.partition(".")[0] in allowed, imported


@every_module
def test_only_entry_points_read_arguments_and_the_environment_and_print(
    name: str,
) -> None:
    if LAYER.get(part(name), 0) >= COMMANDS:
        return
    assert "argparse" not in set(imports(name))
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Name):
            assert node.id != "print", f"{name}:{node.lineno} prints"
        if isinstance(node, ast.Attribute):
            called = ast.unparse(node)
            assert called not in ("os.environ", "os.getenv", "sys.argv", "sys.stdout")
    assert not {"environ", "getenv"} & {
        alias.name
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@every_module
def test_what_is_imported_with_a_module_is_always_installed(name: str) -> None:
    required = {"jax", "flax", "numpy", "jaxtyping", "sentencepiece"}
    required |= {"ml_dtypes"}  # of jax
    required |= {"llama_jax", *sys.stdlib_module_names}
    if part(name) in ("train", "rlhf"):
        required |= {"optax"}
    for node in tree(name).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for imported in imports(name, node):
                assert imported.partition(".")[0] in required, imported


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
    offered = {
        (node.module.removeprefix("llama_jax."), alias.name)
        for block in tree("llama_jax").body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    homes = {(llama_jax._HOME_OF[name], name) for name in llama_jax._HOME_OF}
    assert offered == homes
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
    found = set(out.split())
    assert "llama_jax.generation.generate" in found
    assert not heavy & found


@every_module
def test_a_module_is_one_idea_long(name: str) -> None:
    assert len(MODULES[name].read_text("utf-8").splitlines()) <= MAX_LINES


@every_module
def test_everything_public_has_a_docstring(name: str) -> None:
    assert ast.get_docstring(tree(name)), name

    def check(body: list[ast.stmt], path: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{path}.{node.name}"
                if node.name.startswith("_"):  # __call__ and the like too
                    continue
                decorators = {ast.unparse(d) for d in node.decorator_list}
                if "overload" not in decorators:
                    assert ast.get_docstring(node), inner
                if isinstance(node, ast.ClassDef):
                    check(node.body, inner)

    check(tree(name).body, name)


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
    for name in names:
        file = ROOT / name
        if file.is_file() and (match := pattern.search(file.read_bytes())):
            raise AssertionError(f"{name}: {match.group().decode()}…")
