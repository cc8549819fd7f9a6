"""The tokenizer files of a Hugging Face folder, written."""

import pathlib
from typing import Any

from llama_jax.checkpoint.json_files import write_json
from llama_jax.conversion.huggingface_text import ADDED, CONFIG, JSON, SPECIAL
from llama_jax.conversion.tokenizer_json import (
    filled_tokens,
    flags_of,
    make_tokenizer_json,
)
from llama_jax.text.tokenizer import Tokenizer


def write_text(folder: pathlib.Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write the tokenizer files that `transformers` looks for in a model's folder.

    They are a `tokenizer.json` that gives the same ids, and a SentencePiece model or
    ranks unchanged.

    Args:
      folder: of the checkpoint.
      tokenizer: to write.
      max_seq_len: of the model, in tokens.

    Raises:
      TokenizerError: `tokenizers` would give its added tokens other ids.
    """
    if tokenizer.file_name != JSON:
        (folder / tokenizer.file_name).write_bytes(tokenizer.contents)
    write_json(folder / JSON, make_tokenizer_json(tokenizer))
    tokens = filled_tokens(tokenizer)
    if added := {t.text: id for id, t in tokens.items() if id >= tokenizer.vocab_size}:
        write_json(folder / ADDED, added)
    ids = {
        f"{name}_token": getattr(tokenizer, f"{name}_id")
        for name in ("bos", "eos", "unk", "pad")
    }
    names = {key: tokenizer.piece(id) for key, id in ids.items() if id >= 0}
    write_json(folder / SPECIAL, names)
    settings = tokenizer.settings
    config: dict[str, Any] = {
        # This class uses tokenizer.json unchanged. LlamaTokenizer of transformers 5
        # builds its own, which splits leading spaces in another way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(id): {"content": token.text} | flags_of(token)
            for id, token in tokens.items()
        },
        "add_bos_token": settings.add_bos,
        "add_eos_token": settings.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        **names,
    }
    if tokenizer.has_pieces:
        config["legacy"] = tokenizer.prefix_space == "always"
        if tokenizer.prefix_space == "never":
            config["add_prefix_space"] = False
    templates = settings.chat_templates
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    write_json(folder / CONFIG, config)
