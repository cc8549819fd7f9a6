"""What readers of checkpoints return, and what writers receive."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.config import LlamaConfig
from llama_jax.conversion.tensor_mapping import leaves_from_tensors
from llama_jax.conversion.tensor_tables import Format
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint: its configuration, and lazily read tensors.

    Attributes:
      path: folder or file.
      format: table of its format.
      config: its configuration.
      max_seq_len_origin: where `config.max_seq_len` comes from, for messages.
      tensors: by foreign name, model-parallel ranks joined.
      find_tokenizer: reads the tokenizer and returns it with its file.
      text_notes: sentences about what the checkpoint says about text, but the tokenizer
        does not; reads the tokenizer.
      checksums: md5 of each file that the checkpoint comes with a checksum for.
      ranks: number of model-parallel files.
    """

    path: pathlib.Path
    format: Format
    config: LlamaConfig
    max_seq_len_origin: str
    tensors: Mapping[str, LazyLeaf]
    find_tokenizer: Callable[[], tuple[Tokenizer, pathlib.Path]]
    text_notes: Callable[[], tuple[str, ...]] = tuple
    checksums: Mapping[pathlib.Path, str] = dataclasses.field(default_factory=dict)
    ranks: int = 1

    def with_tokenizer(self, tokenizer: Tokenizer, file: Path) -> "Source":
        """Return the source with another tokenizer, which is read from a file."""
        found = tokenizer, pathlib.Path(file)
        return dataclasses.replace(self, find_tokenizer=lambda: found, text_notes=tuple)

    def leaves(
        self, dtype: str | np.dtype | None = None, *, finite: bool = False
    ) -> dict[str, LazyLeaf]:
        """Return our leaves, lazily read from the tensors.

        Args:
          dtype: of the leaves; defaults to that of each tensor.
          finite: reading a tensor with NaN or infinity raises a `CheckpointError`.

        Raises:
          CheckpointError: a tensor is missing, unknown or of the wrong shape.
        """
        tensors = self.tensors
        if finite:
            tensors = {n: t.checked(self.path, n) for n, t in tensors.items()}
        return leaves_from_tensors(
            self.format,
            tensors,
            self.config,
            where=self.path,
            dtype=None if dtype is None else np.dtype(dtype),
        )


class LazyModel(NamedTuple):
    """A model to be written: its leaves are in their final dtype."""

    config: LlamaConfig
    leaves: Mapping[str, LazyLeaf]
    tokenizer: Tokenizer | None


def override_max_seq_len(
    config: LlamaConfig, max_seq_len: int | None, origin: str
) -> tuple[LlamaConfig, str]:
    """Return the config with the caller's `max_seq_len`, if any, and its origin.

    Args:
      config: of the checkpoint.
      max_seq_len: the caller's; None keeps the checkpoint's.
      origin: of the checkpoint's own value.
    """
    if max_seq_len is None:
        return config, origin
    return config.replace(max_seq_len=max_seq_len), "as given"


def tensor_progress(
    progress: Progress | None, tensors: Mapping[str, LazyLeaf]
) -> Callable[[str], None]:
    """Return a function that writers call with the name of each written tensor."""
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def written(name: str) -> None:
        nonlocal done
        done += tensors[name].nbytes
        if progress is not None:
            progress("writing", done, total)

    return written
