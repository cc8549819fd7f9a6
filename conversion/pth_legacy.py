"""PyTorch's files from before 1.6 (`_use_new_zipfile_serialization=False`).

Five pickles in a row: a magic number, a version, facts about the machine, the state
dict, and the keys of its storages; then for each key a count of numbers and their raw
bytes.
"""

import io
import mmap
import pathlib

from llama_jax.conversion.restricted_unpickler import FIX, Storage, read_pickle
from llama_jax.errors import CheckpointError

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_COUNT_BYTES = 8


def read_legacy(
    path: pathlib.Path, mapped: mmap.mmap, limit: int
) -> tuple[object, dict[str, tuple[int, int]]]:
    """Return what the file's main pickle describes, and where its storages are.

    Args:
      path: the file, for messages.
      mapped: its contents.
      limit: most bytes of all pickles together.

    Returns:
      What `read_pickle` returns; start and size in bytes of each storage, by key.

    Raises:
      CheckpointError: the file is damaged, of another kind, or not safe to read.
    """
    stream = io.BytesIO(mapped[:limit])
    storages: dict[str, Storage] = {}
    if read_pickle(stream, path) != _MAGIC or read_pickle(stream, path) != _VERSION:
        raise CheckpointError(
            f"{path}: is a pickle that torch.save did not write; {FIX}"
        )
    machine = read_pickle(stream, path)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(
            f"{path}: was not written on a little-endian machine; save it again on one"
        )
    content = read_pickle(stream, path, storages)
    keys = read_pickle(stream, path)
    strings = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not strings or sorted(keys) != sorted(storages):
        raise CheckpointError(
            f"{path}: its storages are not those of its tensors; {FIX}"
        )
    spans, start = {}, stream.tell()
    for key in keys:
        storage = storages[key]
        size = storage.size * storage.dtype.itemsize
        count = int.from_bytes(mapped[start : start + _COUNT_BYTES], "little")
        start += _COUNT_BYTES
        if count != storage.size or start + size > len(mapped):
            raise CheckpointError(
                f"{path}: storage {key!r} should have {storage.size:,} numbers, but "
                f"the file is damaged there or ends before; {FIX}"
            )
        spans[key] = (start, size)
        start += size
    if start != len(mapped):
        raise CheckpointError(
            f"{path}: has {len(mapped) - start:,} bytes after its last storage; {FIX}"
        )
    return content, spans
