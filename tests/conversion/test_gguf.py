"""GGUF files: what we write and read, and what gguf's own reader and writer say."""

import dataclasses
import pathlib
import tempfile
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.foreign import TINY, write_llama2c_tokenizer
from support.foreign_gguf import (
    BYTES,
    GQA,
    LLAMA31,
    effective,
    gguf,
    lazy,
    make,
    metadata,
    renamed,
    write,
    write_foreign,
)

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.gguf import read_gguf, write_gguf
from llama_jax.conversion.gguf_config import rope_factors
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.conversion.source import LazyModel
from llama_jax.errors import CheckpointError, TokenizerError
from llama_jax.text.tokenizer import Tokenizer

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    " leading,  double and trailing spaces  ",
    "naïve Größe, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "日本語と中文，한국어 🐕‍🦺 \U0001f1e9\U0001f1ea",
    "def f(x):\n\treturn x**2  # 12345\n\n",
    "▁ <s> </s> <unk> <0x41> [INST] ﬁ ½ \u0300\u200b\ufeff",
    "",
    " ",
)


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """272 pieces: special ones, bytes and some letters."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.bin"
    return Tokenizer(read_llama2c_tokenizer(write_llama2c_tokenizer(path)))


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    kv_heads = draw(st.integers(1, 3))
    scaling = draw(
        st.sampled_from([None, RopeScaling(kind="linear", factor=2.5), LLAMA31])
    )
    return LlamaConfig(
        vocab_size=draw(st.integers(2, 40)),
        num_layers=draw(st.integers(1, 3)),
        embed_dim=draw(st.integers(1, 40)),
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(2, 8)),
        mlp_dim=draw(st.integers(1, 40)),
        max_seq_len=draw(st.integers(1, 1 << 20)),
        rope_theta=draw(st.sampled_from([1e4, 5e5, 1e6, 12345.5])),
        rope_scaling=scaling,
        norm_eps=draw(st.sampled_from([1e-5, 1e-6, 3.7e-6])),
        tied_embeddings=draw(st.booleans()),
        head="lm",
    )


@given(config=configs(), kind=st.sampled_from(list(DTYPES)), seed=st.integers(0, 99))
def test_what_we_write_we_read_bit_for_bit(
    config: LlamaConfig, kind: Any, seed: int
) -> None:
    meta, ours = make(config, DTYPES[kind], seed)
    done = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.gguf")
        write_gguf(
            path,
            LazyModel(config, lazy(ours), None),
            dtype=kind,
            progress=lambda *progress: done.append(progress),
        )
        source = read_gguf(path)
        assert source.config == config.replace(rope_scaling=effective(config))
        assert ("output.weight" in source.tensors) is not config.tied_embeddings
        leaves = source.leaves(DTYPES[kind])
        assert leaves.keys() == ours.keys()
        for name, array in ours.items():
            found = leaves[name].read()
            assert found.dtype == array.dtype
            assert found.tobytes() == array.tobytes(), name
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for name, array in renamed(meta).items():
            wanted = array.astype(np.float32) if array.ndim == 1 else array
            assert theirs[name].data.tobytes() == wanted.tobytes(), name
            assert theirs[name].shape.tolist() == list(array.shape[::-1])
    total = sum(array.nbytes for array in ours.values())
    assert done[-1] == ("writing", total, total)
    assert [at for _, at, _ in done] == sorted({at for _, at, _ in done})


def test_the_context_can_be_given(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "x.gguf", GQA)
    source = read_gguf(tmp_path / "x.gguf", max_seq_len=8)
    assert (source.config.max_seq_len, source.max_seq_len_origin) == (8, "as given")


def test_q8_0_is_as_close_as_its_definition_says(tmp_path: pathlib.Path) -> None:
    config = GQA.replace(embed_dim=64, mlp_dim=80)  # w2 has rows of 80: float16
    ours = write(tmp_path / "x.gguf", config, kind="q8_0")
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors
    }
    assert types["blk.1.ffn_down.weight"] == "F16"
    assert types["blk.1.ffn_up.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"
    leaves = read_gguf(tmp_path / "x.gguf").leaves()
    for name, array in ours.items():
        found = leaves[name].read()
        if "down_proj" in name:
            np.testing.assert_array_equal(found, array.astype(np.float16), name)
            continue
        if array.ndim == 1:
            np.testing.assert_array_equal(found, array, name)
            continue
        # Rows of the file: the embedding's are ours, all others are our columns. Within
        # a row, pairs of rotary halves do not change places.
        axis = -1 if "embedding" in name else 0
        blocks = np.moveaxis(array, axis, -1)
        blocks = blocks.reshape(*blocks.shape[:-1], -1, 32)
        off = np.moveaxis(np.abs(found - array), axis, -1).reshape(blocks.shape)
        scale = np.abs(blocks).max(-1) / 127
        # Half a step, and what a scale in float16 makes of 127 of them.
        assert (off.max(-1) <= scale * (0.5 + 127 * 2.0**-11) * 1.001).all(), name


def test_gguf_sees_all_that_llama_cpp_asks_for(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
) -> None:
    config = GQA.replace(rope_theta=5e5)
    write(tmp_path / "tiny.gguf", config, kind="float16", tokenizer=tiny_tokenizer)
    fields = {
        key: field.contents()
        for key, field in gguf.GGUFReader(tmp_path / "tiny.gguf").fields.items()
    }
    wanted = metadata(config) | {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_F16),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": 272,
        "llama.rope.dimension_count": 4,
        "llama.attention.key_length": 4,
        "llama.attention.value_length": 4,
        "llama.rope.freq_base": 5e5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    for key, value in wanted.items():
        value = float(np.float32(value)) if type(value) is float else value
        assert fields[key] == value, key
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[259:262] == ["▁", "e", "t"]
    assert len(tokens) == 272
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds == [2, 3, 3] + [6] * 256 + [1] * 13
    assert fields["tokenizer.ggml.scores"][3:] == [-float(id) for id in range(3, 272)]


BIG = TINY.replace(
    num_layers=1, embed_dim=256, num_kv_heads=2, head_dim=32, mlp_dim=256, vocab_size=33
)


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType), ids=lambda k: k.name)
def test_every_type_is_read_as_gguf_reads_it(tmp_path: pathlib.Path, kind: Any) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    meta, _ = make(BIG)
    tensors, kinds, wanted = renamed(meta), {}, {}
    name = "blk.0.ffn_up.weight"
    try:
        raw = gguf.quants.quantize(tensors[name], kind).view(np.uint8)
    except NotImplementedError:
        size = (256, 256 // block * nbytes)
        raw = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    try:
        with np.errstate(all="ignore"):
            wanted[name] = gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        wanted = {}
    tensors[name], kinds[name] = raw, kind
    path = write_foreign(tmp_path / "x.gguf", metadata(BIG), tensors, kinds=kinds)
    if not wanted:
        message = f"the type {kind.name}, which gguf cannot"
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)
        return
    found = read_gguf(path).tensors[name]
    array = found.read()
    if kind.name in ("F16", "BF16"):
        assert (found.dtype.itemsize, found.host_bytes) == (2, 0)
    np.testing.assert_array_equal(array.astype(np.float32), wanted[name])
    leaf = read_gguf(path).leaves()["transformer/layers/0/mlp/up_proj"]
    np.testing.assert_array_equal(leaf.read().astype(np.float32), wanted[name].T)


def test_a_quantized_tensor_takes_no_more_memory_than_it_says(
    tmp_path: pathlib.Path,
) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (1024, 2048 // 256 * 74), np.uint8)
    tensors = {"token_embd.weight": raw}
    kinds = {"token_embd.weight": gguf.GGMLQuantizationType.IQ2_XS}
    path = write_foreign(tmp_path / "x.gguf", metadata(BIG), tensors, kinds=kinds)
    leaf = read_gguf(path).tensors["token_embd.weight"]
    leaf.read()  # the type's tables are made once
    tracemalloc.start()
    array = leaf.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes <= peak <= leaf.host_bytes <= array.nbytes + (2 << 20)


def test_files_of_llama_cpps_converters_are_read(tmp_path: pathlib.Path) -> None:
    meta, ours = make(GQA)
    tensors = renamed(meta) | {"rope_freqs.weight": np.ones(2, np.float32)}
    fields = metadata(GQA) | {
        "general.name": "LLaMA v2",
        "llama.vocab_size": 272,
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.rope.dimension_count": 4,
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
        "quantize.imatrix.chunks_count": 7,
        "somebodys.own": ["a", "b"],
    }
    source = read_gguf(write_foreign(tmp_path / "x.gguf", fields, tensors))
    assert source.config == GQA
    for name, array in ours.items():
        np.testing.assert_array_equal(source.leaves()[name].read(), array, name)


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 1.0}, None),
        ({"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}, None),
    ],
)
def test_linear_scaling_is_read_as_llama_cpp_reads_it(
    tmp_path: pathlib.Path, fields: dict[str, Any], scaling: float | None
) -> None:
    path = tmp_path / "x.gguf"
    write_foreign(path, metadata(GQA) | fields, renamed(make(GQA)[0]))
    wanted = scaling and RopeScaling(kind="linear", factor=scaling)
    assert read_gguf(path).config.rope_scaling == wanted


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_factors_are_those_that_meta_published(factor: float) -> None:
    """By Meta's rule, written out in double precision once more."""
    found = rope_factors(dataclasses.replace(LLAMA31, factor=factor), 128, 5e5)
    for pair, divisor in enumerate(found):
        turns = 8192 * 5e5 ** (-2 * pair / 128) / (2 * np.pi)
        smooth = min(1.0, max(0.0, (turns - 1) / 3))
        assert divisor == pytest.approx(1 / ((1 - smooth) / factor + smooth), rel=1e-5)
    assert (found[0], found[-1]) == (1, factor)


@pytest.fixture(scope="module", params=["llama2", "codellama", "codellama-step"])
def both(
    request: pytest.FixtureRequest,
    assets: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, Tokenizer]:
    """A published tokenizer, and the same after a detour through a GGUF file."""
    tokenizer = Tokenizer.from_file(assets / "tokenizers" / f"{request.param}.model")
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    config = GQA.replace(vocab_size=tokenizer.vocab_size, embed_dim=2)
    write(path, config, tokenizer=tokenizer)
    found, where = read_gguf(path).find_tokenizer()
    assert where == path
    return tokenizer, found


def test_special_pieces_survive(both: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer, found = both
    for name in ("vocab_size", "bos_id", "eos_id", "unk_id", "pad_id", "infilling"):
        assert getattr(found, name) == getattr(tokenizer, name), name
    assert found.step_id == tokenizer.step_id


@given(text=st.text(max_size=80))
@settings(max_examples=100)
@example(text="".join(TEXTS))
def test_a_tokenizer_survives(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    tokenizer, found = both
    for one in (text, *TEXTS) if text == "" else (text,):
        ids = tokenizer.encode(one, bos=True, eos=True)
        assert found.encode(one, bos=True, eos=True) == ids
        assert found.decode(ids) == tokenizer.decode(ids)
        assert found.encode_infilling(one) == tokenizer.encode_infilling(one)


def test_added_tokens_survive_and_text_never_becomes_one(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
) -> None:
    added = {272: "<|im_start|>", 274: "<|im_end|>"}
    tokenizer = Tokenizer(tiny_tokenizer.contents, added_tokens=added)
    config = GQA.replace(vocab_size=276)
    write(tmp_path / "x.gguf", config, tokenizer=tokenizer)
    found, _ = read_gguf(tmp_path / "x.gguf").find_tokenizer()
    assert found.vocab_size == 272
    assert found.added_tokens == added
    assert found.unnamed_ids(276) == (273, 275)
    text = "the <|im_start|>tea[PAD273]"
    ids = found.encode(text, bos=True, eos=False)
    assert ids == tokenizer.encode(text, bos=True, eos=False)
    assert max(ids) < 272


def test_the_space_in_front_may_be_missing(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
) -> None:
    fields = metadata(GQA) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, "▁", "t", "e", "▁t"],
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 4,
    }
    tensors = renamed(make(GQA)[0])
    for prefix, ids in ((None, [262, 261]), (True, [262, 261]), (False, [260, 261])):
        if prefix is not None:
            fields["tokenizer.ggml.add_space_prefix"] = prefix
        path = write_foreign(tmp_path / f"{prefix}.gguf", fields, tensors)
        tokenizer, _ = read_gguf(path).find_tokenizer()
        assert tokenizer.encode("te", bos=False, eos=False) == ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt2"}, "byte-level tokenizer .* --tokenizer"),
        ({"model": "bert"}, "unknown kind 'bert'; name the file"),
        ({"model": None}, "has no tokenizer; name the file"),
        ({"scores": None}, "of different lengths"),
        ({"scores": [0.0]}, "of different lengths"),
        ({"scores": [float("nan")] * 260}, "of different lengths"),
        ({"token_type": [9] * 260}, "of different lengths"),
        ({"tokens": [1] * 260}, "of different lengths"),
        ({"tokens": ["a"] * 260}, "not a SentencePiece model"),
        ({"bos_token_id": 259}, "its bos token is 259, but"),
        ({"bos_token_id": 1 << 20}, "its bos token is 1048576, but"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', which is not a token id"),
    ],
)
def test_another_tokenizer_is_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    found = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *BYTES, "a"],
        "scores": [-1.0] * 260,
        "token_type": [2, 3, 3] + [6] * 256 + [1],
    } | changes
    fields = metadata(GQA) | {
        f"tokenizer.ggml.{key}": value
        for key, value in found.items()
        if value is not None
    }
    path = write_foreign(tmp_path / "x.gguf", fields, renamed(make(GQA)[0]))
    with pytest.raises(TokenizerError, match=message):
        read_gguf(path).find_tokenizer()
