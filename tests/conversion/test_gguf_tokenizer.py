"""What GGUF files say about text.

Each fact, for SentencePiece and byte-level tokenizers, in files of other programs (by
llama.cpp's keys), and through our own files and back. These have no test for byte-level
tokenizers: `add_space_prefix`, since they add no space, and infilling, which llama_jax
does with Code Llama's tokens only.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.foreign_gguf import BYTES, GQA, make, metadata, renamed, write_foreign
from support.tokenizers import byte_level_json, byte_level_tokenizer

from llama_jax.checkpoint.lazy_leaf import lazy_leaves
from llama_jax.conversion.gguf import read_gguf, write_gguf
from llama_jax.conversion.gguf_byte_level import SPLIT_RULES
from llama_jax.conversion.gguf_header import MetadataValue
from llama_jax.conversion.gguf_text_settings import SETTINGS
from llama_jax.conversion.gguf_tokenizer import tokenizer_metadata
from llama_jax.conversion.source import LazyModel, Source
from llama_jax.errors import ConfigError, LlamaJaxError, TokenizerError
from llama_jax.text.byte_level_bpe import LLAMA3_SPECIAL
from llama_jax.text.byte_level_json import GPT2_PATTERN
from llama_jax.text.settings import AddedToken, TextSettings
from llama_jax.text.tokenizer import Tokenizer

PIECES = ["<unk>", "<s>", "</s>", *BYTES, "▁", "t", "e", "▁t"]
ADDED = {
    263: AddedToken("[PAD]"),
    264: AddedToken("<|im_start|>"),
    265: AddedToken("<|im_end|>"),
    266: AddedToken("zorblat", special=False),
}
SENTENCEPIECE = {
    "model": "llama",
    "tokens": [*PIECES, *(token.text for token in ADDED.values())],
    "scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0] + [-1000.0] * 4,
    "token_type": [2, 3, 3] + [6] * 256 + [1] * 4 + [3, 3, 3, 4],
}


def byte_level() -> dict[str, Any]:
    """The fields of a byte-level tokenizer, in the order of llama.cpp's converter."""
    model = byte_level_json()["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*texts, "zorblat"],
        "token_type": [3] * 3 + [1] * (len(texts) - 3) + [4],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "sentencepiece": lambda: SENTENCEPIECE,
    "byte-level": byte_level,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def source(folder: pathlib.Path, fields: dict[str, Any], **other: Any) -> Source:
    """A file with these fields, written by gguf; None leaves one out.

    Args:
      folder: to write to.
      fields: without `tokenizer.ggml.`.
      **other: fields with whole keys, with `__` for a dot.
    """
    whole = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    whole |= {key.replace("__", "."): value for key, value in other.items()}
    config = GQA.replace(vocab_size=len(fields["tokens"]), num_layers=1)
    tensors = renamed(make(config)[0])
    present = {key: value for key, value in whole.items() if value is not None}
    path = write_foreign(folder / "x.gguf", metadata(config) | present, tensors)
    return read_gguf(path)


def opened(folder: pathlib.Path, fields: dict[str, Any], **other: Any) -> Tokenizer:
    """The tokenizer of `source`."""
    tokenizer, _ = source(folder, fields, **other).find_tokenizer()
    return tokenizer


def written(folder: pathlib.Path, tokenizer: Tokenizer, vocab_size: int) -> Any:
    """The tokenizer of a file that we write."""
    config = GQA.replace(vocab_size=vocab_size, num_layers=1)
    path = folder / "ours.gguf"
    write_gguf(
        path,
        LazyModel(config, lazy_leaves(make(config)[1]), tokenizer),
        dtype="float32",
    )
    return read_gguf(path).find_tokenizer()[0]


# Files of other programs


@every_kind
def test_any_special_id_may_be_an_added_token(
    tmp_path: pathlib.Path, kind: str
) -> None:
    fields = KINDS[kind]()
    last = fields["tokens"].index("<|im_end|>")
    ids = {"bos_token_id": last - 1, "eos_token_id": last, "padding_token_id": last - 2}
    tokenizer = opened(tmp_path, fields | ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (last - 1, last)
    assert tokenizer.pad_id == last - 2
    assert tokenizer.end_ids[0] == last
    assert tokenizer.encode("te", bos=True, eos=True)[:: len("te") + 1][0] == last - 1
    assert tokenizer.decode([last]) in ("", "<|im_end|>")


@every_kind
def test_ends_are_those_of_llama_cpp(tmp_path: pathlib.Path, kind: str) -> None:
    fields = KINDS[kind]()
    start, end = (fields["tokens"].index(f"<|im_{x}|>") for x in ("start", "end"))
    own = 2 if kind == "sentencepiece" else 0  # </s>, <|endoftext|>
    more = {"bos_token_id": 1 if kind == "sentencepiece" else None}
    # Control tokens of known names end answers, as do those of the keys.
    for ids, ends in (
        ({"eos_token_id": own}, [own, end]),
        ({"eos_token_id": end}, [end, own]),
        ({"eos_token_id": own, "eot_token_id": start}, [own, start, end]),
        ({"eos_token_id": own, "eom_token_id": start}, [own, start, end]),
        ({"eos_token_id": own, "unknown_token_id": end}, [own]),
        ({"eos_token_id": own, "padding_token_id": end}, [own]),
        ({"eos_token_id": own, "bos_token_id": end}, [own]),
        ({"eos_token_id": end, "padding_token_id": end}, [end, own]),
    ):
        if kind == "sentencepiece" and "unknown_token_id" in ids:
            continue  # <unk> is a piece
        assert list(opened(tmp_path, fields | more | ids).end_ids) == ends, ids


@pytest.mark.parametrize(
    ("key", "kind"), [("bos", "begin of sequence"), ("padding", "padding")]
)
def test_an_end_that_is_another_special_token_is_left_out_with_a_line(
    tmp_path: pathlib.Path, key: str, kind: str
) -> None:
    end = SENTENCEPIECE["tokens"].index("<|im_start|>")
    fields = SENTENCEPIECE | {"eot_token_id": end}
    file = source(tmp_path, fields)
    assert end in file.find_tokenizer()[0].end_ids
    assert file.text_notes() == ()
    file = source(tmp_path, fields | {f"{key}_token_id": end})
    assert end not in file.find_tokenizer()[0].end_ids
    (note,) = file.text_notes()
    assert note == f"tokenizer.ggml.eot_token_id {end} is left out: it is {kind}"


def test_the_end_of_an_infilling_ends_no_answer(tmp_path: pathlib.Path) -> None:
    names = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    fields = {
        **SENTENCEPIECE,
        "tokens": [*PIECES, *names],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * 8,
    }
    keys = ("fim_pre", "fim_suf", "fim_mid", "eot")
    ids = {f"{key}_token_id": 263 + i for i, key in enumerate(keys)}
    tokenizer = opened(tmp_path, fields | ids)
    assert tokenizer.end_ids == (2,)
    assert tokenizer.infilling == (263, 264, 265, 266)
    again = written(tmp_path, tokenizer, 267)
    assert (again.end_ids, again.infilling) == ((2,), (263, 264, 265, 266))


@every_kind
def test_whether_bos_and_eos_are_added_is_read(
    tmp_path: pathlib.Path, kind: str
) -> None:
    fields = KINDS[kind]()
    default = opened(tmp_path, fields).settings
    assert (default.add_bos, default.add_eos) == (kind == "sentencepiece", False)
    keys = {"add_bos_token": kind != "sentencepiece", "add_eos_token": True}
    changed = opened(tmp_path, fields | keys).settings
    assert (changed.add_bos, changed.add_eos) == tuple(keys.values())
    with pytest.raises(TokenizerError, match=r"add_bos_token is 1; it must be true"):
        opened(tmp_path, fields | {"add_bos_token": 1})


def test_llama_3_adds_bos_if_the_file_does_not_say(tmp_path: pathlib.Path) -> None:
    assert opened(tmp_path, byte_level() | {"pre": "llama-bpe"}).settings.add_bos


@every_kind
def test_templates_and_sampling_are_read(tmp_path: pathlib.Path, kind: str) -> None:
    tokenizer = opened(
        tmp_path,
        KINDS[kind](),
        tokenizer__chat_template="{{ x }}",
        tokenizer__chat_templates=["tool_use"],
        tokenizer__chat_template__tool_use="{{ y }}",
        general__sampling__temp=0.2,
        general__sampling__top_k=20,
        general__sampling__top_p=0.75,
        general__sampling__min_p=0.0,
        general__sampling__penalty_repeat=1.5,
    )
    assert tokenizer.settings.chat_templates == {
        "default": "{{ x }}",
        "tool_use": "{{ y }}",
    }
    assert tokenizer.settings.sampling == {
        "temperature": 0.2,
        "top_k": 20,
        "top_p": 0.75,
        "min_p": 0.0,
        "repetition_penalty": 1.5,
    }
    for key, value in (
        ("tokenizer__chat_template", 3),
        ("general__sampling__temp", "warm"),
        ("general__sampling__top_p", float("nan")),
    ):
        with pytest.raises(TokenizerError, match=key.replace("__", r"\.")):
            opened(tmp_path, KINDS[kind](), **{key: value})


@every_kind
def test_words_are_no_special_tokens(tmp_path: pathlib.Path, kind: str) -> None:
    tokenizer = opened(tmp_path, KINDS[kind]())
    words = tokenizer.settings.added_tokens.values()
    assert {word.text: word.special for word in words if word.text[0] != "["} == {
        **{"<|im_start|>": True, "<|im_end|>": True, "zorblat": False},
        **({"<|endoftext|>": True} if kind == "byte-level" else {}),
    }


def test_user_defined_pieces_have_spaces_in_files(tmp_path: pathlib.Path) -> None:
    fields = {
        **SENTENCEPIECE,
        "tokens": ["<unk>", "<s>", "</s>", "a  t", *PIECES[3:], *["x", "y", "z"]],
        "token_type": [2, 3, 3, 4] + [6] * 256 + [1] * 7,
    }
    tokenizer = opened(tmp_path, fields)
    assert tokenizer.piece(3) == "a▁▁t"
    assert 3 in tokenizer.encode("ea  te", bos=False, eos=False)
    assert tokenizer_metadata(tokenizer, 267)["tokenizer.ggml.tokens"] == MetadataValue(
        8, fields["tokens"]
    )


# Our own files


FACTS: dict[str, dict[str, Any]] = {
    "eos is an added token": {"eos_id": 265},
    "bos and pad are added tokens": {"bos_id": 264, "pad_id": 263},
    "ends": {"end_ids": (265, 264, 263)},
    "no bos": {"add_bos": False, "add_eos": True},
    "one space": {"prefix_space": "first"},
    "ids that the model lacks": {"pad_id": 500, "end_ids": (500, 265)},
    "templates": {"chat_templates": {"default": "{{ x }}", "rag": "y"}},
    "sampling": {"sampling": {"temperature": 0.7, "presence_penalty": 0.5}},
    "no space": {"prefix_space": "never"},
    "flags of words": {"lstrip": True, "single_word": True},
}


@pytest.mark.parametrize("fact", FACTS)
@every_kind
def test_every_fact_survives(tmp_path: pathlib.Path, kind: str, fact: str) -> None:
    source = byte_level_tokenizer()
    if kind == "sentencepiece":
        read = opened(tmp_path, SENTENCEPIECE)
        source = Tokenizer(read.contents, settings=TextSettings(added_tokens=ADDED))
    changes = FACTS[fact]
    if fact == "flags of words":
        id, words = source.piece_id("zorblat"), source.settings.added_tokens
        assert id is not None
        changes = {"added_tokens": {**words, id: words[id]._replace(**changes)}}
    tokenizer = source.replace_settings(**changes)
    again = written(tmp_path, tokenizer, 420)
    if fact != "no space":  # that is in the model that is read back
        assert again.settings == tokenizer.settings
    assert again.vocab_size == tokenizer.vocab_size
    for text in ("te te", "te zorblat te zorblate<|im_end|>"):
        assert again.encode_marked(text) == tokenizer.encode_marked(text)
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert again.encode(text, bos=True, eos=True) == ids
        assert again.decode(ids) == tokenizer.decode(ids)


@every_kind
def test_without_our_own_key_llama_cpps_say_the_same(
    tmp_path: pathlib.Path, kind: str
) -> None:
    tokenizer = opened(
        tmp_path,
        KINDS[kind]() | {"add_bos_token": False, "padding_token_id": 0},
        tokenizer__chat_template="{{ x }}",
        general__sampling__temp=0.3,
    )
    size = len(KINDS[kind]()["tokens"])
    fields = tokenizer_metadata(tokenizer, size)
    content = {key: value.content for key, value in fields.items() if key != SETTINGS}
    prefix = "tokenizer.ggml."
    again = opened(
        tmp_path,
        {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)},
        **{k.replace(".", "__"): v for k, v in content.items() if prefix not in k},
    )
    assert again.settings == tokenizer.settings


def test_a_file_that_another_program_changed_is_as_it_says(
    tmp_path: pathlib.Path,
) -> None:
    tokenizer = opened(tmp_path, SENTENCEPIECE).replace_settings(
        chat_templates={"default": "old"}, prefix_space="first", sampling={"top_k": 9}
    )
    fields = {k: v.content for k, v in tokenizer_metadata(tokenizer, 267).items()}
    for change in (
        {"general.sampling.top_k": None},
        {"tokenizer.chat_template": "new"},
        {"tokenizer.chat_template.rag": "new"},
        {"tokenizer.ggml.eos_token_id": 265},
        {"general.sampling.temp": 0.5},
    ):
        config = GQA.replace(vocab_size=267, num_layers=1)
        changed = metadata(config) | fields | change
        changed = {key: value for key, value in changed.items() if value is not None}
        path = write_foreign(tmp_path / "y.gguf", changed, renamed(make(config)[0]))
        actual, _ = read_gguf(path).find_tokenizer()
        assert actual.settings.prefix_space is None, change  # the model's own rule


# Byte-level tokenizers


TEXTS = (
    "Hello WORLD, they'LL pay 12345 for it",
    "  two  spaces\n\n\n\ttab\r\n   end   ",
    "naïve Größe 你好世界 🦙 ½ ÀÉ",
    "",
)


@pytest.mark.parametrize("name", SPLIT_RULES)
def test_every_rule_splits_as_tokenizers_does(
    tmp_path: pathlib.Path, name: str
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    rule = SPLIT_RULES[name]
    tokenizer = opened(tmp_path, byte_level() | {"pre": name})
    parts = tokenizers.pre_tokenizers
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            byte_level_json()["model"]["vocab"],
            [tuple(pair) for pair in byte_level_json()["model"]["merges"]],
            ignore_merges=rule.ignore_merges,
        )
    )
    splits = [
        parts.ByteLevel(add_prefix_space=False)
        if pattern == GPT2_PATTERN
        else parts.Split(tokenizers.Regex(pattern), behavior="isolated")
        for pattern in rule.patterns
    ]
    if rule.patterns[-1] != GPT2_PATTERN:
        splits.append(parts.ByteLevel(add_prefix_space=False, use_regex=False))
    theirs.pre_tokenizer = parts.Sequence(splits)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == theirs.encode(text).ids
        assert tokenizer.decode(ids) == text
    again = written(tmp_path, tokenizer, 401)
    assert [again.encode(text, bos=False, eos=False) for text in TEXTS] == [
        tokenizer.encode(text, bos=False, eos=False) for text in TEXTS
    ]
    assert again.settings == tokenizer.settings


def test_smollms_tokenizer_is_exported_by_its_name(tmp_path: pathlib.Path) -> None:
    tokenizer = byte_level_tokenizer()
    fields = {k: v.content for k, v in tokenizer_metadata(tokenizer, 403).items()}
    expected = byte_level() | {
        "unknown_token_id": 0,
        "padding_token_id": 2,
        "add_bos_token": False,
        "add_eos_token": False,
    }
    expected["tokens"] += ["[PAD401]", "[PAD402]"]
    expected["token_type"] += [5, 5]
    del fields[SETTINGS]
    assert fields == {f"tokenizer.ggml.{key}": value for key, value in expected.items()}
    again = written(tmp_path, tokenizer, 403)
    for text in (*TEXTS, "a zorblat<|im_end|>"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert again.encode(text, bos=True, eos=True) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    assert again.settings == tokenizer.settings
    # Without added tokens in the vocabulary, `tokenizers` would number them at the end.
    vocab = json.loads(again.contents)["model"]["vocab"]
    assert [vocab[f"<|{name}|>"] for name in ("im_start", "im_end")] == [1, 2]


TO_BYTES = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
    "use_regex": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, r"normalizes text \(NFC\)"),
        (
            {"pre_tokenizer": TO_BYTES},
            "splits text by a rule for which llama.cpp has no name",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Whitespace"},
                        TO_BYTES,
                    ],
                }
            },
            "splits text by a rule for which llama.cpp has no name",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_express_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    tokenizer = Tokenizer(json.dumps(byte_level_json() | changes).encode())
    with pytest.raises(ConfigError, match=message):
        tokenizer_metadata(tokenizer, 401)


def test_metas_file_is_exported_as_published(assets: pathlib.Path) -> None:
    pytest.importorskip("tiktoken", reason="needs tiktoken")
    tokenizer = Tokenizer.from_file(assets / "tokenizers" / "llama3.model")
    fields = {k: v.content for k, v in tokenizer_metadata(tokenizer, 128_256).items()}
    actual = {k.removeprefix("tokenizer.ggml."): v for k, v in fields.items()}
    assert (actual["model"], actual["pre"]) == ("gpt2", "llama-bpe")
    # The numbers of tokens and merges in the published tokenizer.json.
    assert len(actual["tokens"]) == 128_256
    assert len(actual["merges"]) == 280_147
    assert actual["tokens"][128_000:] == list(LLAMA3_SPECIAL)
    assert actual["merges"][:4] == ["Ġ Ġ", "Ġ ĠĠĠ", "ĠĠ ĠĠ", "ĠĠĠ Ġ"]
    assert (actual["bos_token_id"], actual["eos_token_id"]) == (128_000, 128_001)


# Damage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": None}, "does not name the rule .* known are llama-bpe, .*--tokenizer"),
        ({"pre": "default"}, "does not name the rule"),
        ({"pre": "kimi-k2"}, "by the rule 'kimi-k2', which is not known here"),
        ({"merges": None}, "damaged or of different lengths"),
        ({"merges": ["a"]}, "damaged or of different lengths"),
        ({"merges": ["t zzz"]}, "not a byte-level tokenizer.json, or a damaged one"),
        ({"token_type": [1]}, "damaged or of different lengths"),
        ({"tokens": ["a"] * 401}, "damaged or of different lengths"),
        ({"tokens": [f"b{i}" for i in range(401)]}, "no piece for the byte 0x00|damag"),
        (
            {"eos_token_id": 401},
            "eos_token_id is 401, which is not a token id; ids are",
        ),
        ({"eot_token_id": 401}, "eot_token_id is 401, which is not a token id"),
    ],
)
def test_damaged_byte_level_tokenizers_are_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message) as error:
        opened(tmp_path, byte_level() | changes)
    assert "x.gguf" in str(error.value)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 31), (1 << 31) - 1),
    st.floats(width=32),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.lists(st.sampled_from(["a", "b c", ""]), min_size=1, max_size=3),
)
KEYS = (
    "model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id",
    "eos_token_id", "eot_token_id", "unknown_token_id", "add_bos_token",
    "add_space_prefix", "padding_token_id",
)  # fmt: skip


@settings(max_examples=100)
@given(
    kind=st.sampled_from(list(KINDS)),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3),
    other=st.dictionaries(
        st.sampled_from(
            ["tokenizer__chat_template", "general__sampling__temp",
             "llama_jax__text_settings"]
        ),
        st.one_of(VALUES, st.just('{"pieces": 3}'), st.just('{"pieces": 3, "x": 1}')),
        max_size=2,
    ),
)  # fmt: skip
def test_any_metadata_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    changes: dict[str, Any],
    other: dict[str, Any],
) -> None:
    fields = KINDS[kind]()
    size = len(fields["tokens"])
    whole = {f"tokenizer.ggml.{k}": v for k, v in (fields | changes).items()}
    whole |= {key.replace("__", "."): value for key, value in other.items()}
    config = GQA.replace(vocab_size=size, num_layers=1)
    present = {key: value for key, value in whole.items() if value is not None}
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    write_foreign(path, metadata(config) | present, renamed(make(config)[0]))
    try:
        tokenizer, _ = read_gguf(path).find_tokenizer()
    except LlamaJaxError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        ids = tokenizer.encode("te", bos=True, eos=True)
        assert max(ids) < size
        assert isinstance(tokenizer.decode(ids), str)
