"""Tokenizers with added tokens."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import pytest

from llama_jax.text.settings import AddedToken, TextSettings
from llama_jax.text.tokenizer import Tokenizer

_CORPUS = (
    "Hello, world! It's 2024-07-23, and they'LL pay $12,345.67 for 1000000 tea cups.",
    "  two  spaces\n\n\n\ttab\r\n   end   ",
    "你好,世界。日本語のテキスト 한국어 ภาษาไทย हिन्दी",
    "def f(x):\n    return {'a': x ** 2}  # once upon a time",
)


def special_tokens(names: Mapping[int, str]) -> TextSettings:
    """Settings with special tokens of these names."""
    return TextSettings(added_tokens={id: AddedToken(n) for id, n in names.items()})


@functools.cache
def byte_level_json(patterns: tuple[str, ...] | None = None) -> dict[str, Any]:
    """A `tokenizer.json` like SmolLM2's, trained here by `tokenizers`.

    It has 400 pieces, the first of which are `<|endoftext|>`, `<|im_start|>` and
    `<|im_end|>`, and the word `zorblat` with id 400.

    Args:
      patterns: how text is split; defaults to SmolLM2's classes.
    """
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    parts = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    to_bytes = parts.ByteLevel(add_prefix_space=False, use_regex=patterns is None)
    splits = [parts.Digits(individual_digits=True)]
    if patterns is not None:
        splits = [
            parts.Split(tokenizers.Regex(pattern), behavior="isolated")
            for pattern in patterns
        ]
    tokenizer.pre_tokenizer = parts.Sequence([*splits, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=parts.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator([text * 3 for text in _CORPUS], trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("zorblat", normalized=False)])
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


def byte_level_tokenizer(**changes: Any) -> Tokenizer:
    """The tokenizer of `byte_level_json`, with SmolLM2-Instruct's special ids.

    Args:
      **changes: other settings.
    """
    settings: dict[str, Any] = {
        "bos_id": 1, "eos_id": 2, "unk_id": 0, "pad_id": 2, "add_bos": False,
    }  # fmt: skip
    contents = json.dumps(byte_level_json()).encode()
    return Tokenizer(contents, settings=TextSettings(**settings | changes))
