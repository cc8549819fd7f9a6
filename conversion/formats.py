"""The formats by name: how each is recognised, read and written."""

import pathlib
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

from llama_jax.checkpoint.model_folder import is_checkpoint
from llama_jax.conversion.gguf import is_gguf, read_gguf
from llama_jax.conversion.huggingface import is_hugging_face, read_hugging_face
from llama_jax.conversion.llama2c import is_llama2c, read_llama2c
from llama_jax.conversion.meta import is_meta, read_meta
from llama_jax.conversion.native import read_orbax
from llama_jax.conversion.source import Source
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.types import Path

FormatName = Literal["orbax", "meta", "hf", "gguf", "llama2c"]


class _Reader(NamedTuple):
    recognises: Callable[[pathlib.Path], bool]
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


def open_source(
    path: Path, *, form: FormatName | None = None, max_seq_len: int | None = None
) -> Source:
    """Open a checkpoint of any format; no weights are read.

    Args:
      path: of a folder or file.
      form: its format; recognised where not given.
      max_seq_len: longest sequence, in place of the checkpoint's own.

    Raises:
      CheckpointError: there is none at `path`, or it is damaged.
      ConfigError: its configuration is not understood.
    """
    path = pathlib.Path(path)
    if max_seq_len is not None and max_seq_len < 1:
        raise ConfigError(f"max_seq_len is {max_seq_len}; it must be positive")
    if form is not None and form not in _READERS:
        choices = ", ".join(get_args(FormatName))
        raise ConfigError(f"the format {form!r} is unknown; choose from {choices}")
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    for name, reader in _READERS.items():
        if form == name or (form is None and reader.recognises(path)):
            return reader.read(path, max_seq_len=max_seq_len)
    raise CheckpointError(
        f"{path}: no checkpoint was found; give a folder of Meta's (params.json and "
        "consolidated.00.pth), of Hugging Face's (config.json and safetensors) or of "
        "ours, or a .gguf or llama2.c .bin file"
    )


def format_of_target(path: Path) -> FormatName:
    """The format that a new file's or folder's name asks for."""
    return _SUFFIXES.get(pathlib.Path(path).suffix, "orbax")
