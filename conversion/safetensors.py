"""safetensors: a JSON header with names, dtypes, shapes and offsets, then the bytes."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, raw_bytes
from llama_jax.errors import CheckpointError

_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, the limit of the format's own reader
_ALIGNMENT = 8
_MOST_AXES = 8
_FIX = "download it again"


def read_safetensors(path: pathlib.Path) -> dict[str, LazyLeaf]:
    """The tensors of a file, mapped; every offset is checked before it is used.

    Raises:
      CheckpointError: the file is damaged, or holds something that is no float32,
        float16 or bfloat16 tensor.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; download it too")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise CheckpointError(
                f"{path}: its header would have {length:,} bytes of the file's "
                f"{size:,}; it is damaged or no safetensors file; {_FIX}"
            )
        header = file.read(length)
    try:
        described = json.loads(header.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged; {_FIX}") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: its header is no JSON object; {_FIX}")
    described.pop("__metadata__", None)
    tensors, ends = {}, []
    for name, entry in described.items():
        shape, dtype, begin, end = _entry(path, name, entry)
        tensors[name] = _mapped(path, shape, dtype, 8 + length + begin)
        ends.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(ends):
        if begin != last:
            raise CheckpointError(
                f"{path}: {name} begins at byte {begin:,} of the data, the one before "
                f"ends at {last:,}; {_FIX}"
            )
        last = end
    if 8 + length + last != size:
        raise CheckpointError(
            f"{path}: has {size:,} bytes, but its header describes "
            f"{8 + length + last:,}; it is incomplete or damaged; {_FIX}"
        )
    return tensors


def write_safetensors(
    path: pathlib.Path, tensors: Mapping[str, LazyLeaf]
) -> Iterator[str]:
    """Write a file, one tensor in memory at a time; yields each name when it is done.

    The file is what the reference implementation would write: the header padded with
    spaces to eight bytes, tensors of the wider dtypes first, then by name.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        described[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(raw_bytes(tensors[name].read()))
            yield name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(
    path: pathlib.Path, name: str, entry: Any
) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """Shape, dtype and place of one tensor, if they agree with each other."""
    try:
        kind, shape, (begin, end) = (
            entry["dtype"],
            entry["shape"],
            entry["data_offsets"],
        )
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        whole = whole and type(kind) is str and len(shape) <= _MOST_AXES
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: the entry of {name!r} is damaged; {_FIX}")
    if kind not in _DTYPES:
        raise CheckpointError(
            f"{path}: {name} is of the type {kind!r}; weights are F32, F16 or BF16 "
            "(quantized checkpoints of this kind cannot be read, take the original)"
        )
    dtype: np.dtype = _DTYPES[kind]
    size = dtype.itemsize
    for length in shape:
        size *= length
    if not size or end - begin != size:
        raise CheckpointError(
            f"{path}: {name} of shape {shape} has {end - begin:,} bytes instead of "
            f"{size:,}; {_FIX}"
        )
    return tuple(shape), dtype, begin, end


def _mapped(
    path: pathlib.Path, shape: tuple[int, ...], dtype: np.dtype, offset: int
) -> LazyLeaf:
    def read() -> np.ndarray:
        return np.asarray(np.memmap(path, dtype, "r", offset, shape))

    return LazyLeaf(shape, dtype, read)
