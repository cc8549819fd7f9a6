"""Read the pickle of a `.pth` file without executing any of it.

The opcodes are interpreted here, globals stay names, and the only calls understood are
the few that rebuild tensors; everything else is refused by name.
"""

import io
import pathlib
import pickletools
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.errors import CheckpointError

FIX = "download the file again"

_STORAGES: dict[str, np.dtype] = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD = "torch._utils _rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_NAMES = {*_STORAGES, _ORDERED_DICT, _REBUILD, _REBUILD_PARAMETER}


class Storage(NamedTuple):
    """One raw file of the archive; `size` is in numbers."""

    dtype: np.dtype
    key: str
    size: int


class TensorView(NamedTuple):
    """A tensor as the pickle describes it, not yet checked against its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(
    stream: io.BytesIO,
    path: pathlib.Path,
    storages: dict[str, "Storage"] | None = None,
) -> Any:
    """Return what a pickle describes: for a state dict, `TensorView`s by name.

    Args:
      stream: of the pickle, which is read to its end.
      path: of its file, for messages.
      storages: receives the storages that the pickle names, by key.

    Raises:
      CheckpointError: it is damaged, or contains what no state dict contains.
    """
    return _Unpickler(path, {} if storages is None else storages).load(stream)


class _Name(str):
    """A global of the pickle, never looked up."""


class _Mark:
    """Start of a tuple or of dict items on the stack."""


class _Unpickler:
    """The part of the pickle machine that state dicts use."""

    def __init__(self, path: pathlib.Path, storages: dict[str, Storage]) -> None:
        self.path, self.storages = path, storages

    def load(self, stream: io.BytesIO) -> object:
        """Interpret opcodes until STOP."""
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        opcode = None
        try:
            for opcode, arg, _ in pickletools.genops(stream):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._step(opcode.name, arg)
        except CheckpointError:
            raise
        # All that damaged pickles make pickletools and the code below raise.
        except (
            ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError,
            struct.error,
        ) as error:  # fmt: skip
            position = f" at {opcode.name}" if opcode else ""
            raise CheckpointError(
                f"{self.path}: its pickle is damaged{position} ({error}); {FIX}"
            ) from error
        raise CheckpointError(f"{self.path}: its pickle has no STOP; {FIX}")

    def _step(self, name: str, arg: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True}.get(name, False))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":  # of the keys of a legacy file's storages
                stack.append([])
            case "APPEND":
                item = stack.pop()
                self._extend([item])
            case "APPENDS":
                self._extend(self._since_mark())
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(_Mark())
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                items = [stack.pop() for _ in range(count)]
                stack.append(tuple(reversed(items)))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                self._set_items(self._since_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "GLOBAL":
                stack.append(self._global(arg))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._global(f"{module} {attribute}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "BUILD":  # attributes of an OrderedDict: `_metadata` of a module
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError("attributes of an object that is not a state dict")
            case _:
                raise CheckpointError(
                    f"{self.path}: its pickle uses {name}, which no state dict "
                    "contains; it may be malicious, get the file from another source"
                )

    def _since_mark(self) -> list[object]:
        items = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def _extend(self, items: list[object]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items of an object that is not a list")
        self.stack[-1].extend(items)

    def _set_items(self, items: list[object]) -> None:
        if len(items) % 2 or not isinstance(self.stack[-1], dict):
            raise ValueError("items of an object that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is not a string")
            if key in self.stack[-1]:
                raise ValueError(f"{key!r} occurs twice")
            self.stack[-1][key] = value

    def _global(self, name: str) -> _Name:
        if name not in _NAMES:
            raise CheckpointError(
                f"{self.path}: its pickle refers to {name.replace(' ', '.')!r}, which "
                "is not part of a plain state dict and was not executed; get the "
                "weights as plain float32, float16 or bfloat16 tensors"
            )
        return _Name(name)

    def _storage(self, id: Any) -> Storage:
        kind, name, key, _, count, *view = id
        if kind != "storage" or not isinstance(name, _Name) or name not in _STORAGES:
            raise ValueError("a persistent id that is not a storage")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError("a storage without a key or size")
        if view not in ([], [None]):  # legacy files have it, always None
            raise ValueError("a storage that is a view of another one")
        storage = Storage(_STORAGES[name], key, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key!r} has two descriptions")
        return storage

    def _call(self, function: object, arguments: object) -> object:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of an object that is not a function")
        if function == _ORDERED_DICT and arguments == ():
            return {}
        if function == _REBUILD_PARAMETER and isinstance(arguments[0], TensorView):
            return arguments[0]
        if function == _REBUILD:
            storage, offset, shape, strides = arguments[:4]
            numbers = (offset, *shape, *strides)
            valid = all(type(n) is int and n >= 0 for n in numbers)
            valid = valid and len(shape) == len(strides) <= 8
            if valid and isinstance(storage, Storage):
                return TensorView(storage, offset, tuple(shape), tuple(strides))
        raise ValueError(f"a call of {function} with unexpected arguments")
