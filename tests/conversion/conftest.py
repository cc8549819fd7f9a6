"""Fixtures of the conversion tests."""

import pytest
from support.foreign import tiny_tokenizer as make_tiny_tokenizer

from llama_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of 272 pieces: special ones, all bytes, some letters."""
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
