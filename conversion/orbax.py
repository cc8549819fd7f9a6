"""Checkpoints of this library, as one more format."""

import pathlib

from llama_jax.checkpoint.model_folder import (
    read_config,
    read_tokenizer,
    tokenizer_file,
)
from llama_jax.checkpoint.orbax_io import open_leaves
from llama_jax.conversion.source import Source, override_max_seq_len
from llama_jax.conversion.tensor_tables import ORBAX
from llama_jax.conversion.tokenizer_files import find_tokenizer
from llama_jax.text.tokenizer import Tokenizer


def read_orbax(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open a checkpoint folder of this library without reading weights.

    Args:
      path: the folder.
      max_seq_len: replaces the checkpoint's own.

    Raises:
      CheckpointError: the folder is damaged.
      ConfigError: its configuration is not valid.
    """
    config, origin = override_max_seq_len(
        read_config(path), max_seq_len, "from config.json"
    )

    def own_tokenizer() -> tuple[Tokenizer, pathlib.Path]:
        tokenizer, file = read_tokenizer(path), tokenizer_file(path)
        if tokenizer is None or file is None:
            return find_tokenizer(path)
        return tokenizer, file

    return Source(
        path=path,
        format=ORBAX,
        config=config,
        max_seq_len_origin=origin,
        tensors=open_leaves(path / "params"),
        find_tokenizer=own_tokenizer,
    )
