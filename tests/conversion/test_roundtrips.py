"""Conversions to every format and back: bytes, dtype and name of every tensor."""

import pathlib
import struct
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.foreign import (
    TINY,
    meta_tensors,
    write_llama2c,
    write_meta,
    write_tokenizer_model,
)
from support.models import random_params

from llama_jax.checkpoint.model_folder import save_params
from llama_jax.config import LlamaConfig
from llama_jax.conversion import convert, open_source
from llama_jax.conversion.llama2c_tokenizer import (
    pack_llama2c_tokenizer,
    read_llama2c_tokenizer,
)
from llama_jax.conversion.pth_reader import read_pth
from llama_jax.conversion.safetensors import read_safetensors
from llama_jax.errors import ConfigError, TokenizerError
from llama_jax.text.sentencepiece_proto import model_of_pieces, pieces_of_model
from llama_jax.text.tokenizer import Tokenizer

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
GROUPED = TINY.replace(num_kv_heads=8, vocab_size=288, mlp_dim=96)


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    """Draw small models that every format can store: grouped or not, odd sizes."""
    kv, group, half = (draw(st.integers(1, 3)) for _ in range(3))
    width = kv * group * 2 * half
    return TINY.replace(
        num_layers=draw(st.integers(1, 2)),
        num_heads=kv * group,
        num_kv_heads=kv,
        head_dim=2 * half,
        embed_dim=width,
        mlp_dim=8 * width // 3 + draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(272, 277)),
        tied_embeddings=draw(st.booleans()),
    )


def assert_same_bits(
    actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name


def read_ranks(folder: pathlib.Path) -> list[dict[str, np.ndarray]]:
    files = sorted(folder.glob("consolidated.*.pth"))
    ranks = [read_pth(file) for file in files]
    for rank in ranks:
        rank.pop("rope.freqs", None)
    return ranks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_meta_to_ours_and_back_is_bit_identical(
    tmp_path: pathlib.Path, ranks: int, dtype: Any
) -> None:
    tensors = meta_tensors(GROUPED, dtype=dtype)
    source = write_meta(tmp_path / "meta", GROUPED, tensors, ranks=ranks)
    tokenizer = write_tokenizer_model(tmp_path)
    convert(source, tmp_path / "ours", max_seq_len=64)
    back = tmp_path / "back"
    convert(tmp_path / "ours", back, target_format="meta", ranks=ranks)
    expected = read_ranks(source)
    actual = read_ranks(back)
    assert len(actual) == len(expected) == ranks
    for rank, expected_rank in zip(actual, expected, strict=True):
        assert_same_bits(rank, expected_rank)
    # Meta's code needs a piece for each row of the embedding.
    written = (back / "tokenizer.model").read_bytes()
    assert written.startswith(tokenizer.read_bytes())
    assert Tokenizer(written).vocab_size == GROUPED.vocab_size
    assert open_source(back, max_seq_len=64).config == GROUPED


@pytest.mark.parametrize("ranks", [(1, 4), (8, 2), (2, 1)])
def test_any_number_of_ranks_converts_to_any_other(
    tmp_path: pathlib.Path, ranks: tuple[int, int]
) -> None:
    write_tokenizer_model(tmp_path)
    tensors = meta_tensors(GROUPED)
    source = write_meta(tmp_path / "a", GROUPED, tensors, ranks=ranks[0])
    convert(source, tmp_path / "b", target_format="meta", ranks=ranks[1], max_seq_len=9)
    expected = write_meta(tmp_path / "c", GROUPED, tensors, ranks=ranks[1])
    for rank, expected_rank in zip(
        read_ranks(tmp_path / "b"), read_ranks(expected), strict=True
    ):
        assert_same_bits(rank, expected_rank)


@settings(max_examples=8)
@given(config=configs(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_hugging_face_to_ours_and_back_is_bit_identical(
    config: LlamaConfig, dtype: Any, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer_model(folder)
        source = write_llama2c(
            folder / "x.bin", config, meta_tensors(config, seed=seed)
        )
        kind = np.dtype(dtype).name
        convert(source, folder / "hf", target_format="hf", dtype=kind)
        convert(folder / "hf", folder / "ours")
        convert(folder / "ours", folder / "back", target_format="hf")
        files = [folder / where / "model.safetensors" for where in ("hf", "back")]
        assert files[0].read_bytes() == files[1].read_bytes()
        tensors = read_safetensors(files[0])
        assert ("lm_head.weight" in tensors) is not config.tied_embeddings
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
        configs = [(folder / w / "config.json").read_text() for w in ("hf", "back")]
        assert configs[0] == configs[1]
        assert open_source(folder / "back").config == config


@settings(max_examples=8)
@given(config=configs(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_meta_to_hugging_face_and_back_is_bit_identical(
    config: LlamaConfig, dtype: Any, seed: int
) -> None:
    config = config.replace(tied_embeddings=False)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer_model(folder)
        tensors = meta_tensors(config, seed=seed, dtype=dtype)
        source = write_meta(folder / "meta", config, tensors)
        convert(source, folder / "hf", target_format="hf", max_seq_len=64)
        convert(folder / "hf", folder / "back", target_format="meta")
        assert_same_bits(read_ranks(folder / "back")[0], read_ranks(source)[0])


@settings(max_examples=8)
@given(config=configs(), seed=st.integers(0, 99))
def test_llama2c_to_ours_and_back_is_bit_identical(
    config: LlamaConfig, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_tokenizer_model(folder)
        tensors = meta_tensors(config, seed=seed)
        source = write_llama2c(folder / "x.bin", config, tensors)
        convert(source, folder / "ours")
        convert(folder / "ours", folder / "new" / "y.bin")
        # All but the two rotary tables, which `write_llama2c` fills with sevens.
        tables = 8 * config.max_seq_len * (config.head_dim // 2)
        end = source.stat().st_size
        if not config.tied_embeddings:
            end -= 4 * config.vocab_size * config.embed_dim
        expected = source.read_bytes()
        actual = (folder / "new" / "y.bin").read_bytes()
        assert actual[: end - tables] == expected[: end - tables]
        assert actual[end:] == expected[end:]
        assert len(actual) == len(expected)


def test_rotary_tables_equal_those_of_the_published_file(assets: pathlib.Path) -> None:
    source = assets / "weights" / "stories15M.bin"
    with tempfile.TemporaryDirectory() as name:
        new = pathlib.Path(name) / "new.bin"
        convert(source, new, tokenizer=assets / "tokenizers" / "llama2.model")
        old, written = source.read_bytes(), new.read_bytes()
    tables = 2 * 4 * 256 * 24
    assert written[:-tables] == old[:-tables]
    ours, theirs = (np.frombuffer(d[-tables:], "<f4") for d in (written, old))
    # Angles of up to 255 radians in float32 have errors of 2**-17.
    np.testing.assert_allclose(ours, theirs, atol=2**-16)


def test_the_embedding_is_written_twice_if_it_cannot_be_tied(
    tmp_path: pathlib.Path,
) -> None:
    write_tokenizer_model(tmp_path)
    tied = TINY.replace(tied_embeddings=True)
    tensors = meta_tensors(tied)
    source = write_llama2c(tmp_path / "x.bin", tied, tensors)
    convert(source, tmp_path / "meta", target_format="meta")
    actual = read_ranks(tmp_path / "meta")[0]
    assert (
        actual["output.weight"].tobytes() == tensors["tok_embeddings.weight"].tobytes()
    )


@pytest.mark.parametrize("target", ["meta", "llama2c"])
@pytest.mark.parametrize(
    "change", [{"head_dim": 6}, {"rope_theta": 5e5}, {"norm_eps": 1e-6}]
)
def test_a_format_without_a_field_for_a_model_refuses_it(
    tmp_path: pathlib.Path, target: Any, change: dict[str, Any]
) -> None:
    write_tokenizer_model(tmp_path)
    config = TINY.replace(**change)
    (name,) = change
    tensors = meta_tensors(config)
    if name == "head_dim":
        save_params(tmp_path / "ours", random_params(config), config)
    else:
        convert(
            write_meta(tmp_path / "a", config, tensors),
            tmp_path / "ours",
            max_seq_len=8,
        )
    if target == "meta" and name != "head_dim":
        convert(tmp_path / "ours", tmp_path / "b", target_format="meta")
        assert (
            getattr(open_source(tmp_path / "b", max_seq_len=8).config, name)
            == (change[name])
        )
        return
    with pytest.raises(ConfigError, match=f"cannot store {name}"):
        convert(tmp_path / "ours", tmp_path / "b.x", target_format=target)
    assert not list(tmp_path.glob("b.*"))


@pytest.mark.parametrize("ranks", [0, 3, 16, -1])
def test_ranks_that_do_not_divide_the_model_are_refused(
    tmp_path: pathlib.Path, ranks: int
) -> None:
    write_tokenizer_model(tmp_path)
    source = write_meta(tmp_path / "a", TINY, meta_tensors(TINY))
    with pytest.raises(ConfigError, match=f"ranks is {ranks}"):
        convert(
            source, tmp_path / "b", target_format="meta", ranks=ranks, max_seq_len=8
        )
    assert not list(tmp_path.glob("b*"))


def test_pieces_of_tokenizers_survive_every_format(assets: pathlib.Path) -> None:
    # Llama 2's pieces, and those for infilling.
    pieces = pieces_of_model((assets / "tokenizers" / "codellama.model").read_bytes())
    assert len(pieces) == 32016
    assert pieces_of_model(model_of_pieces(pieces)) == pieces
    packed = assets / "tokenizers" / "tok512.bin"
    tokenizer = Tokenizer(read_llama2c_tokenizer(packed))
    assert pack_llama2c_tokenizer(tokenizer) == packed.read_bytes()


def test_another_tokenizer_beside_the_target_is_not_overwritten(
    tmp_path: pathlib.Path,
) -> None:
    tokenizer = write_tokenizer_model(tmp_path)
    source = write_llama2c(tmp_path / "x.bin", TINY, meta_tensors(TINY))
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 1))
    with pytest.raises(TokenizerError, match="another model's tokenizer"):
        convert(source, folder / "y.bin", tokenizer=tokenizer)
    assert [file.name for file in folder.iterdir()] == ["tokenizer.bin"]
