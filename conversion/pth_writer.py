"""Write a state dict as `torch.save` does, without PyTorch, tensor by tensor.

`torch.save` would need PyTorch and all tensors of a file in memory.
"""

import pathlib
import struct
import zipfile
from collections.abc import Mapping
from types import TracebackType

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, raw_bytes

_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(jnp.bfloat16): "BFloat16Storage",
}
_ZIP64_BYTES = 1 << 31  # entries from here on need 64-bit sizes
_ALIGNMENT = 64  # of every storage within the file, as in PyTorch's files
_EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
# Bytes of a zip entry's local header, and the frame of the extra field that pads it.
_LOCAL_HEADER, _EXTRA = 30, struct.Struct("<HH")
_PADDING_ID, _ZIP64_EXTRA = 0x4246, 20


class PthWriter:
    """A `.pth` file to which tensors are added in the order of `tensors`.

    Args:
      path: the new file.
      tensors: all tensors of the file by name; only shapes and dtypes are used.
    """

    def __init__(self, path: pathlib.Path, tensors: Mapping[str, LazyLeaf]) -> None:
        self._root = path.stem
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._next = 0
        self._write("data.pkl", memoryview(_pickle(tensors)))
        self._write("byteorder", memoryview(b"little"))

    def __enter__(self) -> "PthWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._write("version", memoryview(b"3\n"))
        self._archive.close()

    def add(self, array: np.ndarray) -> None:
        """Write the data of the next tensor."""
        self._write(f"data/{self._next}", raw_bytes(array))
        self._next += 1

    def _write(self, name: str, content: memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        large = len(content) >= _ZIP64_BYTES
        header = _LOCAL_HEADER + len(info.filename) + _EXTRA.size
        header += _ZIP64_EXTRA if large else 0
        assert self._archive.fp is not None
        padding = -(self._archive.fp.tell() + header) % _ALIGNMENT
        info.extra = _EXTRA.pack(_PADDING_ID, padding) + bytes(padding)
        with self._archive.open(info, "w", force_zip64=large) as entry:
            entry.write(content)


def _pickle(tensors: Mapping[str, LazyLeaf]) -> bytes:
    """Return the pickle (protocol 2) of a dict of contiguous tensors."""
    items = (
        _text(name) + _tensor(str(key), tensor)
        for key, (name, tensor) in enumerate(tensors.items())
    )
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _tensor(key: str, tensor: LazyLeaf) -> bytes:
    strides = [tensor.size]
    for length in tensor.shape:
        strides.append(strides[-1] // length)
    storage = (
        _text("storage"), f"ctorch\n{_STORAGES[tensor.dtype]}\n".encode(), _text(key),
        _text("cpu"), _integer(tensor.size),
    )  # fmt: skip
    arguments = (
        _tuple(*storage) + b"Q", _integer(0), _tuple(*map(_integer, tensor.shape)),
        _tuple(*map(_integer, strides[1:])), b"\x89", _EMPTY_ORDERED_DICT,
    )  # fmt: skip
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(*arguments) + b"R"


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
