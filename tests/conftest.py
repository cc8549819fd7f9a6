"""Environment of the test run and fixtures for every test."""

# ruff: noqa: E402 (JAX reads the environment when it is imported)

import os
import pathlib
import sys
from collections.abc import Iterator

_TESTS = pathlib.Path(__file__).resolve().parent

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Compiled programs are shared by all processes of a run, and kept for the next one.
    "JAX_COMPILATION_CACHE_DIR": str(_TESTS.parent / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(_name, _value)
# Eight devices; and programs that are compiled in half the time and run once. The
# optimizations of users' programs are tested by `.ci/run --all`, through XLA_FLAGS.
for _flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
):
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
# Processes that tests start find `support` as the tests do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")])
)

import hypothesis
import pytest
from support.type_checks import without_type_checks

from llama_jax.text.tokenizer import Tokenizer

# Compilation makes a first example slow, so no example has a deadline.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Do not execute annotations in tests that pass wrong types on purpose."""
    if not item.get_closest_marker("wrong_types"):
        return (yield)
    with without_type_checks():
        return (yield)


# Linux lets a process have 65,530 mappings; XLA's programs need about 14 each, and it
# crashes when there are no more.
_MAPS, _MANY_MAPS = pathlib.Path("/proc/self/maps"), 20_000


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """Drop compiled programs after a module if the process has many of them."""
    yield
    if "jax" not in sys.modules or not _MAPS.exists():
        return
    if _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """Folder of real tokenizers, weights and golden outputs; skips where absent."""
    path = _TESTS.parent / os.environ.get("LLAMA_JAX_ASSETS", "../shared/assets")
    if not path.is_dir():
        pytest.skip(f"no assets at {path.resolve()}; set LLAMA_JAX_ASSETS")
    return path.resolve()


@pytest.fixture(scope="session")
def llama2_tokenizer(assets: pathlib.Path) -> Tokenizer:
    """Llama 2's tokenizer: 32,000 pieces."""
    return Tokenizer.from_file(assets / "tokenizers" / "llama2.model")
