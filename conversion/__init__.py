"""Checkpoints of every format into every other: Meta, Hugging Face, GGUF, llama2.c."""

from llama_jax.conversion.convert import Converted, Plan, convert, plan_conversion
from llama_jax.conversion.formats import FormatName, open_source
from llama_jax.conversion.source import Source
from llama_jax.conversion.tokenizer_files import open_tokenizer
from llama_jax.conversion.verify import Comparison, compare

__all__ = [
    "Comparison",
    "Converted",
    "FormatName",
    "Plan",
    "Source",
    "compare",
    "convert",
    "open_source",
    "open_tokenizer",
    "plan_conversion",
]
