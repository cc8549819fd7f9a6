"""Write under a temporary name, then rename: a file or folder is complete or absent."""

import contextlib
import glob
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator

from llama_jax.errors import CheckpointError
from llama_jax.types import Path


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[pathlib.Path]:
    """Yield a temporary folder that is renamed to `path` on success, else removed.

    What a killed process left under a temporary name is removed first.

    Args:
      path: must not exist, or be an empty folder.

    Raises:
      CheckpointError: `path` exists, or its parent is not writable.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path}: already exists; name a new folder, or remove this one"
        )
    with _temporary(path, lambda partial: partial.mkdir(parents=True)) as partial:
        yield partial
        if path.exists():
            path.rmdir()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[pathlib.Path]:
    """Yield a temporary file that is renamed to `path` on success, else removed.

    Args:
      path: must not exist; its parent folders are created.

    Raises:
      CheckpointError: `path` exists, or its parent is not writable.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise CheckpointError(
            f"{path}: already exists; name a new file, or remove this one"
        )
    with _reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path, pathlib.Path.touch) as partial:
        yield partial


def write_file(path: Path, contents: str | bytes) -> None:
    """Write a file, or replace it; `path` has the old contents or all of the new.

    Args:
      path: in an existing folder.
      contents: bytes, or text to be encoded in UTF-8.

    Raises:
      CheckpointError: the file cannot be written.
    """
    path = pathlib.Path(path).absolute()
    data = contents.encode() if isinstance(contents, str) else contents
    with (
        _temporary(path, pathlib.Path.touch) as partial,
        _reporting(path),
        partial.open("wb") as file,
    ):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _temporary(
    path: pathlib.Path, create: Callable[[pathlib.Path], None]
) -> Iterator[pathlib.Path]:
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with _reporting(path):
            _remove_abandoned(path)
            create(partial)
        with _lock(partial):
            yield partial
        with _reporting(path):
            partial.replace(path)
    except BaseException:  # Ctrl-C too
        _remove(partial)
        raise


@contextlib.contextmanager
def _reporting(path: pathlib.Path) -> Iterator[None]:
    """Raise a `CheckpointError` that names the path for an `OSError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); choose an existing folder "
            "with write permission and free space"
        ) from error


@contextlib.contextmanager
def _lock(partial: pathlib.Path) -> Iterator[bool]:
    """Take a lock that the system releases with its process; yield whether it did."""
    try:
        import fcntl
    except ImportError:  # Windows, where abandoned files stay
        yield False
        return
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _remove_abandoned(path: pathlib.Path) -> None:
    """Remove temporary files and folders of `path` that no living process locks."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.partial-*"):
        with contextlib.suppress(OSError), _lock(partial) as locked:
            if locked:
                _remove(partial)


def _remove(partial: pathlib.Path) -> None:
    """Remove a file, or a folder to which Orbax's threads may still be adding files."""
    if not partial.is_dir():
        with contextlib.suppress(OSError):
            partial.unlink()
        return
    for _ in range(20):
        shutil.rmtree(partial, ignore_errors=True)
        time.sleep(0.05)
        if not partial.exists():
            return
