"""`LineFile`: JSON lines of records in order, which a killed run continues."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

from llama_jax.distributed import broadcast_from_main, is_main
from llama_jax.errors import DataError
from llama_jax.types import JsonObject, Path

_HEAD = b'{"record": '


class LineFile:
    """A file of JSON lines to which complete records are appended, in order.

    Each append is on disk when it returns. A process that is killed leaves at most one
    incomplete record at the end, which the next append removes. Each line has `record`
    (its first key), `prompt` and `settings`. With several processes, all of them call
    the methods, and the main one reads and writes.

    Args:
      path: of the file, which may exist; its folder is created.
      prompts: number and prompt of each record of the complete file, in order.
      settings: what the lines depend on; those of the file must be the same.
      lines_per_record: lines that belong together.

    Attributes:
      num_records: complete records in the file.

    Raises:
      DataError: the file cannot be read, or has lines of something else; it stays as it
        is.
    """

    def __init__(
        self,
        path: Path,
        prompts: Sequence[tuple[int, object]],
        settings: JsonObject,
        *,
        lines_per_record: int = 1,
    ) -> None:
        self.path = pathlib.Path(path)
        self._lines_per_record = lines_per_record
        self._size = count = 0
        if is_main():
            for count, (line, end) in enumerate(_read(self.path), start=1):
                _check_settings(line.get("settings", {}), settings, self.path)
                record = (count - 1) // lines_per_record
                if record >= len(prompts) or (
                    (line["record"], line.get("prompt")) != prompts[record]
                ):
                    raise DataError(
                        f"{self.path}, line {count}: is of another prompt than that of "
                        "the input; give the same input, or name another output"
                    )
                if count % lines_per_record == 0:
                    self._size = end
        self.num_records = broadcast_from_main(count // lines_per_record)

    def append(self, lines: Sequence[JsonObject]) -> None:
        """Append the lines of complete records.

        Raises:
          DataError: the file cannot be written.
        """
        self.num_records += len(lines) // self._lines_per_record
        if not is_main():
            return
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


def read_lines(path: Path) -> Iterator[JsonObject]:
    """Read the complete lines of a file that `LineFile` wrote; none if it is missing.

    Raises:
      DataError: the file cannot be read, or has other lines.
    """
    for line, _ in _read(pathlib.Path(path)):
        yield line


def _read(path: pathlib.Path) -> Iterator[tuple[JsonObject, int]]:
    """The complete lines, and where each ends in the file."""
    if not path.exists():
        return
    at = 0
    with _reporting(path, "read"), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            at += len(line)
            value = None
            if line.startswith(_HEAD) and line.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    value = json.loads(line)
            elif line.startswith(_HEAD) or _HEAD.startswith(line):
                return  # the process was killed while it wrote this line
            if value is None:
                raise DataError(
                    f"{path}, line {number}: is not a line that this command writes, "
                    "so nothing is appended; name another output"
                )
            yield value, at


def _check_settings(before: JsonObject, now: JsonObject, path: pathlib.Path) -> None:
    for key in sorted(now.keys() | before.keys()):
        if now.get(key) != before.get(key):
            raise DataError(
                f"{path}: was written with {key} {before.get(key)!r:.60}, not "
                f"{now.get(key)!r:.60}; use the same, or name another output"
            )


@contextlib.contextmanager
def _reporting(path: pathlib.Path, done: str) -> Iterator[None]:
    """Raise a `DataError` that names the path for an `OSError`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be {done} ({error.strerror})") from error
