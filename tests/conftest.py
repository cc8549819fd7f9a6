"""Fixtures every test may use; eight CPU devices unless the environment says else."""

# ruff: noqa: E402 (what follows the first block may import jax, which reads it)

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices; and programs that are compiled in half the time and run once. The
# optimizations of users' programs are tested by `.ci/run --all`, which says so in
# XLA_FLAGS.
for _flag, _value in (
    ("--xla_force_host_platform_device_count", 8),
    ("--xla_backend_optimization_level", 0),
):
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        _flags = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}"
        os.environ["XLA_FLAGS"] = _flags.strip()

# Processes that tests start find `support` as the tests do.
_TESTS = pathlib.Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(_TESTS), os.environ.get("PYTHONPATH")])
)

import hypothesis
import pytest

from llama_jax.text.tokenizer import Tokenizer

# Compilation makes a first example slow, so no example has a deadline.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("default"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

_ROOT = _TESTS.parent


@pytest.fixture(scope="session")
def assets() -> pathlib.Path:
    """Folder of real tokenizers, weights and golden outputs; skips where absent."""
    named = os.environ.get("LLAMA_JAX_ASSETS", "../shared/assets")
    path = (_ROOT / named).resolve()
    if not path.is_dir():
        pytest.skip(f"no assets at {path}; name their folder in LLAMA_JAX_ASSETS")
    return path


@pytest.fixture(scope="session")
def llama2_tokenizer(assets: pathlib.Path) -> Tokenizer:
    """Llama 2's tokenizer: 32,000 pieces."""
    return Tokenizer.from_file(assets / "tokenizers" / "llama2.model")
