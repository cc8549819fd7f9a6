"""Files that should be JSON lines and are something else, recognized as a whole.

The first line decides whether to look closer, so that a good file costs one line.
"""

import json
import pathlib

from llama_jax.errors import DataError
from llama_jax.file_kinds import check_file

_BOM = b"\xef\xbb\xbf"
_ENCODINGS = {  # the longer marks first
    "UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"),
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
}
_LONGEST = 1 << 28  # bytes of a file that is parsed as a whole, to name its problem


def check_encoding(path: pathlib.Path, shown: pathlib.Path) -> None:
    """Raise a `DataError` if a text begins with the mark of another encoding.

    Args:
      path: of the file.
      shown: its path for messages.
    """
    with path.open("rb") as file:
        head = file.read(4)
    for name, marks in _ENCODINGS.items():
        if head.startswith(marks):
            raise DataError(f"{shown}: is {name} text, not UTF-8; save it as UTF-8")


def check_json_lines(path: pathlib.Path, shown: pathlib.Path) -> None:
    """Raise a `DataError` if a file is no JSON lines, but JSON of another form.

    Args:
      path: of the file.
      shown: its path for messages.
    """
    check_file(path, "JSON", DataError, shown)
    check_encoding(path, shown)
    with path.open("rb") as file:
        line = b""
        number = 0
        while not line.strip():
            if not (line := file.readline(_LONGEST)):
                return
            number += 1
    if b"\0" in line[:4]:  # without a mark
        raise DataError(f"{shown}: is UTF-16 text, not UTF-8; save it as UTF-8")
    try:
        json.loads(line.removeprefix(_BOM))
    except (ValueError, RecursionError):
        pass
    else:
        if shown.name.lower().removesuffix(".gz").endswith(".json"):
            _check_single_object(path, shown)
        return
    if path.stat().st_size <= _LONGEST:
        _check_whole(path, shown, number)


def _check_single_object(path: pathlib.Path, shown: pathlib.Path) -> None:
    """Refuse a .json whose only line is an object that has a list of records."""
    with path.open("rb") as file:
        lines = [
            line for line in (file.readline(_LONGEST) for _ in range(3)) if line.strip()
        ]
    if len(lines) == 1:
        _refuse_object(json.loads(lines[0].removeprefix(_BOM)), shown)


def _check_whole(path: pathlib.Path, shown: pathlib.Path, number: int) -> None:
    """Name what a file is whose first line is not JSON: one value, or several."""
    try:
        text = path.read_bytes().removeprefix(_BOM).decode().lstrip()
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return  # the records name what is wrong with them
    if not text[end:].strip():
        _refuse_object(value, shown)
        if shown.name.lower().removesuffix(".gz").endswith(".json"):
            raise DataError(
                f"{shown}: is one JSON object, not a list of records; put the records "
                "into [ and ], with commas between them"
            )
    raise DataError(
        f"{shown}, line {number}: begins a JSON value that goes on in the next line; "
        "write each record on one line, or all of them as one list in a .json"
    )


def _refuse_object(value: object, shown: pathlib.Path) -> None:
    """Refuse one object that is not itself a record."""
    if not isinstance(value, dict):
        return
    lists = [key for key, part in value.items() if _is_records(part)]
    if lists:
        raise DataError(
            f"{shown}: is one JSON object, not a list of records; write the list in "
            f"its {lists[0]!r} alone"
        )


def _is_records(part: object) -> bool:
    """Whether a value is a list of objects that are no messages."""
    return (
        isinstance(part, list)
        and bool(part)
        and all(isinstance(item, dict) for item in part)
        and not any({"role", "from"} & item.keys() for item in part)
    )
