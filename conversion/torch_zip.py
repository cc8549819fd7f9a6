"""PyTorch's `.pth` files without PyTorch: a zip of raw storages and a pickle.

The pickle is not executed but read (see `unpickle.py`); the tensors are views of the
mapped file. Offsets, sizes and strides are checked before anything is looked at.
"""

import io
import math
import mmap
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

from llama_jax.conversion.restricted_unpickler import FIX, Tensor, read_pickle
from llama_jax.errors import CheckpointError

_MOST_PICKLE = 64 << 20  # bytes; that of a 70B model has a tenth of a megabyte
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")


def read_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, as read-only views of the mapped file.

    Raises:
      CheckpointError: the file is damaged, of another kind, or its pickle asks for
        something that is not a float32, float16 or bfloat16 tensor.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; {FIX}")
    with path.open("rb") as file:
        entries = _zip_entries(path, file)
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{path}: a zip archive, but not one that torch.save wrote (it has "
                f"{len(pickles)} data.pkl); {FIX}"
            )
        root = pickles[0].removesuffix("data.pkl")
        start, size = entries[pickles[0]]
        if size > _MOST_PICKLE:
            raise CheckpointError(
                f"{path}: its pickle has {size:,} bytes, which no state dict needs; "
                "it may be malicious, get the file from another source"
            )
        # An empty file cannot be mapped, but a zip archive is never empty.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    order = entries.get(f"{root}byteorder")
    if order and mapped[order[0] : sum(order)] != b"little":
        raise CheckpointError(
            f"{path}: was written on a big-endian machine; save it again on a "
            "little-endian one"
        )
    found = read_pickle(mapped[start : start + size], path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: its pickle is not a state dict; {FIX}")
    arrays = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is not a named tensor; it is not a plain state dict"
            )
        arrays[name] = _view(path, name, tensor, mapped, entries, root)
    return arrays


def _zip_entries(path: pathlib.Path, file: Any) -> dict[str, tuple[int, int]]:
    """Where the contents of each entry begin and how long they are, all checked."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(2) != b"PK":
        raise CheckpointError(
            f"{path}: is not a zip archive, so it is damaged, incomplete or of a "
            f"PyTorch older than 1.6; {FIX}"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    # What zipfile does on damaged directories besides its own exception.
    except (
        zipfile.BadZipFile, ValueError, struct.error, OSError, EOFError, OverflowError,
        NotImplementedError, IndexError, MemoryError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path}: its zip directory is damaged or missing ({error}); {FIX}"
        ) from error
    entries: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{path}: entry {info.filename!r} is compressed or encrypted, so that "
                "it cannot be mapped; save the checkpoint again with torch.save"
            )
        start = _content_start(path, file, info, size)
        if info.compress_size != info.file_size or start + info.file_size > end:
            raise CheckpointError(
                f"{path}: entry {info.filename!r} reaches beyond the end of the data; "
                f"{FIX}"
            )
        if info.filename in entries:
            raise CheckpointError(f"{path}: {info.filename!r} occurs twice; {FIX}")
        entries[info.filename] = (start, info.file_size)
    last = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < last:
            raise CheckpointError(
                f"{path}: entry {info.filename!r} overlaps the one before; {FIX}"
            )
        last = sum(entries[info.filename])
    return entries


def _content_start(
    path: pathlib.Path, file: Any, info: zipfile.ZipInfo, size: int
) -> int:
    """The offset of an entry's bytes, from its local header, which must agree."""
    fits = 0 <= info.header_offset <= size - _LOCAL_HEADER.size
    if fits:
        file.seek(info.header_offset)
        header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        name_size, extra_size = header[-2:]
        name = file.read(name_size)
        utf8 = header[2] & 0x800
        fits = header[0] == b"PK\x03\x04" and header[3] == info.compress_type
        wanted = info.orig_filename.encode("utf-8" if utf8 else "cp437", "replace")
        fits = fits and name == wanted
    if not fits:
        raise CheckpointError(
            f"{path}: entry {info.filename!r} is not where the zip directory says; "
            f"{FIX}"
        )
    return info.header_offset + _LOCAL_HEADER.size + name_size + extra_size


def _view(
    path: pathlib.Path,
    name: str,
    tensor: Tensor,
    mapped: mmap.mmap,
    entries: dict[str, tuple[int, int]],
    root: str,
) -> np.ndarray:
    """One tensor over the mapped file, if it lies wholly within its storage."""
    storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
    start, size = entries.get(f"{root}data/{storage.key}", (0, -1))
    if size != storage.numbers * itemsize:
        raise CheckpointError(
            f"{path}: the storage of {name} is missing or does not have "
            f"{storage.numbers:,} numbers; {FIX}"
        )
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    # Fewer numbers than the shape has would mean that some are used twice.
    distinct = math.prod(tensor.shape) <= last + 1 - tensor.offset
    if 0 in tensor.shape or not distinct or last >= storage.numbers:
        raise CheckpointError(
            f"{path}: {name} of shape {list(tensor.shape)} does not fit into its "
            f"storage of {storage.numbers:,} numbers; {FIX}"
        )
    return np.ndarray(
        tensor.shape,
        storage.dtype,
        mapped,
        start + tensor.offset * itemsize,
        tuple(stride * itemsize for stride in tensor.strides),
    )
