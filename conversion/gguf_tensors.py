"""The tensors of GGUF files: read lazily, dequantized by `gguf`, and encoded."""

import math
import pathlib
from collections.abc import Iterator
from typing import Literal

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.finite import check_cast
from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.conversion.gguf_header import Header, TensorInfo, TensorLayout, damaged
from llama_jax.conversion.lazy_arrays import mapped_leaf
from llama_jax.errors import CheckpointError

GGUFDtype = Literal["float32", "float16", "bfloat16", "q8_0"]
"""In what the matrices of a file are written."""

_Q8_0, _Q8_BLOCK, _Q8_BYTES = 8, 32, 34  # type, numbers and bytes of a block
_NUMBERS: dict[GGUFDtype, int] = {
    "float32": 0,
    "float16": 1,
    "bfloat16": 30,
    "q8_0": _Q8_0,
}
"""Numbers of ggml's tensor types."""
_DTYPES: dict[int, np.dtype] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    30: np.dtype(jnp.bfloat16),
}
_CHUNK = 1 << 16  # numbers that are quantized or cast at a time, about
# Temporary memory of gguf for one chunk: 1.4 MiB at most over all types.
_CHUNK_BYTES = 2 << 20


def lazy_tensors(header: Header) -> dict[str, LazyLeaf]:
    """Return the tensors of a file; quantized ones become float32 when read.

    Raises:
      CheckpointError: a tensor is of an unknown type, overlaps another one, or ends
        after the end of the file.
    """
    leaves, spans = {}, []
    for name, tensor in header.tensors.items():
        leaves[name], nbytes = _leaf(header.path, name, tensor)
        spans.append((tensor.offset, tensor.offset + nbytes, name))
    last, previous = 0, ""
    for start, end, name in sorted(spans):
        if start < last:
            raise damaged(header.path, f"{name} begins within {previous}")
        last, previous = end, name
    if last > header.size:
        raise CheckpointError(
            f"{header.path}: has {header.size:,} bytes, but {previous} ends at "
            f"{last:,}; it is incomplete or damaged, download it again"
        )
    return leaves


def _leaf(path: pathlib.Path, name: str, tensor: TensorInfo) -> tuple[LazyLeaf, int]:
    """Return a tensor and its bytes in the file."""
    shape, offset, size = tensor.shape, tensor.offset, math.prod(tensor.shape)
    if (dtype := _DTYPES.get(tensor.kind)) is not None:
        return mapped_leaf(path, dtype, shape, offset), size * dtype.itemsize
    block, block_bytes = _quantized_block(path, name, tensor.kind)
    if shape[-1] % block:
        raise damaged(
            path,
            f"rows of {name} have {shape[-1]:,} numbers, but its type has blocks of "
            f"{block}",
        )
    nbytes = size // block * block_bytes

    def dequantize() -> np.ndarray:
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType(tensor.kind)
        raw = np.memmap(path, np.uint8, "r", offset, (nbytes,))
        result = np.empty(size, np.float32)
        step = _CHUNK // block
        for start in range(0, nbytes // block_bytes, step):
            blocks = raw[start * block_bytes : (start + step) * block_bytes]
            with np.errstate(all="ignore"):  # a scale may be anything
                numbers = quants.dequantize(np.asarray(blocks)[None], kind)
            result[start * block : (start + step) * block] = numbers[0]
        return result.reshape(shape)

    leaf = LazyLeaf(shape, np.dtype(np.float32), dequantize)
    return leaf.with_host_bytes(leaf.nbytes + _CHUNK_BYTES), nbytes


def _quantized_block(path: pathlib.Path, name: str, number: int) -> tuple[int, int]:
    """Return numbers and bytes of a block of a quantized type."""
    require_gguf(path, "is quantized")
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    try:
        kind = GGMLQuantizationType(number)
        block, nbytes = GGML_QUANT_SIZES[kind]
        with np.errstate(all="ignore"):
            quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {name} is of the type {number}, which the installed gguf does "
            "not know; run `pip install --upgrade gguf`, or use another file"
        ) from error
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: {name} is of the type {kind.name}, which gguf cannot dequantize; "
            "use a file with another quantization"
        ) from error
    return block, nbytes


def require_gguf(path: pathlib.Path, reason: str) -> None:
    """Raise a `CheckpointError` if the package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{path}: {reason}, which needs the package gguf; install it with "
            'pip install "llama-jax[gguf]"'
        ) from error


def tensor_layout(shape: tuple[int, ...], dtype: GGUFDtype) -> TensorLayout:
    """Return how a tensor is stored in a file whose matrices are of `dtype`.

    Norms are always float32. Matrices with rows that are not multiples of a block are
    float16 instead of q8_0.
    """
    if len(shape) == 1:
        dtype = "float32"
    elif dtype == "q8_0" and shape[-1] % _Q8_BLOCK:
        dtype = "float16"
    size, kind = math.prod(shape), _NUMBERS[dtype]
    if kind == _Q8_0:
        return TensorLayout(shape, kind, size // _Q8_BLOCK * _Q8_BYTES)
    return TensorLayout(shape, kind, size * _DTYPES[kind].itemsize)


def encoded_chunks(array: np.ndarray, kind: int, name: str) -> Iterator[np.ndarray]:
    """Yield a tensor in a type of the file, some rows at a time.

    Args:
      array: the tensor.
      kind: number of the type.
      name: of the tensor, for messages.

    Raises:
      CheckpointError: a number or a scale does not fit into float16.
    """
    rows = array.reshape(-1, array.shape[-1])
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield _encode(rows[start : start + step], kind, name)


def _encode(rows: np.ndarray, kind: int, name: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        if kind == _Q8_0:
            from gguf import GGMLQuantizationType, quants

            numbers = np.ascontiguousarray(rows, np.float32)
            encoded: np.ndarray = quants.quantize(numbers, GGMLQuantizationType.Q8_0)
            scales = encoded.reshape(-1, _Q8_BYTES)[:, :2].copy().view("<f2")
            check_cast(scales, "the model", name)
        else:
            encoded = np.ascontiguousarray(rows, _DTYPES[kind])
            if encoded.dtype not in (rows.dtype, np.float32):
                check_cast(encoded, "the model", name)
    return encoded
