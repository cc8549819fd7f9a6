"""Our own checkpoints, seen as one more format."""

import pathlib

from llama_jax.checkpoint.model_folder import (
    read_config,
    read_tokenizer,
    tokenizer_file,
)
from llama_jax.checkpoint.orbax_io import open_leaves
from llama_jax.conversion.source import Source
from llama_jax.conversion.tensor_tables import ORBAX
from llama_jax.conversion.tokenizer_files import find_tokenizer
from llama_jax.text.tokenizer import Tokenizer


def read_orbax(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open one of our own folders; no weights are read.

    Raises:
      CheckpointError: it is damaged.
      ConfigError: its configuration is not understood.
    """
    config, context = read_config(path), "from config.json"
    if max_seq_len is not None:
        config, context = config.replace(max_seq_len=max_seq_len), "as given"

    def own_tokenizer() -> tuple[Tokenizer, pathlib.Path]:
        tokenizer, file = read_tokenizer(path), tokenizer_file(path)
        if tokenizer is None or file is None:
            return find_tokenizer(path)
        return tokenizer, file

    return Source(
        path=path,
        form=ORBAX,
        config=config,
        context=context,
        tensors=open_leaves(path / "params"),
        find_tokenizer=own_tokenizer,
    )
