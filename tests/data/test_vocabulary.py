"""Training of tokenizers: the settings of Llama's own file, and text that survives."""

import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.vocabulary import short_lines, train_model, train_tokenizer
from llama_jax.errors import CheckpointError, DataError
from llama_jax.text.tokenizer import Tokenizer

TEXT = [
    f"The {a} {b} of {i * 37} years went  to the {b}, and said: \"{a}!\""
    for i, (a, b) in enumerate(
        (a, b)
        for a in ("small", "red", "old", "merry", "clever", "naïve")
        for b in ("fox", "house", "river", "child", "garden", "teacher")
    )
]  # fmt: skip
ABOUT_THIS_RUN = {
    "input", "model_prefix", "vocab_size", "num_threads", "accept_language",
    "input_format",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "a.txt").write_text("\n".join(TEXT))
    found = train_tokenizer([folder / "a.txt"], folder / "new.model", vocab_size=350)
    assert Tokenizer.from_file(folder / "new.model").contents == found.contents
    return found


def specs(contents: bytes) -> dict[str, dict[str, Any]]:
    """Settings of training and normalization in a model's file."""
    pytest.importorskip("google.protobuf")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = proto.ModelProto()
    model.ParseFromString(contents)
    return {
        name: {
            field.name: getattr(spec, field.name)
            for field in spec.DESCRIPTOR.fields
            if not field.is_extension and field.name not in ABOUT_THIS_RUN
        }
        for name, spec in (
            ("trainer", model.trainer_spec), ("normalizer", model.normalizer_spec)
        )
    }  # fmt: skip


def test_settings_are_those_of_llamas_own_file(
    trained: Tokenizer, assets: pathlib.Path
) -> None:
    theirs = specs((assets / "tokenizers" / "llama2.model").read_bytes())
    ours = specs(trained.contents)
    assert ours["normalizer"] == theirs["normalizer"]
    different = {
        name: (value, theirs["trainer"][name])
        for name, value in ours["trainer"].items()
        if value != theirs["trainer"][name]
    }
    assert different == {}


def test_pieces_have_the_layout_of_llamas(trained: Tokenizer) -> None:
    assert trained.vocab_size == 350
    assert (trained.unk_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    assert trained.pad_id == -1
    assert [trained.piece(id) for id in (0, 1, 2, 3, 258)] == [
        "<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"
    ]  # fmt: skip
    pieces = [trained.piece(id) for id in range(259, 350)]
    assert not [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)]


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_survives(trained: Tokenizer, text: str) -> None:
    inner = trained.encode_infilling(text)
    assert trained.decode_infilling(inner) == text
    assert trained.unk_id not in inner


def test_training_learns_words_and_is_repeatable(trained: Tokenizer) -> None:
    ids = trained.encode(TEXT[0], bos=False, eos=False)
    assert len(ids) < 0.7 * len(TEXT[0])
    assert train_model(TEXT, vocab_size=350) == trained.contents


def test_all_shapes_of_records_are_learnt_from(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "%s", "response": "zzzz"}\n' % ("abcd " * 50)
        + '{"instruction": "qqqq", "input": "%s", "output": "x"}\n' % ("efgh " * 50)
    )
    tokenizer = train_tokenizer([path], tmp_path / "new.model", vocab_size=285)
    for word in ("▁abcd", "▁efgh", "z", "q"):
        assert tokenizer.piece_id(word) is not None


@given(line=st.text(max_size=40), times=st.integers(1, 400))
def test_long_lines_are_cut_and_nothing_is_lost(line: str, times: int) -> None:
    whole = (line * times).encode(errors="replace")
    parts = [part.encode() for part in short_lines(line * times)]
    assert all(0 < len(part) <= 4192 for part in parts)
    assert b"".join(parts).strip() == whole.strip()


def test_text_that_does_not_fit_the_vocabulary_is_refused(
    tmp_path: pathlib.Path,
) -> None:
    with pytest.raises(DataError, match="no text in the data"):
        train_model(["", "\n"], vocab_size=300)
    for size in (10, 100_000):
        with pytest.raises(DataError, match=f"{size} pieces cannot be trained") as bad:
            train_model(TEXT, vocab_size=size)
        assert "\n" not in str(bad.value)
    taken = tmp_path / "tokenizer.model"
    taken.write_text("mine")
    source = tmp_path / "a.txt"
    source.write_text("\n".join(TEXT))
    with pytest.raises(CheckpointError, match="already exists"):
        train_tokenizer([source], taken, vocab_size=350)
    assert taken.read_text() == "mine"
