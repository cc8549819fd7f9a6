"""Foreign checkpoints to ours: Meta's folders and llama2.c's files."""

from llama_jax.conversion.convert import (
    Converted,
    convert,
    find_tokenizer,
    open_source,
    open_tokenizer,
)
from llama_jax.conversion.source import Source

__all__ = [
    "Converted",
    "Source",
    "convert",
    "find_tokenizer",
    "open_source",
    "open_tokenizer",
]
