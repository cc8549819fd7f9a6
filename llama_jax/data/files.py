"""`Corpus`: files as one numbered sequence of records, each read on demand.

Memory has only the offsets of each record (24 bytes), so that records can be visited in
any order. Plain files are mapped. Compressed files, JSON lists and Parquet, which have
no random access, are first expanded into a temporary folder.
"""

import functools
import gzip
import hashlib
import json
import mmap
import os
import pathlib
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from llama_jax.data.json_lines import check_encoding, check_json_lines
from llama_jax.errors import DataError
from llama_jax.file_kinds import check_file
from llama_jax.types import JsonObject, Path

Unit = Literal["line", "item", "row", "document"]

_KEYS = (
    "text", "prompt", "response", "completion", "instruction", "input", "output",
    "messages", "conversations",
)  # fmt: skip
_BLOCK = 1 << 24
_MOST_OPEN = 64
_BOM = b"\xef\xbb\xbf"


class Location(NamedTuple):
    """The origin of a record, as `train.jsonl, line 3`."""

    file: str
    unit: Unit
    number: int

    def __str__(self) -> str:
        """The location as text."""
        return f"{self.file}, {self.unit} {self.number}"


class Raw(NamedTuple):
    """The bytes of a record: JSON, or a document or a piece of one.

    `begins` and `ends` say whether it has the first and last bytes of its document.
    """

    location: Location
    data: bytes
    begins: bool
    ends: bool


class Corpus:
    """The records of files, by number.

    Args:
      files: .jsonl, .json, .txt, each also with .gz; .parquet.
      separator: between the documents of a .txt; one without it is one document.
      piece_bytes: a longer document of a .txt becomes several records, cut at the
        first line end after this many bytes. The line end is in both, as the last
        character of one and the first of the next.
      folder: where files are expanded; None is a temporary one.

    Attributes:
      fingerprint: hash of the records' offsets; the same for the same files in the
        same order, whatever their paths.

    Raises:
      DataError: there is no file or no record, or a file cannot be read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        separator: str = "<|endoftext|>",
        piece_bytes: int = 1 << 20,
        folder: Path | None = None,
    ) -> None:
        if isinstance(files, (str, os.PathLike)):
            files = [files]
        if not files:
            raise DataError("data: no file is given; name at least one")
        if not separator:
            raise DataError("data: the separator of documents must not be empty")
        self._folder = folder
        self._expanded: list[pathlib.Path] = []
        self._names = [os.fspath(file) for file in files]
        self._paths: list[pathlib.Path] = []
        self._units: list[Unit] = []
        self._map = functools.lru_cache(_MOST_OPEN)(_map)
        tables, digest = [], hashlib.sha256()
        for name in self._names:
            try:
                path, unit = _expand(pathlib.Path(name), self._new_path)
                data = self._map(path)
            except OSError as error:
                reason = error.strerror or "it is damaged"
                raise DataError(f"{name}: cannot be read ({reason})") from error
            self._paths.append(path)
            self._units.append(unit)
            if unit == "document":
                table = _documents(data, separator.encode(), piece_bytes)
            else:
                table = _lines(data)
            tables.append(table)
            digest.update(repr((unit, len(data), len(table))).encode())
            digest.update(table[:, :2].tobytes())
        self._table = np.concatenate(tables)
        self._ends = np.cumsum([len(table) for table in tables])
        self.fingerprint = digest.hexdigest()[:16]
        if not len(self):
            raise DataError(f"data: there is no record in {', '.join(self._names)}")

    def __len__(self) -> int:
        """The number of records."""
        return len(self._table)

    def read(self, index: int) -> Raw:
        """Read the record with this number, from 0. It is safe in threads."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[file - 1]) if file else 0
        last = int(self._ends[file]) - 1
        start, stop, number = self._table[index].tolist()
        return Raw(
            Location(self._names[file], self._units[file], number),
            self._map(self._paths[file])[start:stop],
            index == first or int(self._table[index - 1, 2]) != number,
            index == last or int(self._table[index + 1, 2]) != number,
        )

    def _new_path(self) -> pathlib.Path:
        """A path for a file that is removed with the corpus."""
        if not self._expanded:
            folder = tempfile.mkdtemp(prefix="llama_jax-", dir=self._folder)
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._expanded.append(pathlib.Path(folder))
        self._expanded.append(self._expanded[0] / str(len(self._expanded)))
        return self._expanded[-1]


def _map(path: pathlib.Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _expand(
    path: pathlib.Path, new_path: Callable[[], pathlib.Path]
) -> tuple[pathlib.Path, Unit]:
    """A file of lines or of documents with the records of `path`."""
    name, shown = path.name.lower(), path
    if name.endswith(".parquet"):
        check_file(path, "Parquet", DataError)
        return _written(new_path(), _parquet(path)), "row"
    if name.endswith(".gz"):
        check_file(path, "gzip", DataError)
        target = new_path()
        try:
            with gzip.open(path) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, _BLOCK)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: is not gzip, or is cut off ({error})") from error
        path, name = target, name.removesuffix(".gz")
    is_empty = path.stat().st_size == 0  # as a part of many files may be
    if name.endswith(".txt"):
        if not is_empty:
            check_file(path, "text", DataError, shown)
            check_encoding(path, shown)
        return path, "document"
    if not name.endswith((".jsonl", ".json")):
        kind = (
            "a table of comma-separated values"
            if name.endswith((".csv", ".tsv"))
            else "of no known kind"
        )
        raise DataError(
            f"{shown}: is {kind}; give .jsonl, .json, .txt (each also with .gz) or "
            ".parquet"
        )
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    if head.startswith(b"["):
        return _written(new_path(), _items(path, shown)), "item"
    if not is_empty:
        check_json_lines(path, shown)
    return path, "line"


def _written(path: pathlib.Path, values: Iterator[object]) -> pathlib.Path:
    with path.open("w", encoding="ascii") as out:
        for value in values:
            # What JSON lacks (dates, bytes) cannot be text either.
            out.write(json.dumps(value, default=lambda _: None) + "\n")
    return path


def _items(path: pathlib.Path, shown: pathlib.Path) -> Iterator[object]:
    try:
        values = json.loads(path.read_bytes().removeprefix(_BOM))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown}: is not a list in JSON ({error})") from error
    yield from values


def _parquet(path: pathlib.Path) -> Iterator[JsonObject]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f'{path}: Parquet needs a package; pip install "llama-jax[parquet]"'
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            known = [name for name in _KEYS if name in names]
            if not known:
                raise DataError(
                    f"{path}: has no column of a known name, only "
                    f"{', '.join(names[:8]) or 'none'}; rename some to "
                    f"{', '.join(_KEYS)}"
                )
            for batch in file.iter_batches(batch_size=1024, columns=known):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: is not Parquet, or damaged ({reason})") from error


def _table(*columns: Sequence[int] | np.ndarray) -> np.ndarray:
    """Starts, stops and numbers of lines as columns."""
    return np.stack([np.asarray(column, np.int64) for column in columns], axis=1)


def _lines(data: mmap.mmap | bytes) -> np.ndarray:
    """Start, end and number of each line that is not empty: [records, 3]."""
    first = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    line_ends = [np.zeros(0, np.int64)]
    for at in range(0, len(data), _BLOCK):
        block = np.frombuffer(data[at : at + _BLOCK], np.uint8)
        line_ends.append(np.flatnonzero(block == ord("\n")) + at)
    stops = np.concatenate(line_ends)
    if len(data) and data[len(data) - 1 :] != b"\n":
        stops = np.append(stops, len(data))
    starts = np.concatenate([[first], stops[:-1] + 1]) if len(stops) else stops
    is_record = stops - starts > 8
    for short in np.flatnonzero(~is_record):  # it may be blank
        is_record[short] = bool(data[starts[short] : stops[short]].strip())
    numbers = np.arange(1, len(stops) + 1)
    return _table(starts[is_record], stops[is_record], numbers[is_record])


def _documents(
    data: mmap.mmap | bytes, separator: bytes, piece_bytes: int
) -> np.ndarray:
    """Start, end and number of each piece of a document: [records, 3].

    Line ends around a separator belong to no document.
    """
    rows: list[tuple[int, int, int]] = []
    at = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    number = 0
    while at <= len(data):
        next = data.find(separator, at)
        stop = len(data) if next < 0 else next
        start, end = at, stop
        while start < end and data[start : start + 1] in (b"\n", b"\r"):
            start += 1
        while start < end and data[end - 1 : end] in (b"\n", b"\r"):
            end -= 1
        if start < end:
            number += 1
            rows += (
                (*piece, number) for piece in _pieces(data, start, end, piece_bytes)
            )
        if next < 0:
            break
        at = stop + len(separator)
    return _table(*zip(*rows, strict=True)) if rows else np.zeros((0, 3), np.int64)


def _pieces(
    data: mmap.mmap | bytes, start: int, end: int, piece_bytes: int
) -> Iterator[tuple[int, int]]:
    while end - start > piece_bytes:
        cut = data.find(b"\n", start + piece_bytes, end)
        if cut < 0:
            break
        yield start, cut + 1
        start = cut
    yield start, end
