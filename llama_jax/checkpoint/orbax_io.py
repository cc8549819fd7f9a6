"""Orbax trees of weights: read lazily, written one leaf at a time.

On disk a leaf is an uncompressed Zarr array of one chunk: a folder with a `.zarray`
description and one raw file, which is what Orbax writes with `use_ocdbt=False` and
`use_compression=False`. Reading maps the raw files and does not import Orbax.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from llama_jax.checkpoint.lazy_leaf import DTYPES, LazyLeaf, Progress, lazy_leaf
from llama_jax.errors import CheckpointError, LlamaJaxError
from llama_jax.file_kinds import check_file
from llama_jax.params import flatten, unflatten

_MAX_SIZE = 1 << 40  # no axis is longer
_DTYPES = dict(zip(("<f4", "<f2", "bfloat16"), DTYPES, strict=True))


@runtime_checkable
class _Write(Protocol):
    """The future of an unfinished write."""

    def result(self) -> object:
        """Wait for it."""


def open_leaves(folder: pathlib.Path) -> dict[str, LazyLeaf]:
    """Open the leaves of an Orbax tree; raw files are mapped when they are read.

    A tree written with other options (compressed, OCDBT, several chunks) is restored
    whole by Orbax instead.

    Raises:
      CheckpointError: there is no Orbax tree, or a file of it is damaged.
    """
    if not (folder / "_METADATA").is_file():
        raise CheckpointError(
            f"{folder}: not an Orbax checkpoint, since it has no _METADATA; copy or "
            "convert the model again"
        )
    leaves = {
        description.parent.name.replace(".", "/"): _map_leaf(description)
        for description in folder.glob("*/.zarray")
    }
    if leaves and None not in leaves.values():
        return leaves  # type: ignore[return-value]
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                folder.absolute(), args=ocp.args.PyTreeRestore()
            )
        return {path: lazy_leaf(leaf) for path, leaf in flatten(restored).items()}
    except Exception as error:  # Orbax and TensorStore raise many types
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder}: Orbax cannot restore it ({reason}); copy or convert the model "
            "again"
        ) from error


def write_leaves(
    folder: pathlib.Path,
    leaves: Mapping[str, LazyLeaf],
    progress: Progress | None = None,
) -> None:
    """Write an Orbax tree, one raw file per leaf.

    A leaf is read while the previous one is written, so two are in memory at a time.

    Args:
      folder: must not exist.
      leaves: by path.
      progress: called after each leaf.

    Raises:
      CheckpointError: the tree cannot be written.
    """
    import orbax.checkpoint as ocp
    import tensorstore

    total = sum(leaf.nbytes for leaf in leaves.values())
    # One fsync at the end instead of one after every leaf.
    unsynced = tensorstore.Context({"file_io_sync": False})
    pending: list[_Write] = []

    class LazyHandler(ocp.type_handlers.NumpyHandler):
        """Orbax's handler of NumPy arrays, which reads each before writing it."""

        async def serialize(
            self, values: Sequence[LazyLeaf], infos: Any, args: Any = None
        ) -> list[_Write]:
            done = 0
            try:
                for value, info, arg in zip(values, infos, args, strict=True):
                    array = (await asyncio.to_thread(value.read)).view(_Uncopied)
                    info.ts_context = unsynced
                    pending.extend(await super().serialize([array], [info], [arg]))
                    await _finish(pending, leave=1)
                    done += value.nbytes
                    if progress is not None:
                        progress("writing", done, total)
                await _finish(pending)
            finally:  # before Orbax removes the folder
                _drain(pending)
            return []

    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyLeaf, LazyHandler()),
    )
    tree = ocp.args.PyTreeSave(unflatten(leaves))
    try:
        with _quiet_orbax():
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=False, use_compression=False, type_handler_registry=registry
            )
            # Only the main process writes (`gather_to_main`), without Orbax's barriers.
            alone = ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(),
                active_processes=(
                    {jax.process_index()} if jax.process_count() > 1 else None
                ),
            )
            with ocp.Checkpointer(
                handler, multiprocessing_options=alone
            ) as checkpointer:
                checkpointer.save(folder.absolute(), args=tree)
        _sync(folder)
    except LlamaJaxError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder}: cannot be written ({reason}); is the disk full?"
        ) from error
    finally:  # in case the handler's own cleanup was cut short (notebook event loops)
        _drain(pending)


def _sync(folder: pathlib.Path) -> None:
    """Flush every file of a folder to disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Suppress Orbax's warnings about not using OCDBT, which is on purpose."""
    expected = ("ArrayMetadata persistence is disabled", "Skipping merge of OCDBT")

    def is_unexpected(record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in expected)

    logger = logging.getLogger("absl")
    logger.addFilter(is_unexpected)
    try:
        yield
    finally:
        logger.removeFilter(is_unexpected)


class _Uncopied(np.ndarray):
    """An array that Orbax writes without copying it first: nothing changes it."""

    def __deepcopy__(self, memo: object) -> "_Uncopied":
        return self


async def _finish(pending: list[_Write], leave: int = 0) -> None:
    """Wait until at most `leave` writes are unfinished."""
    while len(pending) > leave:
        await asyncio.to_thread(pending[0].result)
        del pending[0]


def _drain(pending: list[_Write]) -> None:
    """Wait for all writes and ignore their errors, after a failure."""
    while pending:
        with contextlib.suppress(Exception):
            pending.pop().result()


def _map_leaf(description: pathlib.Path) -> LazyLeaf | None:
    """A Zarr array of one raw chunk as a leaf; None if it is stored in another way."""
    check_file(description, "JSON")
    try:
        fields = json.loads(description.read_text("utf-8"))
        shape = tuple(fields["shape"])
        raw = (
            fields["zarr_format"] == 2
            and fields["chunks"] == fields["shape"]
            and fields["compressor"] is None
            and not fields["filters"]
            and fields["order"] == "C"
            and fields["dtype"] in _DTYPES
            and all(type(size) is int and 0 < size < _MAX_SIZE for size in shape)
            and 0 < len(shape) <= 3
        )
        separator = {".": ".", "/": "/"}[fields.get("dimension_separator", ".")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{description}: not the description of a Zarr array; copy or convert the "
            "model again"
        ) from error
    if not raw:
        return None
    dtype = _DTYPES[fields["dtype"]]
    chunk = description.parent / separator.join("0" for _ in shape)
    expected = math.prod(shape) * dtype.itemsize
    size = chunk.stat().st_size if chunk.is_file() else 0
    if size != expected:
        check_file(chunk, "Orbax")
        raise CheckpointError(
            f"{chunk}: has {size:,} bytes instead of {expected:,}; copy or convert the "
            "model again"
        )

    def read() -> np.ndarray:
        # Copy on write, so that writing to the array cannot change the file.
        return np.asarray(np.memmap(chunk, dtype, "c", shape=shape))

    return LazyLeaf(shape, dtype, read)
