"""safetensors: a JSON header with names, dtypes, shapes and offsets, then the bytes.

Implemented here because the package's writer needs all tensors in memory at once and
its NumPy reader copies them; here tensors are mapped, and written one at a time.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, raw_bytes
from llama_jax.conversion.lazy_arrays import empty_tensor, mapped_leaf
from llama_jax.errors import CheckpointError
from llama_jax.file_kinds import check_file

_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes, as in the format's own reader
_AXES_LIMIT = 8
_ALIGNMENT = 8
_FIX = "download it again"


class _Entry(NamedTuple):
    """A tensor in the header: `begin` and `end` are bytes of the data."""

    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int
    end: int


def read_safetensors(path: pathlib.Path) -> dict[str, LazyLeaf]:
    """Return the tensors of a file, memory-mapped; all offsets are checked first.

    Args:
      path: the file.

    Raises:
      CheckpointError: the file is damaged, or contains anything but float32, float16
        and bfloat16 tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; download it too")
    check_file(path, "safetensors")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(
                f"{path}: its header would have {length:,} of the file's {size:,} "
                f"bytes; it is damaged or not a safetensors file; {_FIX}"
            )
        header = file.read(length)
    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged; {_FIX}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; {_FIX}")
    fields.pop("__metadata__", None)
    entries = {name: _entry(path, name, entry) for name, entry in fields.items()}
    data_start = 8 + length
    data_end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != data_end:
            raise CheckpointError(
                f"{path}: {name} begins at byte {entry.begin:,} of the data, but the "
                f"previous tensor ends at {data_end:,}; {_FIX}"
            )
        data_end = entry.end
    if data_start + data_end != size:
        raise CheckpointError(
            f"{path}: has {size:,} bytes, but its header describes "
            f"{data_start + data_end:,}; it is incomplete or damaged; {_FIX}"
        )
    return {
        name: mapped_leaf(path, entry.dtype, entry.shape, data_start + entry.begin)
        for name, entry in entries.items()
    }


def write_safetensors(
    path: pathlib.Path,
    tensors: Mapping[str, LazyLeaf],
    written: Callable[[str], None] | None = None,
) -> None:
    """Write a file, one tensor in memory at a time.

    The bytes are those of the reference implementation: the header padded with spaces
    to a multiple of eight, tensors of wider dtypes first, then by name.

    Args:
      path: of the file.
      tensors: by name.
      written: called with the name of each tensor that is written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        fields[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(raw_bytes(tensors[name].read()))
            if written is not None:
                written(name)


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _entry(path: pathlib.Path, name: str, entry: Any) -> _Entry:
    """Check one tensor of the header."""
    try:
        kind, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        valid = valid and type(kind) is str and len(shape) <= _AXES_LIMIT
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path}: the entry of {name!r} is damaged; {_FIX}")
    if kind not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name} has the dtype {kind!r}, but only F32, F16 and BF16 are "
            "supported; download the checkpoint that is not quantized"
        )
    dtype = _DTYPES[kind]
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        raise empty_tensor(path, name, shape)
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} has {end - begin:,} bytes instead of "
            f"{nbytes:,}; {_FIX}"
        )
    return _Entry(tuple(shape), dtype, begin, end)
