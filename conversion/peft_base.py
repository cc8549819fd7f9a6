"""The base model that adapters were trained on, named beside them in their folder.

Adapters of a reward model can share the weights of a policy only if these are the same,
which `peft` has no field for.
"""

import pathlib
from typing import NamedTuple

from llama_jax.checkpoint.json_files import read_json, write_json
from llama_jax.conversion.other_folders import ADAPTER_CONFIG
from llama_jax.errors import CheckpointError
from llama_jax.types import Path

_FILE = "base.json"


class Base(NamedTuple):
    """The base model of adapters; unknown to folders that `peft` wrote.

    Attributes:
      model: its folder or name.
      weights: its `checkpoint.fingerprint`.
    """

    model: str | None
    weights: str | None


def is_adapter(path: Path) -> bool:
    """Whether a folder has adapters."""
    return (pathlib.Path(path) / ADAPTER_CONFIG).is_file()


def write_base(folder: pathlib.Path, model: str | None, weights: str | None) -> None:
    """Name the base model in the folder of its adapters."""
    write_json(folder / _FILE, {"model": model, "weights": weights})


def read_base(adapter: Path) -> Base:
    """Read which base model adapters were trained on.

    Raises:
      CheckpointError: the file is damaged.
    """
    file = pathlib.Path(adapter) / _FILE
    if not file.is_file():
        return Base(None, None)
    fields = read_json(file, remedy="copy the adapters again")
    values = fields.get("model"), fields.get("weights")
    if any(not isinstance(value, str | None) for value in values):
        raise CheckpointError(f"{file}: is damaged; copy the adapters again")
    return Base(*values)
