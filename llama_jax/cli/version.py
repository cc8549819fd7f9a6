"""The versions that a bug report needs."""

import argparse
import importlib.metadata
import platform

from llama_jax._version import __version__


def add_version_argument(parser: argparse.ArgumentParser) -> None:
    """Add --version, which prints the versions and exits."""
    versions = [f"llama_jax {__version__}"]
    for package in ("jax", "flax"):
        versions.append(f"{package} {importlib.metadata.version(package)}")
    versions.append(f"Python {platform.python_version()}")
    parser.add_argument(
        "--version",
        action="version",
        version=", ".join(versions),
        help="print the versions of llama_jax, jax, flax and Python",
    )
