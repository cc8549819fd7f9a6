"""`.pth` files, read without PyTorch and without executing their pickles."""

import io
import os
import pathlib
import pickle
import random
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.foreign import (
    integer,
    state_dict_pickle,
    tensor,
    text,
    write_legacy_pth,
    write_pth,
)

from llama_jax.conversion.pth_reader import read_pth
from llama_jax.errors import CheckpointError

DTYPES = [np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16)]
ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(5, dtype=np.float16),
}


@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
)
def test_tensors_of_any_shape_and_dtype_are_read(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    dtypes: list[np.dtype],
) -> None:
    path = tmp_path_factory.mktemp("pth") / "x.pth"
    rng = np.random.default_rng(0)
    arrays = {
        f"t{i}": rng.standard_normal(shape).astype(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    write_pth(path, arrays)
    actual = read_pth(path)
    assert list(actual) == list(arrays)
    for name, array in arrays.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()
        assert not actual[name].flags.writeable


def test_a_transposed_view_of_a_larger_storage_is_read(tmp_path: pathlib.Path) -> None:
    data = np.arange(20, dtype=np.float32)
    body = text("w") + tensor("FloatStorage", "0", 20, 2, (2, 3), (1, 4))
    write_pth(tmp_path / "x.pth", {"w": data}, pickled=b"\x80\x02}(" + body + b"u.")
    actual = read_pth(tmp_path / "x.pth")["w"]
    np.testing.assert_array_equal(actual, [[2, 6, 10], [3, 7, 11]])


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, target: pathlib.Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_malicious_pickle_is_refused_by_name_and_not_executed(
    tmp_path: pathlib.Path, protocol: int
) -> None:
    target = tmp_path / "owned"
    bad = pickle.dumps({"w": Malicious(target)}, protocol)
    write_pth(tmp_path / "x.pth", ARRAYS, pickled=bad)
    with pytest.raises(CheckpointError, match=r"(posix|nt)\.mkdir.*not executed"):
        read_pth(tmp_path / "x.pth")
    assert not target.exists()
    pickle.loads(bad)
    assert target.exists()  # the pickle does work


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"cos\nsystem\n(X\x04\x00\x00\x00truetR.", "os.system"),
        (b"(X\x04\x00\x00\x00trueios\nsystem\n.", "INST"),
        (b"(cbuiltins\neval\nX\x01\x00\x00\x001o.", "builtins.eval"),
        (b"ctorch\nDoubleStorage\n.", "torch.DoubleStorage"),
        (b"ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
        (b"}\x81.", "NEWOBJ"),
        (b"\x82\x01.", "EXT1"),
        (b"X\xff\xff\xff\x7fabc.", "damaged"),
        (b"(((((((((", "no STOP|damaged"),
        (b"N.", "not a state dict"),
        (b"}" + text("x") + b"Ns.", "'x' is not a named tensor"),
        (b"}" + integer(1) + b"Ns.", "not a string"),
        (b".", "damaged"),
        (b"0.", "POP"),
        (b"}\x85R.", "damaged"),
        (b"ccollections\nOrderedDict\n(]tR.", "unexpected arguments"),
        (b"}" + text("x") + b"]s.", "'x' is not a named tensor"),
        (b"}" + integer(1) + b"a.", "not a list"),
        (b"NQ.", "damaged"),
        (b"Nb.", "damaged"),
        (b"h\x07.", "damaged"),
    ],
)
def test_a_pickle_that_is_not_a_state_dict_is_refused(
    tmp_path: pathlib.Path, body: bytes, word: str
) -> None:
    write_pth(tmp_path / "x.pth", ARRAYS, pickled=b"\x80\x02" + body)
    with pytest.raises(CheckpointError, match=word):
        read_pth(tmp_path / "x.pth")


def test_a_huge_memo_index_allocates_no_memory(tmp_path: pathlib.Path) -> None:
    # Python's own unpickler would reserve room for two billion entries.
    write_pth(tmp_path / "x.pth", {}, pickled=b"\x80\x02}r\xff\xff\xff\x7f.")
    assert read_pth(tmp_path / "x.pth") == {}


@pytest.mark.parametrize(
    "bad",
    [
        tensor("FloatStorage", "0", 12, 1, (3, 4)),  # extends past the end
        tensor("FloatStorage", "0", 12, 0, (3, 4), (5, 1)),
        tensor("FloatStorage", "0", 12, 0, (3, 4), (0, 1)),  # uses numbers twice
        tensor("FloatStorage", "0", 12, 0, (1 << 40, 1 << 40), (0, 0)),
        tensor("FloatStorage", "0", 12, 0, (3, 4), (4,)),
        tensor("FloatStorage", "0", 12, 0, (3, -4)),
        tensor("FloatStorage", "0", 12, -1, (3, 4)),
        tensor("FloatStorage", "0", 12, 0, (0, 4)),
        tensor("FloatStorage", "0", 13, 0, (3, 4)),  # the storage is shorter
        tensor("HalfStorage", "0", 12, 0, (3, 4)),  # the storage is longer
        tensor("FloatStorage", "9", 12, 0, (3, 4)),  # there is none
        tensor("FloatStorage", "../data.pkl", 12, 0, (3, 4)),
        tensor("FloatStorage", "0", 12, 0, (1,) * 65),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(
    tmp_path: pathlib.Path, bad: bytes
) -> None:
    body = b"\x80\x02}" + text("a.weight") + bad + b"s."
    write_pth(tmp_path / "x.pth", {"a.weight": ARRAYS["a.weight"]}, pickled=body)
    with pytest.raises(CheckpointError):
        read_pth(tmp_path / "x.pth")


def test_a_name_that_occurs_twice_is_refused(tmp_path: pathlib.Path) -> None:
    one = text("a") + tensor("FloatStorage", "0", 12, 0, (3, 4))
    body = b"\x80\x02}(" + one + one + b"u."
    write_pth(tmp_path / "x.pth", {"a": ARRAYS["a.weight"]}, pickled=body)
    with pytest.raises(CheckpointError, match="twice"):
        read_pth(tmp_path / "x.pth")


def test_parameters_and_module_metadata_are_understood(tmp_path: pathlib.Path) -> None:
    rebuilt = tensor("FloatStorage", "0", 12, 0, (3, 4))
    ordered = b"ccollections\nOrderedDict\n)R"
    parameter = (
        b"ctorch._utils\n_rebuild_parameter\n(" + rebuilt + b"\x88" + ordered + b"tR"
    )
    metadata = b"}" + text("_metadata") + ordered + b"sb"
    body = b"\x80\x02" + ordered + b"(" + text("a") + parameter + b"u" + metadata + b"."
    write_pth(tmp_path / "x.pth", {"a": ARRAYS["a.weight"]}, pickled=body)
    actual = read_pth(tmp_path / "x.pth")
    np.testing.assert_array_equal(actual["a"], ARRAYS["a.weight"])


def test_a_compressed_archive_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pth"
    write_pth(path, ARRAYS, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_pth(path)


@pytest.mark.parametrize("write", [write_pth, write_legacy_pth])
def test_every_truncated_file_is_refused(tmp_path: pathlib.Path, write: Any) -> None:
    path = tmp_path / "x.pth"
    write(path, ARRAYS)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="download"):
            read_pth(path)


def test_big_endian_weights_are_refused(tmp_path: pathlib.Path) -> None:
    write_pth(tmp_path / "x.pth", ARRAYS, entries={"byteorder": b"big"})
    with pytest.raises(CheckpointError, match="big-endian"):
        read_pth(tmp_path / "x.pth")


def test_other_archives_are_refused(
    tmp_path: pathlib.Path,
) -> None:
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match=r"torch\.save"):
        read_pth(tmp_path / "zip.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        read_pth(tmp_path / "none.pth")


def test_entries_that_overlap_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pth"
    pair = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    write_pth(path, pair)
    data = bytearray(path.read_bytes())
    # Point the directory's entry of data/1 to the local header of data/0.
    first, second = (data.find(b"archive/data/" + key) for key in (b"0", b"1"))
    directory = data.rfind(b"archive/data/1") - 46
    assert data[directory : directory + 4] == b"PK\x01\x02"
    data[second - 1 : second - 1] = b""
    struct.pack_into("<I", data, directory + 42, first - 30)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not where the zip directory says"):
        read_pth(path)
    # With the same name in both headers, so that only the ranges differ.
    data[directory + 46 : directory + 60] = b"archive/data/0"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"twice|overlaps"):
        read_pth(path)


@pytest.mark.parametrize("write", [write_pth, write_legacy_pth])
def test_damaged_files_raise_only_checkpoint_errors(
    tmp_path: pathlib.Path, write: Any
) -> None:
    path = tmp_path / "x.pth"
    write(path, ARRAYS)
    whole = path.read_bytes()
    pickled = whole.find(b"\x80\x02}(")
    # The directory of an archive, or the last pickle and the numbers.
    directory = max(whole.find(b"PK\x01\x02"), whole.find(b"\x80\x02]"))
    rng = random.Random(0)
    messages = []
    regions = [(0, len(whole)), (directory, len(whole)), (pickled, pickled + 300)]
    for number in range(450):
        data = bytearray(whole)
        start, end = regions[number % 3]
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(start, end)] = rng.choice(
                (0, 1, 255, rng.randrange(256))
            )
        if rng.random() < 0.1:
            del data[rng.randrange(start, end) :]
        path.write_bytes(data)
        try:
            for array in read_pth(path).values():
                array.tobytes()
        except CheckpointError as error:
            messages.append(str(error))
    assert 100 < len(messages) < 450
    assert not any("\n" in message for message in messages)


def legacy(**changes: bytes) -> bytes:
    """Return a legacy file of one tensor, with some of its parts replaced."""
    data = np.arange(12, dtype=np.float32)
    one = tensor("FloatStorage", "0", 12, 0, (3, 4), legacy=True)
    parts = {
        "magic": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        "version": pickle.dumps(1001, 2),
        "machine": pickle.dumps({"little_endian": True}, 2),
        "content": b"\x80\x02}" + text("w") + one + b"s.",
        "keys": pickle.dumps(["0"], 2),
        "count": struct.pack("<q", 12),
        "data": data.tobytes(),
    }
    return b"".join((parts | changes).values())


def test_a_legacy_file_is_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(legacy())
    expected = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(read_pth(path)["w"], expected)
    many = ARRAYS | {str(n): np.full((2, 3), n, np.float16) for n in range(300)}
    write_legacy_pth(path, many)
    actual = read_pth(path)
    assert list(actual) == list(many)
    for name, array in many.items():
        assert actual[name].tobytes() == array.tobytes()
        assert not actual[name].flags.writeable


TENSOR = tensor("FloatStorage", "0", 12, 0, (3, 4), legacy=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"magic": pickle.dumps(5, 2)}, r"torch\.save did not write"),
        ({"version": pickle.dumps(1000, 2)}, r"torch\.save did not write"),
        ({"machine": pickle.dumps({"little_endian": False}, 2)}, "little-endian"),
        ({"machine": pickle.dumps(None, 2)}, "little-endian"),
        ({"content": pickle.dumps([], 2), "keys": pickle.dumps([], 2)}, "last storage"),
        ({"content": b"\x80\x02}."}, "not those of its tensors"),
        ({"content": b"\x80\x02cos\nsystem\n."}, r"os\.system.*not executed"),
        ({"keys": pickle.dumps(["1"], 2)}, "not those of its tensors"),
        ({"keys": pickle.dumps(["0", "0"], 2)}, "not those of its tensors"),
        ({"keys": pickle.dumps([["0"]], 2)}, "not those of its tensors"),
        ({"keys": pickle.dumps(None, 2)}, "not those of its tensors"),
        ({"keys": b"\x80\x02cos\nsystem\n."}, r"os\.system.*not executed"),
        ({"count": struct.pack("<q", 11)}, "'0' should have 12 numbers"),
        ({"count": struct.pack("<q", -1)}, "'0' should have 12 numbers"),
        ({"data": bytes(44)}, "'0' should have 12 numbers"),
        ({"data": bytes(52)}, "4 bytes after its last storage"),
        (
            {"content": b"}" + text("w") + TENSOR.replace(b"Nt", b"]t") + b"s."},
            "damaged.*a view of another",
        ),
        (
            {
                "content": b"\x80\x02}(" + text("w") + TENSOR + text("v")
                + tensor("HalfStorage", "0", 12, 0, (3, 4), legacy=True) + b"u."
            },
            "damaged.*two descriptions",
        ),
    ],
)  # fmt: skip
def test_a_legacy_file_that_contradicts_itself_is_refused(
    tmp_path: pathlib.Path, changes: dict[str, bytes], words: str
) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(legacy(**changes))
    with pytest.raises(CheckpointError, match=words):
        read_pth(path)


def test_a_malicious_legacy_file_is_not_executed(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "owned"
    bad = pickle.dumps({"w": Malicious(target)}, 2)
    for part in ("magic", "version", "machine", "content", "keys"):
        (tmp_path / "x.bin").write_bytes(legacy(**{part: bad}))
        with pytest.raises(CheckpointError, match=r"(posix|nt)\.mkdir.*not executed"):
            read_pth(tmp_path / "x.bin")
    assert not target.exists()


class StandIn:
    """What the unpickler below constructs instead of torch's classes and functions."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class StandInUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return name if name.endswith("Storage") else StandIn

    def persistent_load(self, id: Any) -> Any:
        return id


def test_the_pickles_of_these_tests_load_in_python_too() -> None:
    actual = StandInUnpickler(io.BytesIO(state_dict_pickle(ARRAYS))).load()
    storage, offset, shape, strides = actual["a.weight"].arguments[:4]
    assert storage == ("storage", "FloatStorage", "0", "cpu", 12)
    assert (offset, shape, strides) == (0, (3, 4), (4, 1))


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_what_pytorch_saves_is_read(tmp_path: pathlib.Path, zipped: bool) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    linear = torch.nn.Linear(5, 3)
    shared = torch.arange(20.0).reshape(4, 5)
    tensors = {
        "half": shared.half(),
        "bfloat16": shared.bfloat16(),
        "whole": shared,
        "transposed part": shared[1:3].T,
        **linear.state_dict(),
        "parameter": linear.weight,
    }
    file = tmp_path / "x.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    actual = read_pth(file)
    assert actual.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert actual[name].dtype.name == str(expected.dtype).removeprefix("torch.")
        numbers = expected.detach().float().numpy()
        np.testing.assert_array_equal(actual[name].astype(np.float32), numbers)
    torch.save(linear, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"torch\.nn.*not executed"):
        read_pth(file)
