"""The formats by name: how each is recognized and opened."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from llama_jax.arguments import checked
from llama_jax.checkpoint.model_folder import is_checkpoint
from llama_jax.conversion.gguf import is_gguf, read_gguf
from llama_jax.conversion.huggingface import is_hugging_face, read_hugging_face
from llama_jax.conversion.llama2c import is_llama2c, read_llama2c
from llama_jax.conversion.meta import is_meta, read_meta
from llama_jax.conversion.orbax import read_orbax
from llama_jax.conversion.other_folders import why_no_checkpoint
from llama_jax.conversion.source import Source
from llama_jax.conversion.tensor_tables import FormatName
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.types import Path


class _Reader(NamedTuple):
    recognizes: Callable[[pathlib.Path], bool]
    read: Callable[..., Source]


# In the order in which they are tried.
_READERS: dict[FormatName, _Reader] = {
    "orbax": _Reader(is_checkpoint, read_orbax),
    "hf": _Reader(is_hugging_face, read_hugging_face),
    "meta": _Reader(is_meta, read_meta),
    "gguf": _Reader(is_gguf, read_gguf),
    "llama2c": _Reader(is_llama2c, read_llama2c),
}
_SUFFIXES: dict[str, FormatName] = {".gguf": "gguf", ".bin": "llama2c"}
_FILES = (*_SUFFIXES, ".safetensors", ".pth", ".pt", ".ckpt", ".model", ".json")


@checked(ConfigError)
def open_source(
    path: Path, *, format: FormatName | None = None, max_seq_len: int | None = None
) -> Source:
    """Open a checkpoint of any format without reading weights.

    Args:
      path: folder or file.
      format: of the checkpoint; recognized by its files if omitted.
      max_seq_len: maximum sequence length in tokens; defaults to the checkpoint's own,
        or for Meta's to that of the published model of the same sizes.

    Returns:
      The configuration, and tensors and a tokenizer that are read when needed.

    Raises:
      CheckpointError: there is no checkpoint at `path`, or it is damaged.
      ConfigError: its configuration is not that of a supported model.

    >>> from llama_jax.loading import bundled
    >>> source = open_source(bundled())
    >>> source.config.num_layers, source.max_seq_len_origin
    (5, 'from config.json')
    >>> source.tensors["transformer/embedding"].shape
    (2048, 192)
    """
    path = pathlib.Path(path)
    if max_seq_len is not None and max_seq_len < 1:
        raise ConfigError(f"max_seq_len is {max_seq_len}; it must be positive")
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such file or folder; name a checkpoint"
        )
    for name, reader in _READERS.items():
        if format == name or (format is None and reader.recognizes(path)):
            return reader.read(path, max_seq_len=max_seq_len)
    raise CheckpointError(f"{path}: {why_no_checkpoint(path, is_known)}")


def is_known(path: pathlib.Path) -> bool:
    """Return whether a path looks like a checkpoint of any format."""
    return any(reader.recognizes(path) for reader in _READERS.values())


def format_of_target(path: Path) -> FormatName:
    """Return the default format of a new file or folder, by its suffix."""
    return _SUFFIXES.get(pathlib.Path(path).suffix, "orbax")


def check_target(path: Path, format: FormatName) -> None:
    """Raise a `CheckpointError` for a folder that is named like a file."""
    suffix = pathlib.Path(path).suffix.lower()
    if suffix in _FILES and format not in _SUFFIXES.values():
        raise CheckpointError(
            f"{path}: is the name of a {suffix} file, but the format {format!r} is a "
            "folder; name a folder, or choose another format with --to "
            "(target_format=)"
        )
