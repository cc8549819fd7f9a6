"""What every reader of a checkpoint hands over, and every writer is handed."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.config import LlamaConfig
from llama_jax.conversion.tensor_mapping import plan
from llama_jax.conversion.tensor_tables import Format
from llama_jax.errors import ConfigError
from llama_jax.presets import PRESETS
from llama_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint, opened: what it is, and tensors that can be read.

    Attributes:
      path: of the folder or file.
      form: the table of its format.
      config: what it says it is.
      context: where `config.max_seq_len` comes from, in words.
      tensors: by foreign name, whole (ranks joined), read when wanted.
      find_tokenizer: reads its tokenizer, and says where that was.
      checksums: md5 of some of its files, where it comes with a list of them.
      ranks: in how many model-parallel parts it lies.
    """

    path: pathlib.Path
    form: Format
    config: LlamaConfig
    context: str
    tensors: Mapping[str, LazyLeaf]
    find_tokenizer: Callable[[], tuple[Tokenizer, pathlib.Path]]
    checksums: Mapping[pathlib.Path, str] = dataclasses.field(default_factory=dict)
    ranks: int = 1

    def leaves(self, dtype: Any = None) -> dict[str, LazyLeaf]:
        """Our leaves, in `dtype`; see `rules.plan`."""
        return plan(self.form, self.tensors, self.config, where=self.path, dtype=dtype)


class Export(NamedTuple):
    """A model to be written: our leaves in the dtype that is wanted."""

    config: LlamaConfig
    leaves: Mapping[str, LazyLeaf]
    tokenizer: Tokenizer | None


def counted(
    progress: Progress | None, tensors: Mapping[str, LazyLeaf]
) -> Callable[[str], None]:
    """A function to be told the name of each tensor that is written."""
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def count(name: str) -> None:
        nonlocal done
        done += tensors[name].nbytes
        if progress is not None:
            progress("writing", done, total)

    return count


_ALIKE = (
    "num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size",
    "rope_theta",
)  # fmt: skip


def published_context(config: LlamaConfig, where: Any) -> tuple[int, str]:
    """The longest sequence of the published model with these sizes, and its name.

    LLaMA 1 and Llama 2 of 7B and 13B differ in nothing else but epsilon, so that it
    decides between presets that are otherwise alike.

    Raises:
      ConfigError: no published model has them.
    """
    alike = {
        name: known
        for name, known in PRESETS.items()
        if all(getattr(known, field) == getattr(config, field) for field in _ALIKE)
    }
    same = {n: known for n, known in alike.items() if known.norm_eps == config.norm_eps}
    for name, known in (same or alike).items():
        return known.max_seq_len, f"as published for {name}"
    raise ConfigError(
        f"{where}: says nothing about the longest sequence, and no published model has "
        "these sizes; give it with --max-seq-len (max_seq_len=)"
    )
