"""safetensors files: round trips, and damaged files."""

import json
import pathlib
import random
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llama_jax.checkpoint.lazy_leaf import lazy_leaves
from llama_jax.conversion.safetensors import read_safetensors, write_safetensors
from llama_jax.errors import CheckpointError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4, dtype=np.float16),
    "c": np.arange(8).astype(ml_dtypes.bfloat16).reshape(2, 2, 2),
}


def write(path: pathlib.Path, header: Any, data: bytes = b"", pad: int = 0) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) + pad) + content + data)


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_written_files_are_read_back(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "x.safetensors"
    written: list[str] = []
    write_safetensors(file, lazy_leaves(ARRAYS), written.append)
    assert written == ["a", "b.weight", "c"]
    actual = read_safetensors(file)
    assert actual.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert actual[name].dtype == array.dtype
        assert actual[name].shape == array.shape
        assert actual[name].read().tobytes() == array.tobytes()


def test_the_reference_implementation_reads_and_writes_the_same_file(
    tmp_path: pathlib.Path,
) -> None:
    numpy = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    arrays = {name: array for name, array in ARRAYS.items() if name != "c"}
    write_safetensors(tmp_path / "x", lazy_leaves(arrays))
    actual = numpy.load_file(tmp_path / "x")
    assert actual.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(actual[name], array)
    numpy.save_file(arrays, tmp_path / "y", metadata={"format": "pt"})
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry([2], 0, 8)}, b"1234567", "describes"),
        ({"a": entry([2], 0, 8)}, b"123456789", "describes"),
        ({"a": entry([2], 0, 4)}, b"1234", "instead of"),
        ({"a": entry([3], 0, 8)}, b"12345678", "instead of"),
        ({"a": entry([0], 0, 0)}, b"", "has no numbers, as DeepSpeed ZeRO-3"),
        ({"a": entry([HUGE, HUGE], 0, 8)}, b"12345678", "instead of"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234", "begins at"),
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456", "begins at"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"1" * 12, "begins at"),
        ({"a": entry([1], 4, 8)}, b"12345678", "begins at"),
        ({"a": entry([1], HUGE, HUGE + 4)}, b"1234", "begins at"),
        ({"a": entry([-1], 0, 4)}, b"1234", "damaged"),
        ({"a": entry([1.0], 0, 4)}, b"1234", "damaged"),
        ({"a": entry("1", 0, 4)}, b"1234", "damaged"),
        ({"a": entry([1] * 99, 0, 4)}, b"1234", "damaged"),
        ({"a": entry([1], 0, 4, ["F32"])}, b"1234", "damaged"),
        ({"a": entry([1], 0, 4, "I8")}, b"1234", "I8"),
        ({"a": {"dtype": "F32"}}, b"", "damaged"),
        ({"a": 3}, b"", "damaged"),
        ([1], b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "header is damaged"),
        (b"{", b"", "header is damaged"),
        (b"\xff", b"", "header is damaged"),
        (b"[" * 100_000, b"", "damaged"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "damaged"),
    ],
)
def test_inconsistent_headers_are_refused(
    tmp_path: pathlib.Path, header: Any, data: bytes, message: str
) -> None:
    write(tmp_path / "x", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors(tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pad", [1, 10**9, 1 << 62])
def test_a_header_longer_than_the_file_is_not_read(
    tmp_path: pathlib.Path, pad: int
) -> None:
    write(tmp_path / "x", {}, pad=pad)
    with pytest.raises(CheckpointError, match="header would have"):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("size", [0, 3, 7])
def test_a_file_too_short_for_a_header_is_refused(
    tmp_path: pathlib.Path, size: int
) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(CheckpointError):
        read_safetensors(tmp_path / "x")


def test_mutated_files_are_refused_or_read(tmp_path: pathlib.Path) -> None:
    rng, file = random.Random(0), tmp_path / "x"
    write_safetensors(file, lazy_leaves(ARRAYS))
    good = file.read_bytes()
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        file.write_bytes(data)
        try:
            read = [tensor.read() for tensor in read_safetensors(file).values()]
            assert sum(array.nbytes for array in read) <= len(data)
        except CheckpointError as error:
            refused += "\n" not in str(error)
    assert 100 < refused < 200
