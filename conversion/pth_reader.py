"""Read PyTorch's `.pth` and `.bin` files without PyTorch.

A file is a zip archive of raw storages and a pickle, or of the older kind that
`pth_legacy` describes.

`torch.load` would need PyTorch, and executes pickles; here the pickle is only
interpreted (see `restricted_unpickler`), and tensors are views of the mapped file.
Offsets, sizes and strides are checked before any data is read.
"""

import io
import math
import mmap
import pathlib
import struct
import zipfile
from typing import BinaryIO

import numpy as np

from llama_jax.conversion.lazy_arrays import empty_tensor
from llama_jax.conversion.pth_legacy import read_legacy
from llama_jax.conversion.restricted_unpickler import FIX, TensorView, read_pickle
from llama_jax.errors import CheckpointError
from llama_jax.file_kinds import check_file

_PICKLE_LIMIT = 64 << 20  # bytes; the pickle of a 70B model has about 100 kB
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_Spans = dict[str, tuple[int, int]]  # start and size in bytes, by name


def read_pth(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict as read-only views of the mapped file.

    Args:
      path: the file.

    Raises:
      CheckpointError: the file is damaged, of another kind, or its pickle contains
        anything but float32, float16 and bfloat16 tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; {FIX}")
    check_file(path, "PyTorch")
    with path.open("rb") as file:
        # mmap fails on empty files only, which check_file has refused.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if mapped[:2] == b"PK":
            state_dict, spans = _read_zip(path, file, mapped)
        elif mapped[:1] == b"\x80":
            state_dict, spans = read_legacy(path, mapped, _PICKLE_LIMIT)
        else:
            raise CheckpointError(
                f"{path}: is not a file of torch.save; it is damaged or incomplete; "
                f"{FIX}"
            )
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{path}: its pickle is not a state dict; {FIX}")
    arrays = {}
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorView):
            raise CheckpointError(
                f"{path}: {name!r} is not a named tensor; only plain state dicts are "
                "supported"
            )
        arrays[name] = _view(path, name, tensor, mapped, spans)
    return arrays


def _read_zip(
    path: pathlib.Path, file: BinaryIO, mapped: mmap.mmap
) -> tuple[object, _Spans]:
    """Return what the pickle describes, and where its storages are."""
    entries = _zip_entries(path, file)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path}: a zip archive that torch.save did not write ({len(pickles)} "
            f"data.pkl instead of 1); {FIX}"
        )
    root = pickles[0].removesuffix("data.pkl")
    start, size = entries[pickles[0]]
    if size > _PICKLE_LIMIT:
        raise CheckpointError(
            f"{path}: its pickle has {size:,} bytes, more than any state dict needs; "
            "it may be malicious, get the file from another source"
        )
    byte_order = entries.get(f"{root}byteorder")
    if byte_order and mapped[byte_order[0] : sum(byte_order)] != b"little":
        raise CheckpointError(
            f"{path}: was written on a big-endian machine; save it again on a "
            "little-endian one"
        )
    folder = f"{root}data/"
    spans = {
        name.removeprefix(folder): span
        for name, span in entries.items()
        if name.startswith(folder)
    }
    return read_pickle(io.BytesIO(mapped[start : start + size]), path), spans


def _zip_entries(path: pathlib.Path, file: BinaryIO) -> _Spans:
    """Return where the content of each entry is stored, all checked."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    # All that zipfile raises on damaged directories.
    except (
        zipfile.BadZipFile, ValueError, struct.error, OSError, EOFError, OverflowError,
        NotImplementedError, IndexError, MemoryError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{path}: its zip directory is damaged or missing ({error}); {FIX}"
        ) from error
    entries: _Spans = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{path}: entry {info.filename!r} is compressed or encrypted and "
                "cannot be mapped; save the checkpoint again with torch.save"
            )
        start = _content_start(path, file, info, size)
        if info.compress_size != info.file_size or start + info.file_size > end:
            raise CheckpointError(
                f"{path}: entry {info.filename!r} extends beyond the end of the data; "
                f"{FIX}"
            )
        if info.filename in entries:
            raise CheckpointError(f"{path}: {info.filename!r} occurs twice; {FIX}")
        entries[info.filename] = (start, info.file_size)
    last = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < last:
            raise CheckpointError(
                f"{path}: entry {info.filename!r} overlaps the previous one; {FIX}"
            )
        last = sum(entries[info.filename])
    return entries


def _content_start(
    path: pathlib.Path, file: BinaryIO, info: zipfile.ZipInfo, size: int
) -> int:
    """Return the offset of an entry's content, from its local header."""
    fits = 0 <= info.header_offset <= size - _LOCAL_HEADER.size
    if fits:
        file.seek(info.header_offset)
        header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        name_size, extra_size = header[-2:]
        name = file.read(name_size)
        utf8 = header[2] & 0x800
        expected = info.orig_filename.encode("utf-8" if utf8 else "cp437", "replace")
        fits = header[0] == b"PK\x03\x04" and header[3] == info.compress_type
        fits = fits and name == expected
    if not fits:
        raise CheckpointError(
            f"{path}: entry {info.filename!r} is not where the zip directory says; "
            f"{FIX}"
        )
    return info.header_offset + _LOCAL_HEADER.size + name_size + extra_size


def _view(
    path: pathlib.Path,
    name: str,
    tensor: TensorView,
    mapped: mmap.mmap,
    spans: _Spans,
) -> np.ndarray:
    """Return one tensor over the mapped file, if its storage contains all of it."""
    storage, itemsize = tensor.storage, tensor.storage.dtype.itemsize
    start, size = spans.get(storage.key, (0, -1))
    if size != storage.size * itemsize:
        raise CheckpointError(
            f"{path}: the storage of {name} is missing or does not have "
            f"{storage.size:,} numbers; {FIX}"
        )
    if 0 in tensor.shape:
        raise empty_tensor(path, name, tensor.shape)
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    # A span shorter than the shape would use some numbers twice.
    distinct = math.prod(tensor.shape) <= last + 1 - tensor.offset
    if not distinct or last >= storage.size:
        raise CheckpointError(
            f"{path}: {name} of shape {list(tensor.shape)} does not fit into its "
            f"storage of {storage.size:,} numbers; {FIX}"
        )
    return np.ndarray(
        tensor.shape,
        storage.dtype,
        mapped,
        start + tensor.offset * itemsize,
        tuple(stride * itemsize for stride in tensor.strides),
    )
