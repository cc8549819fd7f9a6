"""Byte-level tokenizers and tokenizer.json against tiktoken, tokenizers and Meta."""

import functools
import io
import itertools
import json
import pathlib
import sys
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.models import TINY, random_params, tiny_tokenizer

from llama_jax.checkpoint.model_folder import Loaded, read_tokenizer, save_params
from llama_jax.errors import LlamaJaxError, TokenizerError
from llama_jax.generation.completion import chat_completion
from llama_jax.generation.generate import stream
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.model.transformer import Llama
from llama_jax.runtime import Runtime
from llama_jax.text.byte_level_bpe import LLAMA3_PATTERN, LLAMA3_SPECIAL
from llama_jax.text.prompt_formats import Message, default_format
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer
from tests.support.tokenizers import special_tokens

REASON = 'pip install "llama-jax[llama3]" to run this test'
TEXTS = (
    "Hello, world! It's 2024-07-23, and they'LL pay $12,345.67 for 1000000 tea cups.",
    "  two  spaces\n\n\n\ttab\r\n   end   ",
    "你好,世界。日本語のテキスト 한국어 ภาษาไทย हिन्दी العربية עברית",
    "ünïcödé é ñ ß ﬁ 🦙🦙🏽 👩‍👩‍👧 \u200b\u00a0x",
    "def f(x):\n    return {'a': x ** 2}  # <|eot_id|><|begin_of_text|>",
    "\x00\x01\x7f\ufffd\ufeff",
    "",
)


@pytest.fixture(scope="session")
def llama3(assets: pathlib.Path) -> Tokenizer:
    """Llama 3's tokenizer, from Meta's file."""
    pytest.importorskip("tiktoken", reason=REASON)
    return Tokenizer.from_file(assets / "tokenizers" / "llama3.model")


@pytest.fixture(scope="session")
def reference(llama3: Tokenizer) -> Any:
    """The same as in Meta's code, special tokens included."""
    return encoding(ranks_of(llama3), LLAMA3_SPECIAL)


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    import tiktoken.load

    lines = (line.split() for line in tokenizer.contents.splitlines())
    return {tiktoken.load.base64.b64decode(piece): int(rank) for piece, rank in lines}


def encoding(ranks: dict[bytes, int], special: tuple[str, ...] = ()) -> Any:
    import tiktoken

    return tiktoken.Encoding(
        "test",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + i for i, name in enumerate(special)},
    )


def added(first: int, names: tuple[str, ...], **other: Any) -> list[dict[str, Any]]:
    """The list of special tokens in a tokenizer.json."""
    keys = ("single_word", "lstrip", "rstrip", "normalized")
    rest = dict.fromkeys(keys, False) | {"special": True} | other
    return [{"id": first + i, "content": name, **rest} for i, name in enumerate(names)]


@pytest.fixture(scope="session")
def trained() -> dict[str, Any]:
    """A tokenizer.json of 400 pieces, trained here, and Llama 3's first tokens."""
    tokenizers = pytest.importorskip("tokenizers", reason=REASON)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(LLAMA3_PATTERN), behavior="isolated"
    )
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text * 3 for text in TEXTS], trainer)
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    described["added_tokens"] = [
        *added(400, LLAMA3_SPECIAL[:11]),
        *added(412, ("<think>",), special=False),
    ]
    return described


def opened(described: dict[str, Any]) -> Tokenizer:
    return Tokenizer(json.dumps(described).encode())


def streamed(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> str:
    """The ids pushed in chunks that end at `cuts`."""
    decoder = StreamDecoder(tokenizer)
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    chunks = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    return "".join(map(decoder.push, chunks)) + decoder.flush()


CUTS = st.lists(st.integers(0, 60), max_size=6)


# Llama 3, from Meta's file


def test_llama3_has_the_published_special_tokens(llama3: Tokenizer) -> None:
    assert llama3.vocab_size == 128_256
    assert len(set(LLAMA3_SPECIAL)) == 256
    for id, name in {
        128_000: "<|begin_of_text|>",
        128_001: "<|end_of_text|>",
        128_003: "<|reserved_special_token_1|>",
        128_004: "<|finetune_right_pad_id|>",
        128_005: "<|step_id|>",
        128_006: "<|start_header_id|>",
        128_007: "<|end_header_id|>",
        128_008: "<|eom_id|>",
        128_009: "<|eot_id|>",
        128_010: "<|python_tag|>",
        128_011: "<|reserved_special_token_2|>",
        128_255: "<|reserved_special_token_246|>",
    }.items():
        assert (llama3.piece(id), llama3.piece_id(name)) == (name, id)
        assert llama3.decode([id]) == ""
    assert (llama3.bos_id, llama3.eos_id) == (128_000, 128_001)
    assert (llama3.unk_id, llama3.pad_id) == (-1, 128_004)
    assert (llama3.infilling, llama3.step_id) == (None, None)
    assert llama3.piece_id(" the") == 279
    assert llama3.piece_id("no such piece") is None


@given(text=st.text(max_size=60))
def test_encoding_equals_tiktoken(llama3: Tokenizer, reference: Any, text: str) -> None:
    ids = llama3.encode(text, bos=True, eos=True)
    assert ids[1:-1] == reference.encode(text, disallowed_special=())
    assert (ids[0], ids[-1]) == (128_000, 128_001)
    assert max(ids[1:-1], default=0) < 128_000
    assert llama3.decode(ids) == text
    assert llama3.encode_infilling(text) == ids[1:-1]
    assert llama3.decode_infilling(ids) == text


for _text in TEXTS:
    test_encoding_equals_tiktoken = example(text=_text)(test_encoding_equals_tiktoken)


@given(data=st.data(), cuts=CUTS)
def test_decoding_and_streams_equal_tiktoken(
    llama3: Tokenizer, reference: Any, data: st.DataObject, cuts: list[int]
) -> None:
    # The first 256 ids are lone bytes.
    one = st.one_of(st.integers(0, 255), st.integers(0, 127_999))
    ids = data.draw(st.lists(one, max_size=30))
    assert llama3.decode(ids) == reference.decode(ids)
    assert streamed(llama3, ids, cuts) == llama3.decode(ids)


def test_character_of_several_tokens_comes_whole(llama3: Tokenizer) -> None:
    decoder = StreamDecoder(llama3)
    ids = llama3.encode("a 🦙!", bos=True, eos=False)
    assert [decoder.push([id]) for id in ids] == ["", "a", " ", "", "🦙", "!"]
    assert decoder.flush() == ""


@pytest.mark.parametrize("run", [" ", "\n", "a", "é"])
def test_runs_of_any_length_are_encoded(llama3: Tokenizer, run: str) -> None:
    text = f"x{run * 300_000}y"
    ids = llama3.encode(text, bos=False, eos=False)
    assert llama3.decode(ids) == text
    # As in Meta's code, longer runs are cut every 25,000 characters.
    assert llama3.encode("b c" + "d" * 25_000, bos=False, eos=False) == llama3.encode(
        "b c", bos=False, eos=False
    )[:1] + llama3.encode(" c" + "d" * 24_999, bos=False, eos=False) + llama3.encode(
        "d", bos=False, eos=False
    )


def test_ids_must_fit_the_model(llama3: Tokenizer) -> None:
    llama3.check_fits(128_256)
    llama3.check_fits(128_002)
    with pytest.raises(TokenizerError, match=r"lacks id 128001 .*end_of_text"):
        llama3.check_fits(128_001)
    with pytest.raises(TokenizerError, match=r"128256 pieces .* vocab_size 32000"):
        llama3.check_fits(32_000)
    assert llama3.unnamed_ids(128_256) == ()
    assert llama3.unnamed_ids(128_258) == (128_256, 128_257)
    with pytest.raises(TokenizerError, match="-1 is not a token id"):
        llama3.decode([-1])
    with pytest.raises(TokenizerError, match="128256 is not a token id"):
        llama3.piece(128_256)
    with pytest.raises(TokenizerError, match="byte-level BPE, which cannot be writ"):
        _ = llama3.model_proto
    with pytest.raises(TokenizerError, match="half of a surrogate"):
        llama3.encode("\ud83d", bos=False, eos=False)


# tokenizer.json


def test_a_json_with_metas_pieces_encodes_as_metas_file(
    llama3: Tokenizer, trained: dict[str, Any]
) -> None:
    ranks = {p: rank for p, rank in ranks_of(llama3).items() if rank < 2000}
    by_byte = {rank: piece for piece, rank in ranks.items() if len(piece) == 1}
    # The characters for bytes, in the order of Meta's ranks, are those of GPT-2.
    import tokenizers

    to_chars = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    spelled = {0xC0 | 1: ""}
    for byte in range(128):
        ((text, _),) = to_chars.pre_tokenize_str(chr(byte))
        spelled[byte] = text
    for byte in range(0x80, 0x100):  # as the second byte, or the first, of a character
        char = bytes([0xC2, byte]) if byte < 0xC0 else bytes([byte, 0x80, 0x80, 0x80])
        for length in range(2, 5):
            try:
                text = char[:length].decode()
            except UnicodeDecodeError:
                continue
            ((chars, _),) = to_chars.pre_tokenize_str(text)
            spelled[byte] = chars[1] if byte < 0xC0 else chars[0]
    # The other bytes never occur in UTF-8; GPT-2 represents them by themselves.
    spelled = {b: spelled.get(b) or chr(b) for b in range(256)}
    vocab = {"".join(spelled[b] for b in p): rank for p, rank in ranks.items()}
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        if len(piece) > 1:
            lower = {p: r for p, r in ranks.items() if r < ranks[piece]}
            left, right = merged(piece, lower)
            merges.append(["".join(spelled[b] for b in part) for part in (left, right)])
    described = {
        **trained,
        "model": {**trained["model"], "vocab": vocab, "merges": merges}
        | {"ignore_merges": True},
        "added_tokens": added(2000, LLAMA3_SPECIAL),
    }
    actual, expected = opened(described), encoding(ranks)
    assert len(by_byte) == 256
    assert (actual.bos_id, actual.vocab_size) == (2000, 2256)
    for text in TEXTS:
        ids = expected.encode_ordinary(text)
        assert actual.encode(text, bos=False, eos=False) == ids
        assert actual.decode(ids) == text


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that the merges of lower ranks leave."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@given(text=st.text(max_size=60), cuts=CUTS)
@example(text="<|eot_id|><think>", cuts=[])
def test_a_trained_json_encodes_as_tokenizers_does(
    trained: dict[str, Any], text: str, cuts: list[int]
) -> None:
    ours, theirs = both(json.dumps(trained))
    ids = ours.encode(text, bos=False, eos=False)
    # There is no token 411; tokenizers numbers the next by its position in the file.
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ids == [412 if id == 411 else id for id in expected]
    assert ours.decode(ids) == streamed(ours, ids, cuts) == text


@functools.cache
def both(text: str) -> tuple[Tokenizer, Any]:
    """A tokenizer.json opened by us, and by tokenizers without special tokens."""
    import tokenizers

    theirs = tokenizers.Tokenizer.from_str(text)
    theirs.encode_special_tokens = True
    return Tokenizer(text.encode()), theirs


def test_without_llama_3s_tokens_a_json_has_no_special_ids(
    trained: dict[str, Any],
) -> None:
    tokenizer = opened(trained | {"added_tokens": added(400, ("<|endoftext|>",))})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (-1, -1, ())
    ids = tokenizer.encode("tea", bos=True, eos=True)
    assert ids == tokenizer.encode("tea", bos=False, eos=False)
    ends = tokenizer.replace_settings(eos_id=400)
    assert ends.encode("tea", bos=True, eos=True) == [*ids, 400]
    assert ends.end_ids == (400,)


def test_text_is_never_a_special_token_of_the_vocabulary(
    trained: dict[str, Any],
) -> None:
    model = trained["model"]
    first = next(pair for pair in model["merges"] if "".join(pair).isascii())
    name = "".join(first)
    tokens = [*trained["added_tokens"], *added(model["vocab"][name], (name,))]
    tokenizer = opened(trained | {"added_tokens": tokens})
    text = opened(trained).decode([model["vocab"][name]])
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert ids == [model["vocab"][part] for part in first]
    assert tokenizer.decode(ids) == text


def test_ids_of_a_json_are_named_hidden_or_holes(trained: dict[str, Any]) -> None:
    tokenizer = opened(trained)
    assert (tokenizer.vocab_size, tokenizer.file_name) == (413, "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (400, 401)
    assert tokenizer.unnamed_ids(412) == (411,)
    assert tokenizer.unnamed_ids(415) == (411, 413, 414)
    ids = tokenizer.encode("hé", bos=True, eos=True)
    ids.insert(2, 412)
    assert tokenizer.decode(ids) == "h<think>é"
    assert tokenizer.piece(412) == "<think>"
    more = Tokenizer(
        tokenizer.contents, settings=special_tokens({412: "<think>", 414: "<|x|>"})
    )
    assert dict(more.added_tokens) == {414: "<|x|>"}
    assert more.decode([414, *ids]) == "h<think>é"  # special tokens are invisible
    with pytest.raises(TokenizerError, match=r"'<\|x\|>' has id 412, which is '<thi"):
        Tokenizer(tokenizer.contents, settings=special_tokens({412: "<|x|>"}))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"model": {"type": "WordPiece", "vocab": {}}},
            "model WordPiece .* not supported",
        ),
        ({"decoder": None}, "model BPE and decoder None"),
        ({"decoder": {"type": "Metaspace"}}, "decoder Metaspace"),
        ({"model": None}, "without a vocabulary"),
        ({"added_tokens": [{"id": 400}]}, "damaged one"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "a space"),
    ],
)
def test_a_json_of_another_kind_is_refused(
    trained: dict[str, Any], change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        opened(trained | change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix '</w>'"),
        ({"vocab": {"a": 0, "b": 1}, "merges": []}, "no piece for the byte 0x00"),
        ({"vocab": {"漢": 0}, "merges": []}, "damaged one"),
        ({"vocab": {"a": 99_999_999}, "merges": []}, "no piece for the byte"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    trained: dict[str, Any], change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TokenizerError, match=complaint):
        opened(trained | {"model": trained["model"] | change})


def test_ids_far_apart_are_refused(trained: dict[str, Any]) -> None:
    tokens = [*trained["added_tokens"], *added(4_000_000_000, ("<far>",))]
    with pytest.raises(TokenizerError, match="ids up to 4000000000, but names"):
        opened(trained | {"added_tokens": tokens})


# tokenizer.json of a SentencePiece model

PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
METASPACE = {
    "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
}  # fmt: skip


@functools.cache
def small_model() -> bytes:
    """A SentencePiece model like Llama's, with 320 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["once upon a time in the  sun", "ünder   the sea"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


def json_of(model_proto: bytes) -> dict[str, Any]:
    """A SentencePiece model as the tokenizer.json of Hugging Face."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    texts = [sp.id_to_piece(id) for id in range(sp.vocab_size())]
    ids = {text: id for id, text in enumerate(texts)}
    normal = {text for id, text in enumerate(texts) if id > 2 and not sp.is_byte(id)}
    merges = [
        (text[:cut], text[cut:])
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]

    def order(pair: tuple[str, str]) -> tuple[float, int, int]:
        return -sp.get_score(ids["".join(pair)]), ids[pair[0]], ids[pair[1]]

    return {
        "added_tokens": added(0, ("<unk>", "<s>", "</s>")),
        "normalizer": PREPEND,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True,
            "byte_fallback": True, "vocab": ids,
            "merges": [" ".join(pair) for pair in sorted(merges, key=order)],
        },
    }  # fmt: skip


@given(text=st.text(max_size=40))
@example(text="once upon  a time, the end. <s> <0x41>\n\t🦙")
def test_a_json_with_the_pieces_of_a_model_encodes_alike(text: str) -> None:
    expected = Tokenizer(small_model())
    # Metaspace adds no space to text that begins with one.
    for newer in (False,) if text.startswith((" ", "▁")) else (False, True):
        actual = small_json(newer)
        ids = expected.encode(text, bos=True, eos=True)
        assert actual.encode(text, bos=True, eos=True) == ids
        assert actual.decode(ids) == expected.decode(ids)
        assert actual.encode_infilling(text) == expected.encode_infilling(text)


@functools.cache
def small_json(newer: bool) -> Tokenizer:
    described = json_of(small_model())
    if newer:
        described |= {"normalizer": None, "pre_tokenizer": METASPACE}
        pairs = [merge.split(" ") for merge in described["model"]["merges"]]
        described["model"]["merges"] = pairs
    return opened(described)


def test_llama2s_json_equals_llama2s_model(llama2_tokenizer: Tokenizer) -> None:
    described = json_of(llama2_tokenizer.contents)
    described["added_tokens"] += added(32_000, ("<|im_start|>", "<|im_end|>"))
    actual = opened(described)
    assert actual.added_tokens == {32_000: "<|im_start|>", 32_001: "<|im_end|>"}
    assert (actual.bos_id, actual.eos_id, actual.vocab_size) == (1, 2, 32_000)
    # Runs of spaces have equal scores, so their merges are interleaved.
    for text in (*TEXTS, *(f"a{' ' * n}b" for n in range(2, 50))):
        ids = llama2_tokenizer.encode(text, bos=True, eos=True)
        assert actual.encode(text, bos=True, eos=True) == ids
        assert actual.decode(ids) == llama2_tokenizer.decode(ids)
    made = Tokenizer(actual.model_proto)
    assert (made.file_name, made.contents) == ("tokenizer.model", actual.model_proto)
    assert made.encode(TEXTS[0], bos=True, eos=True) == actual.encode(
        TEXTS[0], bos=True, eos=True
    )
    with pytest.raises(TokenizerError, match=r"'x' has id 32001, which is '<\|im_e"):
        Tokenizer(actual.contents, settings=special_tokens({32_001: "x"}))
    described["model"]["merges"] *= 2
    with pytest.raises(TokenizerError, match="not in the order of scores"):
        opened(described)


def test_a_json_that_scores_cannot_express_is_refused() -> None:
    good = json_of(small_model())
    merges, vocab = good["model"]["merges"], good["model"]["vocab"]
    first = "".join(merges[0].split(" "))
    for change, complaint in (
        ({"merges": merges[1:]}, "lack 1 pairs"),
        ({"merges": [*merges, "l q"]}, "not like Llama's"),
        ({"merges": [*merges[1:], "l"]}, "not like Llama's"),
        ({"ignore_merges": True}, "ignore_merges True"),
        ({"vocab": {**vocab, "zz": len(vocab) + 1}}, "no piece, or two"),
        ({"vocab": {k: i for k, i in vocab.items() if k != first}}, "no piece, or two"),
        ({"vocab": {}}, "no piece <"),
    ):
        with pytest.raises(TokenizerError, match=complaint):
            opened(good | {"model": good["model"] | change})
    for change in (
        {"normalizer": None},
        {"pre_tokenizer": METASPACE},
        {"normalizer": None, "pre_tokenizer": {**METASPACE, "split": True}},
        {"normalizer": {"type": "NFC"}},
    ):
        with pytest.raises(TokenizerError, match="handling of spaces differs"):
            opened(good | change)


# Chat


def test_a_chat_with_a_byte_level_tokenizer_stops_streams_and_names_its_tokens(
    trained: dict[str, Any],
) -> None:
    config = TINY.replace(vocab_size=416)
    tokenizer = opened(trained)
    loaded = Loaded(Llama(config, Runtime()), random_params(config), tokenizer)
    dialog: list[Message] = [{"role": "user", "content": "你好?"}]
    style = default_format(tokenizer)
    assert style.name == "llama3"
    options: Any = {"max_new_tokens": 24, "sampling": Sampling(seed=3)}
    (answer,) = chat_completion(loaded, [dialog], logprobs=2, **options)
    assert answer.prompt_ids == tuple(style.encode(tokenizer, dialog))
    assert answer.text == tokenizer.decode(answer.token_ids)
    assert not {411, 413, 414, 415} & set(answer.token_ids)
    third = answer.token_ids[2]
    options["stop_ids"] = (third,)
    deltas = list(stream(loaded, [Request(answer.prompt_ids, **options)]))
    ids = answer.token_ids[: answer.token_ids.index(third)]
    assert sum((delta.token_ids for delta in deltas), ()) == ids
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids)


# Damage, absence, storage


@settings(max_examples=12, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_damaged_ranks_are_refused_or_read(
    llama3: Tokenizer, data: st.DataObject
) -> None:
    contents = bytearray(llama3.contents)
    at = data.draw(st.integers(0, len(contents) - 1))
    if data.draw(st.booleans()):
        del contents[at : at + data.draw(st.integers(1, 1 << 20))]
    else:
        contents[at] = data.draw(st.integers(0, 255))
    try:
        tokenizer = Tokenizer(bytes(contents))
    except LlamaJaxError as error:
        assert str(error).startswith("tokenizer: ")  # noqa: PT017
    else:
        assert tokenizer.vocab_size == 128_256


@given(data=st.data(), spm=st.booleans())
def test_damaged_json_is_refused_or_read(
    trained: dict[str, Any], data: st.DataObject, spm: bool
) -> None:
    described = json_of(small_model()) if spm else trained
    text = json.dumps(described)
    if data.draw(st.booleans()):
        at = data.draw(st.integers(1, len(text) - 1))
        end = at + data.draw(st.integers(1, 50))
        text = text[:at] + data.draw(st.text(max_size=3)) + text[end:]
    else:
        text = json.dumps(damaged(described, data))
    try:
        tokenizer = Tokenizer(text.encode())
    except LlamaJaxError as error:
        assert str(error).startswith("tokenizer: ")  # noqa: PT017
    else:
        ids = tokenizer.encode("the sun", bos=True, eos=True)
        assert "sun" in tokenizer.decode(ids)


def damaged(described: Any, data: st.DataObject) -> Any:
    """A copy with one value removed or replaced."""
    if (
        not isinstance(described, dict | list)
        or not described
        or not data.draw(st.integers(0, 4))
    ):
        junk: Any = [None, True, -1, 1 << 40, "x", [], {}, [1], {"type": "BPE"}]
        return data.draw(st.sampled_from(junk))
    if isinstance(described, list):
        at = data.draw(st.integers(0, len(described) - 1))
        new = damaged(described[at], data)
        return [*described[:at], new, *described[at + 1 :]]
    key = data.draw(st.sampled_from(sorted(described)))
    if data.draw(st.integers(0, 3)) == 0:
        return {k: value for k, value in described.items() if k != key}
    return {**described, key: damaged(described[key], data)}


def test_files_of_no_known_kind_are_refused(tmp_path: pathlib.Path) -> None:
    for name, contents, complaint in (
        ("config.json", b'{"vocab_size": 3}', "without a vocabulary"),
        ("cut.json", b'{"model": {', "is not JSON"),
        ("deep.json", b'{"a":' * 100_000, "is not JSON"),
        ("short.model", b"IQ== 0\nIg== 1\n", "has 2 pieces, but Llama 3's has 128000"),
        ("gap.model", b"IQ== 0\nIg== 2\n", "line 2 is not the piece of rank 1"),
        ("twice.model", b"IQ== 0\nIQ== 1\n", "line 2 is not"),
        ("text.model", b"IQ== 0\n\xff 1\n", "line 2 is not"),
    ):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(TokenizerError, match=rf"{name}: .*{complaint}"):
            Tokenizer.from_file(tmp_path / name)


@pytest.mark.parametrize("package", ["tiktoken", "tokenizers"])
def test_a_missing_package_is_named_with_its_install_command(
    assets: pathlib.Path,
    trained: dict[str, Any],
    package: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    contents = json.dumps(trained).encode()
    if package == "tiktoken":
        contents = (assets / "tokenizers" / "llama3.model").read_bytes()
    with pytest.raises(TokenizerError, match=rf'{package}; run pip .*"llama-jax\[lla'):
        Tokenizer(contents)


def test_any_tokenizer_is_saved_with_the_weights(
    llama3: Tokenizer, trained: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    for number, tokenizer in enumerate(
        (llama3, opened(trained), small_json(True), tiny_tokenizer())
    ):
        folder = tmp_path / str(number)
        save_params(folder, random_params(TINY), TINY, tokenizer=tokenizer)
        actual = read_tokenizer(folder)
        assert actual is not None
        assert actual.contents == tokenizer.contents
        assert actual.encode("Tea?", bos=True, eos=True) == tokenizer.encode(
            "Tea?", bos=True, eos=True
        )
        assert {p.name for p in folder.iterdir()} - {"text_settings.json"} == {
            "config.json", "params", tokenizer.file_name,
        }  # fmt: skip
