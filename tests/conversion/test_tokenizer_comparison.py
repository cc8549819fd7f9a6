"""Differences of tokenizers are named, whatever they are."""

from typing import Any

import pytest
from support.models import tiny_tokenizer

from llama_jax.conversion.tokenizer_comparison import compare_tokenizers
from llama_jax.text.settings import AddedToken, TextSettings
from llama_jax.text.tokenizer import Tokenizer

END, WORD = AddedToken("<|im_end|>"), AddedToken("zorblat", special=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    plain = tiny_tokenizer()
    tokens = {plain.vocab_size: END, plain.vocab_size + 1: WORD}
    return Tokenizer(
        plain.contents,
        settings=TextSettings(
            added_tokens=tokens, end_ids=(plain.vocab_size,),
            chat_templates={"default": "{{ messages }}"}, sampling={"top_p": 0.5},
        ),
    )  # fmt: skip


def test_a_tokenizer_equals_itself(tokenizer: Tokenizer) -> None:
    same = tokenizer.replace_settings()
    size = tokenizer.vocab_size + 2
    assert not list(compare_tokenizers(tokenizer, same, size))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"add_bos": False}, "add_bos: True and False"),
        ({"add_eos": True}, "add_eos: False and True"),
        ({"end_ids": ()}, "the ids that end an answer: [2, 320] and [2]"),
        ({"eos_id": 1}, "eos_id: 2 and 1"),
        ({"chat_templates": {}}, "chat_templates: {'default': "),
        ({"sampling": {}}, "sampling: {'top_p': 0.5} and {}"),
        ({"added_tokens": {320: END}}, "the added tokens: {321: AddedToken("),
        ({"added_tokens": {320: WORD, 321: END}}, "encode_marked of 'a <|im_end|> b"),
        ({"added_tokens": {320: END}}, "encode of 'a zorblat bzorblat': ["),
        ({"pad_id": 320}, "pad_id: -1 and 320"),
        ({"prefix_space": "never"}, "prefix_space: 'always' and 'never'"),
        ({"prefix_space": "never"}, "encode of 'Once upon a time"),
    ],
)
def test_every_difference_is_named(
    tokenizer: Tokenizer, change: dict[str, Any], words: str
) -> None:
    other = tokenizer.replace_settings(**change)
    size = tokenizer.vocab_size + 2
    differences = list(compare_tokenizers(tokenizer, other, size))
    assert any(difference.startswith(words) for difference in differences), differences
