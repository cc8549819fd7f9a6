"""Recognize files that are not what their names say, by their first bytes."""

import pathlib
from typing import Literal, NamedTuple

from llama_jax.errors import CheckpointError, LlamaJaxError

FileKind = Literal[
    "safetensors", "PyTorch", "GGUF", "llama2.c", "Orbax", "JSON", "tokenizer", "gzip",
    "Parquet", "text",
]  # fmt: skip
"""What a reader expects."""

_HEAD_BYTES = 512


class _Signature(NamedTuple):
    """First bytes of a kind of file.

    Attributes:
      prefixes: any of them.
      description: follows "is".
      remedy: what to do where something else is expected.
      allowed: readers that these first bytes may be meant for.
    """

    prefixes: tuple[bytes, ...]
    description: str
    remedy: str
    allowed: tuple[FileKind, ...] = ()


_SIGNATURES = (
    _Signature(
        (b"version https://git-lfs",),
        "a Git LFS pointer instead of the file",
        "run `git lfs pull` in its folder, or download the file",
    ),
    _Signature(
        (b"<!doctype", b"<html", b"<?xml", b"<error"),
        "a web page instead of the file, such as a login or an error",
        "download it again, with an access token if the model needs one",
        ("text",),
    ),
    _Signature(
        (b"lmgg", b"fmgg", b"tjgg", b"algg"),
        "a GGML file, which llama.cpp wrote before GGUF",
        "convert the original model to GGUF with a current llama.cpp, or download a "
        ".gguf file",
    ),
    _Signature(
        (b"GGUF",),
        "a GGUF file",
        "name the file itself, ending in .gguf, as the checkpoint",
        ("GGUF",),
    ),
    _Signature(
        (b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."),
        "a file of PyTorch",
        "name the folder of its checkpoint, in which it ends in .bin or .pth",
        ("PyTorch",),
    ),
    _Signature(
        (b'{"', b"{\n", b"{ "),
        "JSON text, such as a server's error message",
        "download it again",
        ("JSON", "tokenizer", "text"),
    ),
    _Signature((b"\x1f\x8b",), "compressed with gzip", "unpack it", ("gzip",)),
)


def check_file(
    path: pathlib.Path,
    expected: FileKind,
    error: type[LlamaJaxError] = CheckpointError,
    shown: pathlib.Path | None = None,
) -> None:
    """Raise an error if a file is recognizably of another kind.

    A file that cannot be opened is left to its reader.

    Args:
      path: of the file.
      expected: what its reader reads.
      error: type of the exception; its message names what the file is, and the remedy.
      shown: path for the message, if the file is a copy.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return
    if problem := _problem(head, expected):
        raise error(f"{shown or path}: {problem}")


def _problem(head: bytes, expected: FileKind) -> str | None:
    if not head:
        return "is empty; download it again"
    if not head.strip(b"\0"):
        return "begins with zeros only, as an unfinished download; download it again"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature in _SIGNATURES:
        if expected in signature.allowed:
            continue
        if head.startswith(signature.prefixes) or text.startswith(signature.prefixes):
            return f"is {signature.description}; {signature.remedy}"
    if expected != "safetensors" and head[8:10] == b'{"' and not any(head[4:8]):
        return "is a safetensors file; name the folder of its checkpoint"
    return None
