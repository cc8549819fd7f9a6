"""From a foreign checkpoint to ours, tensor by tensor."""

import hashlib
import os
import pathlib
import time
from typing import NamedTuple

from llama_jax.checkpoint import is_checkpoint, save_params
from llama_jax.config import LlamaConfig
from llama_jax.conversion.llama2c import read_llama2c, tokenizer_model
from llama_jax.conversion.meta import is_meta, read_meta
from llama_jax.conversion.source import Source
from llama_jax.errors import CheckpointError, ConfigError, TokenizerError
from llama_jax.leaves import Progress
from llama_jax.params import count_params
from llama_jax.runtime import DType
from llama_jax.tokenizer import Tokenizer

Path = str | os.PathLike[str]

_MODEL, _LLAMA2C_TOKENIZER = "tokenizer.model", "tokenizer.bin"
_DTYPES = ("float32", "bfloat16", "float16")


class Converted(NamedTuple):
    """What a conversion did.

    Attributes:
      config: of the model.
      context: where its `max_seq_len` comes from, in words.
      tokenizer: the file that was used.
      parameters: how many numbers.
      bytes: what they take on disk.
      seconds: how long it took.
    """

    config: LlamaConfig
    context: str
    tokenizer: pathlib.Path
    parameters: int
    bytes: int
    seconds: float


def convert(
    src: Path,
    dst: Path,
    *,
    tokenizer: Path | None = None,
    dtype: DType | None = None,
    max_seq_len: int | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write a foreign checkpoint as one of ours; it appears complete or not at all.

    Memory holds a few tensors, never the model.

    Args:
      src: one of Meta's folders, or a llama2.c `.bin` file.
      dst: the new folder.
      tokenizer: a `tokenizer.model`, or a llama2.c `tokenizer.bin`; looked for in the
        checkpoint's folder and in the one above where not given.
      dtype: of the weights; as they are where not given.
      max_seq_len: longest sequence; what the checkpoint or the published model of
        its sizes says where not given.
      progress: told of the bytes that are verified and written.

    Raises:
      CheckpointError: the source is damaged or unknown, or there is something at `dst`.
      ConfigError: its configuration is not understood.
      TokenizerError: there is no tokenizer, or it has more pieces than the model ids.
    """
    start = time.monotonic()
    if dtype is not None and dtype not in _DTYPES:
        choices = ", ".join(_DTYPES)
        raise ConfigError(f"dtype is {dtype!r}; choose from {choices}")
    source = open_source(src, max_seq_len=max_seq_len)
    file = pathlib.Path(tokenizer) if tokenizer else find_tokenizer(source.path)
    pieces = open_tokenizer(file)
    pieces.check_fits(source.config.vocab_size)
    leaves = source.leaves(dtype)
    verify(source, progress)
    save_params(dst, leaves, source.config, tokenizer=pieces, progress=progress)
    return Converted(
        source.config,
        source.context,
        file,
        count_params(leaves),
        sum(leaf.nbytes for leaf in leaves.values()),
        time.monotonic() - start,
    )


def open_source(path: Path, *, max_seq_len: int | None = None) -> Source:
    """Open a foreign checkpoint, whichever of the known formats it has.

    Raises:
      CheckpointError: there is none at `path`, or it is damaged.
      ConfigError: its configuration is not understood.
    """
    path = pathlib.Path(path)
    if max_seq_len is not None and max_seq_len < 1:
        raise ConfigError(f"max_seq_len is {max_seq_len}; it must be positive")
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if path.is_file() and path.suffix == ".bin":
        return read_llama2c(path, max_seq_len=max_seq_len)
    if path.is_dir() and is_checkpoint(path):
        raise CheckpointError(
            f"{path}: is a llama_jax checkpoint already, no conversion is needed"
        )
    if path.is_dir() and is_meta(path):
        return read_meta(path, max_seq_len=max_seq_len)
    raise CheckpointError(
        f"{path}: no checkpoint was found; give one of Meta's folders (params.json "
        "and consolidated.00.pth), or a llama2.c .bin file"
    )


def find_tokenizer(path: pathlib.Path) -> pathlib.Path:
    """The tokenizer that lies with a checkpoint, or in the folder above.

    Raises:
      TokenizerError: there is none.
    """
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    names = (_MODEL,) if path.is_dir() else (_MODEL, _LLAMA2C_TOKENIZER)
    for place in (folder, folder.parent):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise TokenizerError(
        f"{path}: there is no {' or '.join(names)} in its folder or the one above; "
        "name one with --tokenizer FILE (tokenizer=)"
    )


def open_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer from a `tokenizer.model` or a llama2.c `tokenizer.bin`.

    Raises:
      TokenizerError: there is none in the file.
    """
    file = pathlib.Path(file)
    if file.suffix != ".bin" or not file.is_file():
        return Tokenizer.from_file(file)
    return Tokenizer(tokenizer_model(file))


def verify(source: Source, progress: Progress | None = None) -> None:
    """Compare the files of a checkpoint with the md5 sums that came with it, if any.

    Raises:
      CheckpointError: a file differs.
    """
    done, total = 0, sum(file.stat().st_size for file in source.checksums)
    for file, wanted in source.checksums.items():
        digest = hashlib.md5(usedforsecurity=False)
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress("verifying", done, total)
        if digest.hexdigest() != wanted:
            raise CheckpointError(
                f"{file}: its md5 is not the one in checklist.chk; download it again, "
                "or remove checklist.chk if the change is meant"
            )
