"""Checkpoints and tokenizers of llama2.c."""

import itertools
import pathlib
import random
import struct

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from support.foreign import (
    TINY,
    meta_tensors,
    ours_from_meta,
    write_llama2c,
    write_llama2c_tokenizer,
)

from llama_jax.conversion.llama2c import read_llama2c
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.errors import LlamaJaxError, TokenizerError
from llama_jax.text.tokenizer import Tokenizer

GQA = TINY.replace(num_kv_heads=2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_seq_len", [None, 16])
def test_weights_are_mapped_exactly(
    tmp_path: pathlib.Path, tied: bool, max_seq_len: int | None
) -> None:
    config = GQA.replace(tied_embeddings=tied)
    tensors = meta_tensors(config)
    if tied:
        del tensors["output.weight"]
    path = write_llama2c(tmp_path / "x.bin", config, tensors)
    source = read_llama2c(path, max_seq_len=max_seq_len)
    assert source.config == config.replace(max_seq_len=max_seq_len or 64)
    leaves = source.leaves()
    expected = ours_from_meta(config, tensors)
    assert leaves.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(leaves[name].read(), array, err_msg=name)


@pytest.mark.parametrize("change", [-1, 1, -5000])
def test_a_file_of_the_wrong_size_is_refused(
    tmp_path: pathlib.Path, change: int
) -> None:
    path = write_llama2c(tmp_path / "x.bin", GQA, meta_tensors(GQA))
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(LlamaJaxError, match="incomplete or damaged"):
        read_llama2c(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\x03\x04" + b"\0" * 40, "PyTorch"),
        (b"GGUF" + b"\0" * 40, "GGUF"),
        (struct.pack("<7i", 0x616B3432, 2, 0, 0, 0, 0, 0), "version 2"),
        (b"\0" * 28, "begins with zeros only"),
        (struct.pack("<7i", 32, 96, -2, 8, 8, 272, 64), "num_layers is -2"),
        (struct.pack("<7i", 32, 96, 2, 8, 3, 272, 64), "num_kv_heads"),
        (struct.pack("<7i", 32, 96, 2**31 - 1, 8, 8, 272, 64), "incomplete"),
        (b"abc", "too short"),
        (b"", "is empty"),
    ],
)
def test_a_file_of_another_kind_is_refused(
    tmp_path: pathlib.Path, start: bytes, message: str
) -> None:
    (tmp_path / "x.bin").write_bytes(start)
    with pytest.raises(LlamaJaxError, match=message):
        read_llama2c(tmp_path / "x.bin")


def test_damaged_checkpoints_are_refused_or_read(tmp_path: pathlib.Path) -> None:
    path = write_llama2c(tmp_path / "x.bin", GQA, meta_tensors(GQA))
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 4))):
            data[rng.randrange(28)] = rng.choice((0, 1, 127, 128, 255))
        path.write_bytes(data)
        try:
            for leaf in read_llama2c(path).leaves().values():
                leaf.read()
        except LlamaJaxError:
            refused += 1
    assert refused > 125


def test_the_tiny_tokenizer_is_a_sentencepiece_model(tmp_path: pathlib.Path) -> None:
    model = read_llama2c_tokenizer(write_llama2c_tokenizer(tmp_path / "tokenizer.bin"))
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert sp.vocab_size() == 272
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (0, 1, 2, -1)
    assert [sp.id_to_piece(id) for id in (0, 1, 2, 3)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
    ]
    assert sp.is_unknown(0)
    assert all(map(sp.is_control, (1, 2)))
    assert all(map(sp.is_byte, range(3, 259)))
    assert not any(map(sp.is_byte, range(259, 272)))
    assert sp.id_to_piece(sp.encode("the")) == ["▁the"]
    assert sp.decode(sp.encode("the tea  is hot\n é")) == "the tea  is hot\n é"


@pytest.fixture(scope="module")
def rebuilt(
    llama2_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> sentencepiece.SentencePieceProcessor:
    """Return Llama 2's tokenizer, read back from llama2.c's format."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=llama2_tokenizer.model_proto)
    content = b""
    for id in range(sp.vocab_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(id, sp.id_to_piece(id))
        encoded = piece.replace("▁", " ").encode()
        content += struct.pack("<fi", sp.get_score(id), len(encoded)) + encoded
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin"
    path.write_bytes(struct.pack("<i", 48) + content)
    return sentencepiece.SentencePieceProcessor(
        model_proto=read_llama2c_tokenizer(path)
    )


@given(text=st.text(max_size=60))
@example(text="Once upon a time,  there was\n\ta dog. 12345 naïve 🐕 ▁ <s> <0x41>")
@example(text=" ")
@example(text="")
def test_a_rebuilt_tokenizer_encodes_like_the_original(
    llama2_tokenizer: Tokenizer,
    rebuilt: sentencepiece.SentencePieceProcessor,
    text: str,
) -> None:
    expected = llama2_tokenizer.encode(text, bos=False, eos=False)
    assert rebuilt.encode(text) == expected
    assert rebuilt.decode(expected) == llama2_tokenizer.decode(expected)


def test_the_published_512_pieces_survive(assets: pathlib.Path) -> None:
    path = assets / "tokenizers" / "tok512.bin"
    tokenizer = Tokenizer(read_llama2c_tokenizer(path))
    assert tokenizer.vocab_size == 512
    story = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer.encode(story, bos=False, eos=False)
    assert tokenizer.decode(ids) == story
    assert ids == merge_greedily(path.read_bytes(), story)


def merge_greedily(data: bytes, text: str) -> list[int]:
    """Encode as llama2.c does: join the neighbors whose joined piece scores best."""
    pieces: dict[bytes, tuple[float, int]] = {}
    offset = 4
    while offset < len(data):
        score, size = struct.unpack_from("<fi", data, offset)
        piece = data[offset + 8 : offset + 8 + size]
        pieces.setdefault(piece, (score, len(pieces)))
        offset += 8 + size
    parts = [character.encode() for character in " " + text]
    while True:
        joined = [left + right for left, right in itertools.pairwise(parts)]
        candidates = [(pieces[j][0], -i) for i, j in enumerate(joined) if j in pieces]
        if not candidates:
            return [pieces[part][1] for part in parts]
        best = -max(candidates)[1]
        parts[best : best + 2] = [joined[best]]


def test_damaged_tokenizers_are_refused_or_read(tmp_path: pathlib.Path) -> None:
    path = write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for size in [*range(0, 60), *range(len(whole) - 8, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(TokenizerError):
            Tokenizer(read_llama2c_tokenizer(path))
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 4))):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255))
        path.write_bytes(data)
        try:
            Tokenizer(read_llama2c_tokenizer(path)).encode(
                "the tea", bos=True, eos=True
            )
        except TokenizerError:
            refused += 1
    assert 25 < refused < 150
