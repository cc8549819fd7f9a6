"""The Llama family in JAX: one code path for inference and fine-tuning."""

import pathlib as _pathlib

from llama_jax._version import __version__

# `kernels/` and `conversion/` lie beside this package in a checkout and inside it
# once installed. After a plain `pip install .`, Python run in the checkout finds this
# folder first; then the two must be found beside it.
_root = _pathlib.Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").exists() and (_root / "kernels/__init__.py").exists():
    __path__.append(str(_root))

__all__ = ["__version__"]
