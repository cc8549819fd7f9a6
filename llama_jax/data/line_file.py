"""`LineFile`: JSON lines of records in order, which a killed process can continue."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

from llama_jax.errors import DataError
from llama_jax.types import JsonObject, Path


class LineFile:
    """A file of JSON lines to which complete records are appended.

    Each append is on disk when it returns. A process that is killed leaves at most one
    incomplete record at the end, which the next append removes. Every line begins with
    the key `record`.

    Args:
      path: of the file, which may exist; its folder is created.
      lines_per_record: lines that belong together.

    Attributes:
      num_records: complete records in the file.

    Raises:
      DataError: the file cannot be read, or has other lines.
    """

    def __init__(self, path: Path, *, lines_per_record: int = 1) -> None:
        self.path = pathlib.Path(path)
        self.num_records = self._size = 0
        if not self.path.exists():
            return
        lines, at = 0, 0
        head = b'{"record": '
        with _reporting(self.path, "read"), self.path.open("rb") as file:
            for line in file:
                if not line.startswith(head) and not head.startswith(line):
                    raise self._foreign(lines + 1)
                at += len(line)
                if not line.endswith(b"\n"):
                    break
                lines += 1
                if lines % lines_per_record == 0:
                    self.num_records, self._size = lines // lines_per_record, at

    def read(self) -> Iterator[JsonObject]:
        """Read the complete lines, those of an incomplete record too.

        Raises:
          DataError: a line is not JSON.
        """
        if not self.path.exists():
            return
        with _reporting(self.path, "read"), self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise self._foreign(number) from error

    def append(self, lines: Iterable[JsonObject], *, num_records: int) -> None:
        """Append the lines of complete records.

        Raises:
          DataError: the file cannot be written.
        """
        data = b"".join(
            json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines
        )
        with _reporting(self.path, "written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "wb") as file:
                file.truncate(self._size)
                file.seek(self._size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        self._size += len(data)
        self.num_records += num_records

    def _foreign(self, number: int) -> DataError:
        return DataError(
            f"{self.path}, line {number}: is not a line that this command writes, so "
            "nothing is appended; name another file"
        )


@contextlib.contextmanager
def _reporting(path: pathlib.Path, done: str) -> Iterator[None]:
    """Raise a `DataError` that names the path for an `OSError`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be {done} ({error.strerror})") from error
