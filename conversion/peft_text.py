"""The tokenizer beside adapters, which trainers save with their templates and ends."""

import pathlib

from llama_jax.conversion.huggingface_text import JSON, MODEL, read_text
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path


def with_text_of(adapter: Path, tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Return the tokenizer in the folder of adapters, else the base model's.

    Ends of both count, and the base model's sampling defaults and template if the
    folder has none.

    Args:
      adapter: folder of the adapters.
      tokenizer: of the base model.
      vocab_size: of the base model; added tokens beyond it are left out.

    Raises:
      TokenizerError: the folder's tokenizer is damaged.
    """
    folder = pathlib.Path(adapter)
    if not any((folder / name).is_file() for name in (MODEL, JSON)):
        return tokenizer
    own, base = read_text(folder, vocab_size).tokenizer, tokenizer.settings
    settings = own.settings
    return own.replace_settings(
        end_ids=(*settings.end_ids, *tokenizer.end_ids),
        chat_templates=settings.chat_templates or base.chat_templates,
        sampling=settings.sampling or base.sampling,
    )
