"""Tokenizers with added tokens."""

from collections.abc import Mapping

from llama_jax.text.settings import AddedToken, TextSettings


def special_tokens(names: Mapping[int, str]) -> TextSettings:
    """Settings with special tokens of these names."""
    return TextSettings(added_tokens={id: AddedToken(n) for id, n in names.items()})
