"""Tokenizer files beside checkpoints of every format."""

import pathlib

from llama_jax.arguments import checked
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.errors import TokenizerError
from llama_jax.file_kinds import check_file
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path

_MODEL, _LLAMA2C = "tokenizer.model", "tokenizer.bin"


def find_tokenizer(path: pathlib.Path) -> tuple[Tokenizer, pathlib.Path]:
    """Return the tokenizer beside a checkpoint, or in the folder above, and its file.

    Args:
      path: of the checkpoint.

    Raises:
      TokenizerError: there is none.
    """
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    names = (_MODEL,) if path.is_dir() else (_MODEL, _LLAMA2C)
    for parent in (folder, folder.parent):
        for name in names:
            if (file := parent / name).is_file():
                return open_tokenizer(file), file
    raise TokenizerError(
        f"{path}: there is no {' or '.join(names)} in its folder or the one above; "
        "name one with --tokenizer FILE (tokenizer=)"
    )


@checked(TokenizerError)
def open_tokenizer(file: Path) -> Tokenizer:
    """Open a `tokenizer.model`, `tokenizer.json` or `tokenizer.bin` (llama2.c).

    Raises:
      TokenizerError: the file is not a tokenizer.
    """
    file = pathlib.Path(file)
    if file.suffix == ".bin" and file.is_file():
        check_file(file, "tokenizer", TokenizerError)
        return Tokenizer(read_llama2c_tokenizer(file))
    return Tokenizer.from_file(file)
