"""The context that adapters were trained for, beside them in their folder.

`peft` has no field for it: adapters that were trained with other rotary positions than
their base model's are wrong without them.
"""

import pathlib

from llama_jax.checkpoint.json_files import config_errors_in, read_json, write_json
from llama_jax.config import LlamaConfig
from llama_jax.model.rope import rope_frequencies
from llama_jax.types import Path

_FILE = "context.json"
_FIELDS = ("max_seq_len", "rope_theta", "rope_scaling")


def write_context(folder: pathlib.Path, config: LlamaConfig) -> None:
    """Write the context of a model into the folder of its adapters."""
    fields = config.to_dict()
    write_json(folder / _FILE, {name: fields[name] for name in _FIELDS})


def with_context_of(
    adapter: Path, config: LlamaConfig, *, max_seq_len: int | None = None
) -> LlamaConfig:
    """Return the configuration of a base model with the context of its adapters.

    It is the base model's own if both have the same rotary positions.

    Args:
      adapter: folder of the adapters; those that `peft` saved change nothing.
      config: of the base model.
      max_seq_len: as given by the user, which counts.

    Raises:
      ConfigError: the file has other fields, or a value is out of range.
    """
    file = pathlib.Path(adapter) / _FILE
    if not file.is_file():
        return config
    with config_errors_in(file):
        fields = read_json(file, remedy="copy the adapters again")
        changed = LlamaConfig.from_dict(config.to_dict() | fields)
    same_frequencies = (rope_frequencies(changed) == rope_frequencies(config)).all()
    if changed.rope_scaling == config.rope_scaling and same_frequencies:
        return config
    return changed if max_seq_len is None else changed.replace(max_seq_len=max_seq_len)
