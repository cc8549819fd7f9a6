"""The header of GGUF files: metadata and tensor descriptions, read and written.

Follows the specification (ggml-org/ggml, docs/gguf.md), versions 2 and 3, little
endian. Implemented here because the package `gguf` is optional, and because files are
not trusted: every count, length and offset is checked against the file's size.
"""

import math
import mmap
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.file_kinds import check_file

MetadataContent = str | bool | int | float | list[str] | np.ndarray
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""Numbers of some types of values."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of a tensor's first byte, if the file has no other
_COUNT_LIMIT = 1 << 16  # metadata entries or tensors; no Llama has a tenth of it
_NAME_LIMIT = 256  # bytes; four times ggml's limit for tensors
_STRINGS_LIMIT = 1 << 22  # in an array; the largest vocabularies have a tenth of it
_AXES_LIMIT = 4
# Types of fixed size: their number, and their `struct` format.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
    12: "d",
}  # fmt: skip


class Entry(NamedTuple):
    """Where a value of the metadata is stored.

    Attributes:
      kind: number of its type; of the elements' type for an array.
      length: elements of an array; None for a single value.
      start, end: its bytes in the file.
    """

    kind: int
    length: int | None
    start: int
    end: int


class TensorInfo(NamedTuple):
    """A tensor as the header describes it; type and extent are not checked yet.

    Attributes:
      shape: in NumPy's order.
      kind: number of its type.
      offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """The header of a file; `size` is that of the whole file in bytes."""

    path: pathlib.Path
    size: int
    entries: Mapping[str, Entry]
    tensors: Mapping[str, TensorInfo]

    def value(self, key: str) -> MetadataContent | None:
        """Read a value of the metadata; None if the key is absent.

        Returns single-precision numbers as the shortest decimals that round to them,
        as they were meant: 1e-5, not 9.999999747378752e-06.

        Raises:
          CheckpointError: a string is not UTF-8.
        """
        if (entry := self.entries.get(key)) is None:
            return None
        with self.path.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.end - entry.start)
        if entry.kind == STRING:
            strings = self._strings(key, data)
            return next(strings) if entry.length is None else list(strings)
        numbers = np.frombuffer(data, np.dtype(_SCALARS[entry.kind]).newbyteorder("<"))
        if entry.length is not None:
            return numbers
        if entry.kind == FLOAT32:
            return float(str(numbers[0]))
        number: bool | int | float = numbers[0].item()
        return number

    def _strings(self, key: str, data: bytes) -> Iterator[str]:
        offset = 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            offset += 8 + length
            try:
                yield data[offset - length : offset].decode()
            except UnicodeDecodeError as error:
                raise damaged(self.path, f"{key} is not UTF-8") from error


def damaged(path: pathlib.Path, problem: str) -> CheckpointError:
    """Return the error for a damaged file."""
    return CheckpointError(f"{path}: is damaged: {problem}; download it again")


def read_header(path: pathlib.Path) -> Header:
    """Read the header of a file, skipping over long values.

    Raises:
      CheckpointError: the file is damaged, of another kind, or of another version.
    """
    check_file(path, "GGUF")
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        start = file.read(8)
        version = int.from_bytes(start[4:], "little")
        if start[:4] != _MAGIC or len(start) < 8:
            raise CheckpointError(f"{path}: is not a GGUF file; download it again")
        if version not in _VERSIONS:
            kind = f"GGUF version {version}"
            if version % 65536 == 0:  # a small number with its bytes swapped
                kind = "GGUF for big-endian machines"
            raise CheckpointError(
                f"{path}: is {kind}, but only versions 2 and 3, little endian, are "
                "supported; convert the model again with a current llama.cpp"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _HeaderReader(path, mapped).read()


class _HeaderReader:
    """Reads a mapped header from front to back, never past its end."""

    def __init__(self, path: pathlib.Path, mapped: mmap.mmap) -> None:
        self._path, self._mapped, self._offset = path, mapped, len(_MAGIC) + 4

    def read(self) -> Header:
        num_tensors, num_entries = self._count("tensors"), self._count("entries")
        entries: dict[str, Entry] = {}
        for _ in range(num_entries):
            key = self._name("a metadata entry")
            if key in entries:
                raise self._damaged(f"{key} occurs twice")
            entries[key] = self._entry(key)
        tensors: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            name = self._name("a tensor")
            if name in tensors:
                raise self._damaged(f"{name} occurs twice")
            tensors[name] = self._tensor_info(name)
        header = Header(self._path, len(self._mapped), entries, tensors)
        alignment = self._alignment(header)
        data_start = -(-self._offset // alignment) * alignment
        for name, tensor in tensors.items():
            offset = data_start + tensor.offset
            if tensor.offset % alignment or offset >= header.size:
                raise self._damaged(
                    f"{name} would begin at byte {tensor.offset:,} of the data, which "
                    f"has {max(0, header.size - data_start):,}"
                )
            tensors[name] = tensor._replace(offset=offset)
        return header

    def _alignment(self, header: Header) -> int:
        key = "general.alignment"
        if (entry := header.entries.get(key)) is None:
            return _ALIGNMENT
        alignment = header.value(key)
        if entry[:2] != (UINT32, None) or not isinstance(alignment, int):
            raise self._damaged(f"{key} is not of the type uint32")
        if alignment % 8 or alignment.bit_count() != 1:
            raise self._damaged(f"{key} is {alignment}")
        return alignment

    def _entry(self, key: str) -> Entry:
        kind, length = self._integer("I"), None
        if kind == ARRAY:
            kind, length = self._integer("I"), self._integer("Q")
        start, count = self._offset, 1 if length is None else length
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == STRING:
            if count > _STRINGS_LIMIT:
                raise self._damaged(f"{key} would have {count:,} strings")
            for _ in range(count):
                self._skip(self._integer("Q"))
        else:
            # Nested arrays too, which the format has but no program writes.
            raise self._damaged(f"{key} is of the unknown type {kind}")
        return Entry(kind, length, start, self._offset)

    def _tensor_info(self, name: str) -> TensorInfo:
        axes = self._integer("I")
        if not 0 < axes <= _AXES_LIMIT:
            raise self._damaged(f"{name} has {axes:,} axes")
        shape = tuple(self._integer("Q") for _ in range(axes))[::-1]
        if not 0 < math.prod(shape) < 1 << 63:
            raise self._damaged(f"{name} has the impossible shape {list(shape)}")
        return TensorInfo(shape, self._integer("I"), self._integer("Q"))

    def _count(self, what: str) -> int:
        count = self._integer("Q")
        if count > _COUNT_LIMIT:
            raise self._damaged(f"it would have {count:,} {what}")
        return count

    def _name(self, what: str) -> str:
        length = self._integer("Q")
        if not 0 < length < _NAME_LIMIT:
            raise self._damaged(f"the name of {what} would have {length:,} bytes")
        self._skip(length)
        try:
            return self._mapped[self._offset - length : self._offset].decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"the name of {what} is not UTF-8") from error

    def _integer(self, kind: str) -> int:
        size = struct.calcsize(kind)
        self._skip(size)
        start = self._offset - size
        return int(struct.unpack_from(f"<{kind}", self._mapped, start)[0])

    def _skip(self, size: int) -> None:
        if size > len(self._mapped) - self._offset:
            raise self._damaged("its header is incomplete")
        self._offset += size

    def _damaged(self, problem: str) -> CheckpointError:
        return damaged(self._path, problem)


class MetadataValue(NamedTuple):
    """A value to be written: number of its type, and a list for an array."""

    kind: int
    content: str | bool | int | float | list[str] | list[float] | list[int]


class TensorLayout(NamedTuple):
    """A tensor to be written: shape in NumPy's order, number of its type, bytes."""

    shape: tuple[int, ...]
    kind: int
    nbytes: int


def pack_header(
    metadata: Mapping[str, MetadataValue], tensors: Mapping[str, TensorLayout]
) -> bytes:
    """Return everything that precedes the data of the first tensor."""
    parts = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(metadata))]
    for key, (kind, content) in metadata.items():
        is_array = isinstance(content, list)
        kinds = (ARRAY, kind) if is_array else (kind,)
        parts += [_string(key), struct.pack(f"<{len(kinds)}I", *kinds)]
        elements = content if isinstance(content, list) else [content]
        if is_array:
            parts.append(struct.pack("<Q", len(elements)))
        if kind == STRING:
            parts += [_string(str(element)) for element in elements]
        else:
            parts.append(struct.pack(f"<{len(elements)}{_SCALARS[kind]}", *elements))
    offset = 0
    for name, (shape, kind, nbytes) in tensors.items():
        axes = len(shape)
        parts.append(_string(name))
        parts.append(struct.pack(f"<I{axes}QIQ", axes, *shape[::-1], kind, offset))
        offset += nbytes + len(padding(nbytes))
    packed = b"".join(parts)
    return packed + padding(len(packed))


def padding(nbytes: int) -> bytes:
    """Return the zeros that align what follows a tensor of so many bytes."""
    return b"\0" * (-nbytes % _ALIGNMENT)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
