"""Tokenizer and StreamDecoder against SentencePiece itself and Meta's token ids."""

import io
import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from llama_jax.errors import LlamaJaxError, TokenizerError
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer
from tests.support.tokenizers import special_tokens

GOLDEN = (
    "meta/llama1-mha-tiny",
    "meta/llama2-gqa-tiny-mp2",
    "meta/codellama-tiny",
    "weights/stories15M.golden",
)
ADDED = {32000: "[PAD]", 32002: "<|im_start|>"}


@pytest.fixture(scope="module")
def codellama(assets: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(assets / "tokenizers" / "codellama.model")


def train(**options: Any) -> bytes:
    """A SentencePiece model of a few hundred pieces, of another kind than Llama's."""
    out = io.BytesIO()
    words = ["one fish two fish", "red  fish blue fish", "ünder the sea, Sam I am"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=out,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return out.getvalue()


KINDS: dict[str, dict[str, Any]] = {
    "as_llama": {
        "vocab_size": 320,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "trimming_spaces": {"vocab_size": 320, "byte_fallback": True},
    "without_bytes": {"vocab_size": 60},
    "without_dummy_prefix": {"vocab_size": 60, "add_dummy_prefix": False},
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(train(**KINDS[request.param]))


def streamed(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], *, after_marker: bool = False
) -> str:
    """The ids pushed in chunks that end at `cuts`."""
    decoder = StreamDecoder(tokenizer, after_marker=after_marker)
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    chunks = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    return "".join(map(decoder.push, chunks)) + decoder.flush()


def mixtures(vocab_size: int) -> st.SearchStrategy[list[int]]:
    """Ids of which many are bytes (3 to 258), specials and spaces."""
    spaces = st.sampled_from([0, 1, 2, 259, 268, 29871])
    bytes_of_text = st.text(max_size=3).map(lambda t: [3 + b for b in t.encode()])
    one = st.one_of(spaces, st.integers(3, 258), st.integers(0, vocab_size - 1))
    parts = st.lists(st.one_of(one.map(lambda id: [id]), bytes_of_text), max_size=20)
    return parts.map(lambda parts: [id for part in parts for id in part])


CUTS = st.lists(st.integers(0, 60), max_size=6)


# SentencePiece itself


@pytest.mark.parametrize("folder", GOLDEN)
def test_encoding_equals_metas(
    assets: pathlib.Path, llama2_tokenizer: Tokenizer, codellama: Tokenizer, folder: str
) -> None:
    golden = json.loads((assets / folder / "golden.json").read_text())
    tokenizer = codellama if "codellama" in folder else llama2_tokenizer
    for prompt, ids in zip(golden["prompts"], golden["prompt_tokens"], strict=True):
        assert tokenizer.encode(prompt, bos=True, eos=False) == ids
        assert tokenizer.decode(ids) == prompt


def test_decoding_equals_metas(
    assets: pathlib.Path, llama2_tokenizer: Tokenizer
) -> None:
    for folder, texts in (
        ("meta/llama1-mha-tiny", "generate_greedy"),
        ("meta/llama2-gqa-tiny-mp2", "text_completion"),
        ("weights/stories15M.golden", "text_completion"),
    ):
        golden = json.loads((assets / folder / "golden.json").read_text())
        for ids, text in zip(
            golden["generate_greedy_tokens"], golden[texts], strict=True
        ):
            text = text if isinstance(text, str) else text["generation"]
            assert llama2_tokenizer.decode(ids) == text
            assert streamed(llama2_tokenizer, ids, list(range(len(ids)))) == text


@given(text=st.text(max_size=40))
@example("  two  spaces\n\ttab\r\n")
@example("你好 🦙 ☺☺")
@example("<s> </s> <unk> <0x41>")
def test_decode_inverts_encode(llama2_tokenizer: Tokenizer, text: str) -> None:
    ids = llama2_tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert not {0, 1, 2} & set(ids[1:-1])
    # Pieces have spaces as U+2581.
    assert llama2_tokenizer.decode(ids) == text.replace("▁", " ")
    middle = llama2_tokenizer.encode_infilling(text)
    assert llama2_tokenizer.decode_infilling(middle) == text.replace("▁", " ")


@given(data=st.data())
def test_decode_equals_sentencepiece(
    llama2_tokenizer: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(mixtures(llama2_tokenizer.vocab_size))
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(llama2_tokenizer.contents)
    assert llama2_tokenizer.decode(ids) == sp.decode(ids)
    smile = sp.piece_to_id("☺")
    assert llama2_tokenizer.decode_infilling(ids) == sp.decode([smile, *ids])[1:]


def test_special_pieces_of_llama2(llama2_tokenizer: Tokenizer) -> None:
    tokenizer = llama2_tokenizer
    assert tokenizer.vocab_size == 32000
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.pad_id == -1
    assert tokenizer.infilling is None
    assert tokenizer.step_id is None
    assert tokenizer.piece_id("▁The") == 450
    assert tokenizer.piece_id("<unk>") == 0
    assert tokenizer.piece_id("no such piece") is None
    assert tokenizer.token_text(450) == "The"
    assert tokenizer.token_text(1) == ""
    assert tokenizer.token_text(243) == "\N{REPLACEMENT CHARACTER}"


def test_infilling_pieces_of_code_llama(
    assets: pathlib.Path, codellama: Tokenizer
) -> None:
    assert codellama.infilling == (32007, 32008, 32009, 32010)
    assert codellama.infilling.end == 32010
    assert codellama.step_id is None
    step = Tokenizer.from_file(assets / "tokenizers" / "codellama-step.model")
    assert step.step_id == 32015


def test_text_that_is_not_unicode_is_refused(llama2_tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"character 2 .* surrogate"):
        llama2_tokenizer.encode("ab\ud83d", bos=True, eos=False)


# Files


def test_unreadable_files_are_named(
    tmp_path: pathlib.Path, llama2_tokenizer: Tokenizer
) -> None:
    with pytest.raises(TokenizerError, match=r"gone\.model: cannot be read .No such"):
        Tokenizer.from_file(tmp_path / "gone.model")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)
    path = tmp_path / "damaged.model"
    for content in (b"", b"<html>", llama2_tokenizer.contents[:100_000]):
        path.write_bytes(content)
        with pytest.raises(LlamaJaxError, match=r"damaged\.model: .*download it again"):
            Tokenizer.from_file(path)
    path.write_bytes(llama2_tokenizer.contents)
    assert Tokenizer.from_file(str(path)).contents == llama2_tokenizer.contents


def test_importing_text_imports_neither_jax_nor_jinja() -> None:
    code = (
        "import sys, llama_jax.text.prompt_formats\n"
        "print({'jax', 'jinja2'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# More ids than pieces, and fewer


def test_added_tokens_have_names_and_are_never_encoded(
    llama2_tokenizer: Tokenizer,
) -> None:
    proto = llama2_tokenizer.contents
    tokenizer = Tokenizer(proto, settings=special_tokens({**ADDED, 2: "</s>"}))
    assert tokenizer.added_tokens == ADDED
    assert tokenizer.piece_id("<|im_start|>") == 32002
    assert max(tokenizer.encode("<|im_start|>[PAD]", bos=True, eos=True)) < 32000
    ids = [1, 32002, 450, 32001, 32000, 243]
    assert tokenizer.decode(ids) == "<|im_start|> The[PAD]\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode_infilling([450, 32000]) == " The[PAD]"
    assert tokenizer.unnamed_ids(32004) == (32001, 32003)
    assert tokenizer.unnamed_ids(32000) == ()
    with pytest.raises(TokenizerError, match=r"'\[PAD\]' has id 450, which is '▁The'"):
        Tokenizer(proto, settings=special_tokens({450: "[PAD]"}))
    with pytest.raises(TokenizerError, match="negative"):
        Tokenizer(proto, settings=special_tokens({-1: "[PAD]"}))
    with pytest.raises(TokenizerError, match="-1 is not a token id"):
        tokenizer.decode([450, -1])


def test_encodable_ids_must_fit_the_model(
    llama2_tokenizer: Tokenizer, codellama: Tokenizer
) -> None:
    llama2_tokenizer.check_fits(32000)
    llama2_tokenizer.check_fits(32001)
    codellama.check_fits(32016)
    with pytest.raises(TokenizerError, match=r"32016 pieces .* vocab_size 32000"):
        codellama.check_fits(32000)


# Streams


@given(data=st.data(), cuts=CUTS, after_marker=st.booleans())
def test_stream_equals_decode(
    codellama: Tokenizer, data: st.DataObject, cuts: list[int], after_marker: bool
) -> None:
    ids = data.draw(mixtures(codellama.vocab_size))
    decode = codellama.decode_infilling if after_marker else codellama.decode
    assert streamed(codellama, ids, cuts, after_marker=after_marker) == decode(ids)


@given(data=st.data(), cuts=CUTS, after_marker=st.booleans())
def test_stream_equals_decode_for_other_kinds_of_model(
    trained: Tokenizer, data: st.DataObject, cuts: list[int], after_marker: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, trained.vocab_size - 1), max_size=30))
    decode = trained.decode_infilling if after_marker else trained.decode
    assert streamed(trained, ids, cuts, after_marker=after_marker) == decode(ids)


@given(data=st.binary(max_size=12), cuts=CUTS)
@example(b"\xe2\x98", [1])
@example(b"\xe2\x98\x41", [2])
@example(b"\xed\xa0\x80", [1])
@example(b"\xf4\x90\x80\x80", [3])
@example(b"\xc0\x80\xff\x00", [])
@example(b"\xef\xbf\xbd", [2])
def test_stream_of_any_bytes_equals_decode(
    llama2_tokenizer: Tokenizer, data: bytes, cuts: list[int]
) -> None:
    ids = [3 + byte for byte in data]
    assert streamed(llama2_tokenizer, ids, cuts) == llama2_tokenizer.decode(ids)


def test_character_of_several_tokens_comes_whole(llama2_tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(llama2_tokenizer)
    ids = llama2_tokenizer.encode("a 🦙!", bos=False, eos=False)
    assert [decoder.push([id]) for id in ids] == ["a", " ", "", "", "", "🦙", "!"]
    assert decoder.flush() == ""


@given(text=st.text(max_size=20), data=st.data())
def test_pushed_text_never_changes(
    llama2_tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = llama2_tokenizer.encode(text, bos=False, eos=False)
    cut = data.draw(st.integers(0, len(ids)))
    assert llama2_tokenizer.decode(ids).startswith(
        StreamDecoder(llama2_tokenizer).push(ids[:cut])
    )
