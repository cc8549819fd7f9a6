"""Write beside, then rename: a new file or folder appears complete, or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator

from llama_jax.errors import CheckpointError

Path = str | os.PathLike[str]


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[pathlib.Path]:
    """A folder beside `path`, which becomes `path` if all goes well, else vanishes.

    What a process that was killed has left there is removed first.

    Raises:
      CheckpointError: there is something at `path`, or it cannot be made.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"{path}: already exists; name a new folder, or remove this one"
        )
    with _beside(path, pathlib.Path.mkdir) as partial:
        yield partial
        if path.exists():
            path.rmdir()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[pathlib.Path]:
    """A file beside `path`, which becomes `path` if all goes well, else vanishes.

    Raises:
      CheckpointError: there is something at `path`, or it cannot be made.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise CheckpointError(
            f"{path}: already exists; name a new file, or remove this one"
        )
    with _beside(path, pathlib.Path.touch) as partial:
        yield partial


@contextlib.contextmanager
def _beside(
    path: pathlib.Path, make: Callable[[pathlib.Path], None]
) -> Iterator[pathlib.Path]:
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left_overs(path)
            make(partial)
        except OSError as error:
            raise CheckpointError(
                f"{partial}: cannot be made ({error.strerror}); choose a place where "
                "you may write"
            ) from error
        with _held(partial):
            yield partial
        partial.rename(path)
    except BaseException:  # Ctrl-C too
        _remove(partial)
        raise


@contextlib.contextmanager
def _held(partial: pathlib.Path) -> Iterator[bool]:
    """A lock that the system takes back when its owner dies; whether it was free."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where left-overs stay
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


def _remove_left_overs(path: pathlib.Path) -> None:
    for partial in path.parent.glob(f"{path.name}.partial-*"):
        with contextlib.suppress(OSError), _held(partial) as free:
            if free:
                _remove(partial)


def _remove(partial: pathlib.Path) -> None:
    """Remove a file, or a folder in which Orbax's threads may be making another one."""
    if not partial.is_dir():
        partial.unlink(missing_ok=True)
        return
    for _ in range(20):
        shutil.rmtree(partial, ignore_errors=True)
        time.sleep(0.05)
        if not partial.exists():
            return
