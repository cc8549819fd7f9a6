"""`checklist.chk`: the md5 checksums that Meta publishes with its checkpoints."""

import hashlib
import pathlib
import re
from collections.abc import Mapping

from llama_jax.checkpoint.lazy_leaf import Progress
from llama_jax.errors import CheckpointError

_CHECKLIST = "checklist.chk"
_BLOCK_BYTES = 1 << 22


def read_checklist(
    folder: pathlib.Path, files: list[pathlib.Path]
) -> dict[pathlib.Path, str]:
    """Return the md5 of those files that the folder's checklist contains, if any.

    Args:
      folder: of the checkpoint.
      files: all files of the checkpoint that are read.

    Raises:
      CheckpointError: the list is damaged, or contains a rank file that is missing.
    """
    checklist = folder / _CHECKLIST
    if not checklist.is_file():
        return {}
    by_name = {file.name: file for file in files}
    checksums = {}
    for line in checklist.read_bytes().decode("ascii", "replace").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{32})[ *]+(\S+)", line.strip())
        if line.strip() and not match:
            raise CheckpointError(
                f"{checklist}: the line {line[:60]!r} is not a checksum and a file "
                "name; download it again, or remove it to skip this check"
            )
        if match and match[2] in by_name:
            checksums[by_name[match[2]]] = match[1].lower()
        elif match and re.fullmatch(r"consolidated\.\d\d\.pth", match[2]):
            raise CheckpointError(
                f"{folder}: {match[2]} is missing, but {_CHECKLIST} lists it; download "
                "it too"
            )
    return checksums


def verify_checksums(
    checksums: Mapping[pathlib.Path, str], progress: Progress | None = None
) -> None:
    """Compare files with their md5 checksums.

    Args:
      checksums: expected md5 of each file, lower-case hexadecimal.
      progress: called with the bytes that are verified.

    Raises:
      CheckpointError: a file differs.
    """
    done, total = 0, sum(file.stat().st_size for file in checksums)
    for file, expected in checksums.items():
        digest = hashlib.md5(usedforsecurity=False)
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress("verifying checksums", done, total)
        if digest.hexdigest() != expected:
            raise CheckpointError(
                f"{file}: its md5 differs from {_CHECKLIST}; download it again, or "
                f"remove {_CHECKLIST} if the file was changed on purpose"
            )
