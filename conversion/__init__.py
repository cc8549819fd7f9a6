"""Convert checkpoints between formats: ours, Meta, Hugging Face, GGUF, llama2.c."""

from llama_jax.conversion.comparison import Comparison, compare
from llama_jax.conversion.converter import (
    ConversionResult,
    PreparedConversion,
    convert,
    prepare_conversion,
)
from llama_jax.conversion.formats import open_source
from llama_jax.conversion.source import Source
from llama_jax.conversion.tensor_tables import FormatName
from llama_jax.conversion.tokenizer_files import open_tokenizer

__all__ = [
    "Comparison",
    "ConversionResult",
    "FormatName",
    "PreparedConversion",
    "Source",
    "compare",
    "convert",
    "open_source",
    "open_tokenizer",
    "prepare_conversion",
]
