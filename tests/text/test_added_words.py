"""Added tokens in text, against the package `tokenizers`."""

import random
from typing import get_args

import pytest
import sentencepiece
from support.huggingface_tokenizers import small_model, their_tokenizer

from llama_jax.errors import TokenizerError
from llama_jax.generation.request import text_request
from llama_jax.text.settings import AddedToken, PrefixSpace, TextSettings
from llama_jax.text.tokenizer import Tokenizer

ADDED = {
    320: AddedToken("<|im_start|>"),
    321: AddedToken("<|im_end|>", rstrip=True),
    322: AddedToken("zorblat", special=False, normalized=True),
    323: AddedToken("the big sea", special=False),
    324: AddedToken("sea", special=False, single_word=True),
    325: AddedToken(" xx", special=False, normalized=True, lstrip=True),
    326: AddedToken("<mask>", lstrip=True),
    327: AddedToken("<marked>", normalized=True),
}
PARTS = (
    *(token.text for token in ADDED.values()), "<s>", "</s>", "<unk>", " ", "  ", "xx",
    "once upon a", "time", "a", "ü", "é", "\n", "▁", "undersea", "sea_", "🦙", "\x1c",
    "\u2003", ".",
)  # fmt: skip


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PARTS, k=rng.randrange(9))) for _ in range(count)]


@pytest.mark.parametrize("rule", get_args(PrefixSpace))
def test_ids_are_those_of_tokenizers(rule: PrefixSpace) -> None:
    theirs = their_tokenizer(small_model(), ADDED, rule)
    settings = TextSettings(added_tokens=ADDED, prefix_space=rule)
    from_model = Tokenizer(small_model(), settings=settings)
    from_json = Tokenizer(theirs.to_str().encode())
    for text in random_texts(1000):
        expected = theirs.encode(text).ids
        assert from_model.encode_marked(text) == expected, text
        assert from_json.encode_marked(text) == expected, text
    theirs.encode_special_tokens = True
    for text in random_texts(1000):
        if "<s>" in text or "<unk>" in text or "</s>" in text:
            continue  # to tokenizers they are pieces of its model
        expected = theirs.encode(text).ids
        assert from_model.encode(text, bos=False, eos=False) == expected, text
        assert from_json.encode(text, bos=False, eos=False) == expected, text


def test_text_encodes_to_added_words_but_never_to_special_tokens() -> None:
    tokenizer = Tokenizer(
        small_model(), settings=TextSettings(added_tokens=ADDED, add_bos=False)
    )
    text = "a zorblat sat<|im_start|><s></s><unk>"
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert 322 in ids
    assert not {0, 1, 2, 320} & set(ids)
    assert list(text_request(tokenizer, text).prompt_ids) == ids
    assert tokenizer.encode_marked(text)[-4:] == [320, 1, 2, 0]
    assert tokenizer.special_texts == (
        "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<mask>", "<marked>",
    )  # fmt: skip


def test_a_piece_that_is_declared_special_is_no_longer_encoded() -> None:
    model = small_model(user_defined=("<|im_end|>", "<word>"))
    before = Tokenizer(model)
    assert before.encode("a<|im_end|>", bos=False, eos=False)[-1] == 3
    settings = TextSettings(added_tokens={3: AddedToken("<|im_end|>")})
    tokenizer = Tokenizer(model, settings=settings)
    assert 3 not in tokenizer.encode("a<|im_end|>", bos=False, eos=False)
    assert tokenizer.encode("a<word>", bos=False, eos=False)[-1] == 4
    assert tokenizer.encode_marked("a<|im_end|>")[-1] == 3
    assert tokenizer.contents == model


def test_user_defined_pieces_are_encoded_as_sentencepiece_does() -> None:
    model = small_model(user_defined=("<ent>", "sea"))
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(model)
    for text in ("a <ent> dog", "<ent>", "undersea<ent> <ent>", " sea"):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == tokenizer.encode_marked(text) == sp.encode(text)


def test_an_added_word_must_fit_the_model() -> None:
    settings = TextSettings(added_tokens=ADDED)
    tokenizer = Tokenizer(small_model(), settings=settings)
    tokenizer.check_fits(328)
    tokenizer.check_fits(326)  # it lacks special tokens only
    with pytest.raises(TokenizerError, match="added word ' xx' has id 325"):
        tokenizer.check_fits(325)


def test_ends_stop_a_text_and_prompts_begin_as_the_checkpoint_says() -> None:
    settings = TextSettings(added_tokens=ADDED, end_ids=(2, 321))
    tokenizer = Tokenizer(small_model(), settings=settings)
    request = text_request(tokenizer, "a")
    assert (request.prompt_ids[0], request.stop_ids) == (1, (2, 321, 1))
    without = tokenizer.replace_settings(add_bos=False, add_eos=True)
    prompt = text_request(without, "a").prompt_ids
    assert (prompt[0], prompt[-1]) == (without.encode_marked("a")[0], 2)
