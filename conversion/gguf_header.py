"""GGUF, the container: metadata under names, then descriptions of tensors, then data.

After the specification of the format (ggml-org/ggml, docs/gguf.md), versions 2 and 3,
little endian. Files are hostile until every number has been compared with their size.
"""

import math
import mmap
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of a tensor's first byte, where the file does not say
_MOST = 1 << 16  # entries of metadata, and tensors; no Llama has a tenth of it
_MOST_NAME = 256  # bytes; four times what ggml allows a tensor
_MOST_TEXTS = 1 << 22  # in an array; the largest vocabularies have a tenth of it
_MOST_AXES = 4

# Numbers of the types of values, and how `struct` calls those of fixed size.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
    12: "d",
}  # fmt: skip
# Numbers of the types of tensors that are no more than arrays, and of the one that is
# written besides.
FLOATS: dict[int, np.dtype] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    30: np.dtype(jnp.bfloat16),
}
Q8_0, Q8_BLOCK, Q8_BYTES = 8, 32, 34  # the numbers of a block, and its bytes
CHUNK = 1 << 16  # numbers that are quantized or cast at a time, about
# What gguf takes for one chunk besides its result: 1.4 MiB at most, of all types.
_CHUNK_BYTES = 2 << 20
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


class Entry(NamedTuple):
    """Where a value of the metadata lies in its file.

    Attributes:
      kind: number of its type, for an array that of its elements.
      length: of an array in elements, None where it is no array.
      start, end: its bytes.
    """

    kind: int
    length: int | None
    start: int
    end: int


class Described(NamedTuple):
    """A tensor as the file describes it: its type and place are not yet checked.

    Attributes:
      shape: in NumPy's order.
      kind: number of its type.
      offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """What lies before the tensors' data, and where that begins."""

    path: pathlib.Path
    size: int
    entries: Mapping[str, Entry]
    tensors: Mapping[str, Described]

    def value(self, key: str) -> Any:
        """A value of the metadata: a number, a text or an array of them; None: absent.

        Numbers of single precision are the shortest decimals that round to them, which
        is what was meant: 1e-5, and not 9.999999747378752e-06.

        Raises:
          CheckpointError: it is no text.
        """
        if (entry := self.entries.get(key)) is None:
            return None
        with self.path.open("rb") as file:
            file.seek(entry.start)
            data = file.read(entry.end - entry.start)
        if entry.kind == STRING:
            texts = self._texts(key, data)
            return next(texts) if entry.length is None else list(texts)
        numbers = np.frombuffer(data, np.dtype(_SCALARS[entry.kind]).newbyteorder("<"))
        if entry.length is not None:
            return numbers
        number = numbers[0]
        return float(str(number)) if entry.kind == FLOAT32 else number.item()

    def _texts(self, key: str, data: bytes) -> Iterator[str]:
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8 + length
            try:
                yield data[at - length : at].decode()
            except UnicodeDecodeError as error:
                raise _damaged(self.path, f"{key} is no text") from error


def shown(value: Any) -> str:
    """A value for a message, which need not end where the value ends."""
    text = repr(value[:3] if isinstance(value, list) else value)
    return text if len(text) < 60 else f"{text[:60]}…"


def read_header(path: pathlib.Path) -> Header:
    """Read what lies before the tensors' data, without reading long values.

    Raises:
      CheckpointError: the file is damaged, of another kind, or of another version.
    """
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
            kind = f"version {version} of GGUF"
            if version % 65536 == 0:  # the bytes of a small number, the other way round
                kind = "GGUF for big-endian machines"
            raise CheckpointError(
                f"{path}: is {kind}; versions 2 and 3, little endian, can be read: "
                "convert the model again with a current llama.cpp"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _Cursor(path, mapped).header()


class _Cursor:
    """Reads a mapped header from front to back, never past its end."""

    def __init__(self, path: pathlib.Path, mapped: mmap.mmap) -> None:
        self._path, self._mapped, self._at = path, mapped, len(_MAGIC) + 4

    def header(self) -> Header:
        tensors, entries = self._count("tensors"), self._count("entries of metadata")
        found: dict[str, Entry] = {}
        for _ in range(entries):
            key = self._name("an entry of the metadata")
            if key in found:
                raise self._damaged(f"{key} is there twice")
            found[key] = self._entry(key)
        described: dict[str, Described] = {}
        for _ in range(tensors):
            name = self._name("a tensor")
            if name in described:
                raise self._damaged(f"{name} is there twice")
            described[name] = self._described(name)
        size = len(self._mapped)
        header = Header(self._path, size, found, described)
        alignment = _ALIGNMENT
        if given := found.get("general.alignment"):
            if given[:2] != (UINT32, None):
                raise self._damaged("general.alignment is of another type")
            alignment = header.value("general.alignment")
            if alignment % 8 or alignment.bit_count() != 1:
                raise self._damaged(f"general.alignment is {alignment}")
        begin = -(-self._at // alignment) * alignment
        for name, tensor in described.items():
            if tensor.offset % alignment or begin + tensor.offset >= size:
                raise self._damaged(
                    f"{name} would begin at byte {tensor.offset:,} of the data, which "
                    f"has {max(0, size - begin):,}"
                )
        placed = {n: t._replace(offset=begin + t.offset) for n, t in described.items()}
        return header._replace(tensors=placed)

    def _entry(self, key: str) -> Entry:
        kind, count = self._number("I"), None
        if kind == ARRAY:
            kind, count = self._number("I"), self._number("Q")
        start = self._at
        if kind in _SCALARS:
            self._skip(
                (1 if count is None else count) * struct.calcsize(_SCALARS[kind])
            )
        elif kind == STRING:
            if count is not None and count > _MOST_TEXTS:
                raise self._damaged(f"{key} would have {count:,} texts")
            for _ in range(1 if count is None else count):
                self._skip(self._number("Q"))
        else:
            # Arrays of arrays too, which the format has and no program writes.
            raise self._damaged(f"{key} is of the unknown type {kind}")
        return Entry(kind, count, start, self._at)

    def _described(self, name: str) -> Described:
        axes = self._number("I")
        if not 0 < axes <= _MOST_AXES:
            raise self._damaged(f"{name} has {axes:,} axes")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        if not 0 < math.prod(shape) < 1 << 63:
            raise self._damaged(f"{name} has the impossible shape {list(shape)}")
        return Described(shape, self._number("I"), self._number("Q"))

    def _count(self, what: str) -> int:
        count = self._number("Q")
        if count > _MOST:
            raise self._damaged(f"it would have {count:,} {what}")
        return count

    def _name(self, what: str) -> str:
        length = self._number("Q")
        if not 0 < length < _MOST_NAME:
            raise self._damaged(f"the name of {what} would have {length:,} bytes")
        self._skip(length)
        try:
            return self._mapped[self._at - length : self._at].decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"the name of {what} is no text") from error

    def _number(self, kind: str) -> int:
        size = struct.calcsize(kind)
        self._skip(size)
        return int(struct.unpack_from(f"<{kind}", self._mapped, self._at - size)[0])

    def _skip(self, size: int) -> None:
        if size > len(self._mapped) - self._at:
            raise self._damaged("its header ends before it is complete")
        self._at += size

    def _damaged(self, what: str) -> CheckpointError:
        return _damaged(self._path, what)


def _damaged(path: pathlib.Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: is damaged: {what}; download it again")


def lazy_tensors(header: Header) -> dict[str, LazyLeaf]:
    """The tensors of a file: as they are, or made float32 where they are quantized.

    Raises:
      CheckpointError: one is of an unknown type, lies within another, or ends behind
        the end of the file.
    """
    leaves, spans = {}, []
    for name, tensor in header.tensors.items():
        leaves[name], nbytes = _leaf(header, name, tensor)
        spans.append((tensor.offset, tensor.offset + nbytes, name))
    last, before = 0, ""
    for begin, end, name in sorted(spans):
        if begin < last:
            raise CheckpointError(
                f"{header.path}: is damaged: {name} begins within {before}; download "
                "it again"
            )
        last, before = end, name
    if last > header.size:
        raise CheckpointError(
            f"{header.path}: has {header.size:,} bytes, but {before} ends at "
            f"{last:,}; it is incomplete or damaged, download it again"
        )
    return leaves


def _leaf(header: Header, name: str, tensor: Described) -> tuple[LazyLeaf, int]:
    """A tensor that is read when wanted, and how many bytes it has in the file."""
    path, shape, offset = header.path, tensor.shape, tensor.offset
    if (dtype := FLOATS.get(tensor.kind)) is not None:

        def read() -> np.ndarray:
            return np.asarray(np.memmap(path, dtype, "r", offset, shape))

        return LazyLeaf(shape, dtype, read), math.prod(shape) * dtype.itemsize

    block, block_bytes = _block(path, name, tensor.kind)
    if shape[-1] % block:
        raise CheckpointError(
            f"{path}: is damaged: rows of {name} have {shape[-1]:,} numbers, its type "
            f"has blocks of {block}; download it again"
        )
    nbytes = math.prod(shape) // block * block_bytes

    def dequantized() -> np.ndarray:
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType(tensor.kind)
        raw = np.memmap(path, np.uint8, "r", offset, (nbytes,))
        out = np.empty(math.prod(shape), np.float32)
        step = CHUNK // block
        for start in range(0, nbytes // block_bytes, step):
            blocks = raw[start * block_bytes : (start + step) * block_bytes]
            with np.errstate(all="ignore"):  # a scale may be anything
                numbers = quants.dequantize(np.asarray(blocks)[None], kind)
            out[start * block : (start + step) * block] = numbers[0]
        return out.reshape(shape)

    leaf = LazyLeaf(shape, np.dtype(np.float32), dequantized)
    return leaf.with_host_bytes(leaf.nbytes + _CHUNK_BYTES), nbytes


def _block(path: pathlib.Path, name: str, number: int) -> tuple[int, int]:
    """Numbers and bytes of a block of a quantized type that can be read."""
    need_gguf(path, "is quantized")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        kind = GGMLQuantizationType(number)
        block, nbytes = GGML_QUANT_SIZES[kind]
        with np.errstate(all="ignore"):
            quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {name} is of the type {number}, which the installed gguf does "
            "not know; try `pip install --upgrade gguf`, or take another file"
        ) from error
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: {name} is of the type {kind.name}, which cannot be read; take a "
            "file of another quantization"
        ) from error
    return block, nbytes


def need_gguf(path: pathlib.Path, why: str) -> None:
    """Raise a `CheckpointError` where the package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f'{path}: {why}, which needs a package: pip install "llama-jax[gguf]"'
        ) from error


class Value(NamedTuple):
    """A value of the metadata to be written: its type, and a list for an array."""

    kind: int
    content: Any


class Layout(NamedTuple):
    """A tensor to be written: shape in NumPy's order, number of its type, bytes."""

    shape: tuple[int, ...]
    kind: int
    nbytes: int


def pack_header(metadata: Mapping[str, Value], tensors: Mapping[str, Layout]) -> bytes:
    """All that lies before the first tensor, which is to follow at once."""
    parts = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        array = isinstance(value.content, list)
        head = (ARRAY, value.kind) if array else (value.kind,)
        parts += [_string(key), struct.pack(f"<{len(head)}I", *head)]
        if array:
            parts.append(struct.pack("<Q", len(value.content)))
        parts += [
            _string(one)
            if value.kind == STRING
            else struct.pack("<" + _SCALARS[value.kind], one)
            for one in (value.content if array else [value.content])
        ]
    offset = 0
    for name, tensor in tensors.items():
        axes = len(tensor.shape)
        place = (tensor.kind, offset)
        parts.append(_string(name))
        parts.append(struct.pack(f"<I{axes}QIQ", axes, *tensor.shape[::-1], *place))
        offset += tensor.nbytes + len(padding(tensor.nbytes))
    packed = b"".join(parts)
    return packed + padding(len(packed))


def padding(nbytes: int) -> bytes:
    """What follows so many bytes, so that the next tensor begins where it should."""
    return b"\0" * (-nbytes % _ALIGNMENT)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded
