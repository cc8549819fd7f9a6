"""JSON files of model folders."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from llama_jax.checkpoint.atomic_write import write_file
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.file_kinds import check_file
from llama_jax.types import JsonObject, Path


def read_json(
    file: pathlib.Path, *, remedy: str = "download it again"
) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
      file: to read.
      remedy: for a damaged file.

    Raises:
      CheckpointError: the file cannot be read, or has no JSON object.
    """
    check_file(file, "JSON")
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a JSON object; {remedy}")
    return content


def write_json(file: pathlib.Path, content: JsonObject) -> None:
    """Write an object as an indented JSON file, atomically."""
    write_file(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def config_errors_in(file: Path) -> Iterator[None]:
    """Prefix the message of a `ConfigError` with the file that it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
