"""Weights one at a time: read when wanted, written as an Orbax tree.

On disk a leaf is an uncompressed Zarr array of a single chunk: a folder with a
`.zarray` description and one raw file. Orbax writes them so on request, and they are
read here with `mmap`, without importing it.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.distributed import place, to_host
from llama_jax.errors import CheckpointError, LlamaJaxError
from llama_jax.params import (
    LAYERS,
    axes_of,
    flatten,
    leaf_paths,
    unflatten,
    weight_shape,
)
from llama_jax.types import Params

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes that are done, and all of them."""

_MOST = 1 << 40  # no axis is longer
_DTYPES: dict[str, np.dtype] = {
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """A weight that is read only when it is wanted, and not kept.

    Attributes:
      shape: of the array.
      dtype: of its numbers.
      read: makes the array.
      host_bytes: what `read` takes of the host's memory at most, the array included;
        0 where it is a view of a mapped file, whose pages the system takes back.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    host_bytes: int = 0

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.size * self.dtype.itemsize

    def taking(self, host_bytes: int) -> "LazyLeaf":
        """The same, with another `host_bytes`."""
        return dataclasses.replace(self, host_bytes=host_bytes)

    def cast(self, dtype: np.dtype) -> "LazyLeaf":
        """The same numbers, rounded to another dtype as they are read."""
        if dtype == self.dtype:
            return self
        return dataclasses.replace(
            self,
            dtype=dtype,
            read=lambda: self.read().astype(dtype),
            host_bytes=self.host_bytes + self.size * dtype.itemsize,
        )


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array, to be written: its own memory where that is in order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def lazy_leaves(params: Params) -> dict[str, LazyLeaf]:
    """The leaves of a tree (nested or flat, either layout) one per layer and weight."""
    leaves: dict[str, LazyLeaf] = {}
    for path, leaf in flatten(params).items():
        weight = path.removeprefix(LAYERS)
        if weight == path or weight.partition("/")[0].isdigit():
            leaves[path] = _lazy(leaf)
            continue
        for layer in range(leaf.shape[0]):
            leaves[f"{LAYERS}{layer}/{weight}"] = _lazy(leaf, layer)
    return leaves


def check_leaves(
    leaves: Mapping[str, LazyLeaf], config: LlamaConfig, *, where: Any
) -> None:
    """Refuse what is not exactly the weights of this configuration.

    Raises:
      CheckpointError: a leaf is missing, unknown, or of another shape or dtype.
    """
    if config.num_layers > len(leaves):
        raise CheckpointError(
            f"{where}: the configuration has {config.num_layers} layers, but there are "
            f"only {len(leaves)} weights; the two do not belong together"
        )
    wanted = set(leaf_paths(config))
    for what, paths in (
        ("lacks", wanted - leaves.keys()),
        ("also holds", leaves.keys() - wanted),
    ):
        if paths:
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            raise CheckpointError(
                f"{where}: {what} {min(paths)}{more}; the weights and the "
                "configuration do not belong together"
            )
    for path, leaf in leaves.items():
        shape = weight_shape(config, axes_of(path))
        if leaf.shape != shape:
            raise CheckpointError(
                f"{where}: {path} has the shape {list(leaf.shape)}, but the "
                f"configuration makes it {list(shape)}; the two do not belong together"
            )
        if leaf.dtype not in _DTYPES.values():
            raise CheckpointError(
                f"{where}: {path} is {leaf.dtype}; weights are float32, bfloat16 or "
                "float16"
            )


def open_leaves(folder: pathlib.Path) -> dict[str, LazyLeaf]:
    """The leaves of an Orbax tree, mapped where they are raw files.

    A tree that was written with other options (compressed, OCDBT, in several chunks)
    is restored whole by stock Orbax instead.

    Raises:
      CheckpointError: there is none, or a file of it is damaged.
    """
    if not (folder / "_METADATA").is_file():
        raise CheckpointError(
            f"{folder}: no Orbax checkpoint (it has no _METADATA); copy or convert the "
            "model again"
        )
    found = {path.parent: path for path in folder.glob("*/.zarray")}
    leaves = {
        leaf.name.replace(".", "/"): _map_leaf(leaf, description)
        for leaf, description in found.items()
    }
    if leaves and None not in leaves.values():
        return leaves  # type: ignore[return-value]
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                folder.absolute(), args=ocp.args.PyTreeRestore()
            )
        return {path: _lazy(leaf) for path, leaf in flatten(restored).items()}
    except Exception as error:  # Orbax and TensorStore raise whatever they like
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
    """Write an Orbax tree, one raw file per leaf; two leaves are in memory at a time.

    The next leaf is read while the last one is written.
    """
    import orbax.checkpoint as ocp
    import tensorstore

    total = sum(leaf.nbytes for leaf in leaves.values())
    # The disk is waited for once, at the end, and not after every leaf.
    unsynced = tensorstore.Context({"file_io_sync": False})
    pending: list[Any] = []  # the write that is under way

    class LazyHandler(ocp.type_handlers.NumpyHandler):
        """Orbax's own handler of NumPy arrays, given them one by one."""

        async def serialize(
            self, values: Any, infos: Any, args: Any = None
        ) -> list[Any]:
            done = 0
            try:
                for value, info, arg in zip(values, infos, args, strict=True):
                    array = (await asyncio.to_thread(value.read)).view(_Uncopied)
                    info.ts_context = unsynced
                    pending.extend(await super().serialize([array], [info], [arg]))
                    await _finish(pending, but=1)
                    done += value.nbytes
                    if progress is not None:
                        progress("writing", done, total)
                await _finish(pending)
            finally:  # before Orbax removes the folder that is written to
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
            # Of several processes one writes (`gathering`), and waits for no other.
            alone = ocp.options.MultiprocessingOptions(
                primary_host=place()[0],
                active_processes={place()[0]} if place()[1] > 1 else None,
            )
            with ocp.Checkpointer(
                handler, multiprocessing_options=alone
            ) as checkpointer:
                checkpointer.save(folder.absolute(), args=tree)
        _sync(folder)
    except LlamaJaxError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever they like
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder}: cannot be written ({reason}); is there room on the disk?"
        ) from error
    finally:  # where the above was not given the time (a notebook's event loop)
        _drain(pending)


def _sync(folder: pathlib.Path) -> None:
    """Return when the disk has every file of a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Without the warnings that Orbax has for what was asked of it: no OCDBT."""
    expected = ("ArrayMetadata persistence is disabled", "Skipping merge of OCDBT")

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in expected)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class _Uncopied(np.ndarray):
    """An array that Orbax need not copy before writing: nobody changes it."""

    def __deepcopy__(self, memo: Any) -> "_Uncopied":
        return self


async def _finish(pending: list[Any], but: int = 0) -> None:
    """Wait for all writes but the latest."""
    while len(pending) > but:
        await asyncio.to_thread(pending[0].result)
        del pending[0]


def _drain(pending: list[Any]) -> None:
    """After a failure: wait for what is under way, whatever becomes of it."""
    while pending:
        with contextlib.suppress(Exception):
            pending.pop().result()


def _lazy(leaf: Any, layer: int | None = None) -> LazyLeaf:
    """An array (or one layer of a stacked one) as a leaf to be read later."""
    if isinstance(leaf, LazyLeaf) and layer is None:
        return leaf
    shape = tuple(leaf.shape if layer is None else leaf.shape[1:])

    def read() -> np.ndarray:
        return np.asarray(to_host(leaf if layer is None else leaf[layer]))

    return LazyLeaf(shape, np.dtype(leaf.dtype), read)


def _map_leaf(leaf: pathlib.Path, description: pathlib.Path) -> LazyLeaf | None:
    """A Zarr array of one raw chunk, or None where it is stored in another way."""
    try:
        found = json.loads(description.read_text("utf-8"))
        shape = tuple(found["shape"])
        raw = (
            found["zarr_format"] == 2
            and found["chunks"] == found["shape"]
            and found["compressor"] is None
            and not found["filters"]
            and found["order"] == "C"
            and found["dtype"] in _DTYPES
            and all(type(size) is int and 0 < size < _MOST for size in shape)
            and 0 < len(shape) <= 3
        )
        separator = {".": ".", "/": "/"}[found.get("dimension_separator", ".")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{description}: not the description of a Zarr array; copy or convert the "
            "model again"
        ) from error
    if not raw:
        return None
    dtype = _DTYPES[found["dtype"]]
    chunk = leaf / separator.join("0" for _ in shape)
    wanted = math.prod(shape) * dtype.itemsize
    size = chunk.stat().st_size if chunk.is_file() else 0
    if size != wanted:
        raise CheckpointError(
            f"{chunk}: has {size:,} bytes instead of {wanted:,}; it is damaged, copy "
            "or convert the model again"
        )

    def read() -> np.ndarray:
        # Copy on write: what might write into the array cannot reach the file.
        return np.asarray(np.memmap(chunk, dtype, "c", shape=shape))

    return LazyLeaf(shape, dtype, read)
