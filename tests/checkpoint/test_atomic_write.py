"""Files and folders that appear complete or not at all."""

import pathlib
from typing import Any

import pytest

from llama_jax.checkpoint.atomic_write import new_file, new_folder, write_file
from llama_jax.errors import CheckpointError


def test_a_file_is_written_and_replaced(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    write_file(file, "größe\n")
    assert file.read_bytes() == "größe\n".encode()
    write_file(file, b"\x00\n")
    assert file.read_bytes() == b"\x00\n"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("create", [new_folder, new_file])
def test_an_error_leaves_nothing(tmp_path: pathlib.Path, create: Any) -> None:
    with pytest.raises(KeyboardInterrupt), create(tmp_path / "new"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("create", [new_folder, new_file])
def test_parent_folders_are_created(tmp_path: pathlib.Path, create: Any) -> None:
    with create(tmp_path / "a" / "b" / "new"):
        pass
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["new"]


@pytest.mark.parametrize("create", [new_folder, new_file])
def test_what_exists_is_not_replaced(tmp_path: pathlib.Path, create: Any) -> None:
    (tmp_path / "old").write_text("old")
    with (
        pytest.raises(CheckpointError, match="already exists"),
        create(tmp_path / "old"),
    ):
        pass
    assert (tmp_path / "old").read_text() == "old"


def test_what_cannot_be_written_is_reported_by_its_path(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/inner: cannot be written"):
        write_file(tmp_path / "file" / "inner", "")
    with pytest.raises(CheckpointError, match="none/file: cannot be written"):
        write_file(tmp_path / "none" / "file", "")
    for create in (new_folder, new_file):
        with (
            pytest.raises(CheckpointError, match="file/inner: cannot be written"),
            create(tmp_path / "file" / "inner"),
        ):
            pass
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="folder: cannot be written"):
        write_file(tmp_path / "folder", "")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize("name", ["plain", "with [brackets]*"])
def test_abandoned_temporary_files_are_removed(
    tmp_path: pathlib.Path, name: str
) -> None:
    (tmp_path / f"{name}.partial-0000").touch()
    (tmp_path / f"{name}.partial-1111").mkdir()
    write_file(tmp_path / name, "")
    assert [path.name for path in tmp_path.iterdir()] == [name]
