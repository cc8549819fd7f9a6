"""GGUF files, written and read by us and by gguf."""

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
from support.foreign import TINY
from support.foreign_gguf import (
    BYTES,
    GQA,
    LLAMA31,
    YARN,
    effective,
    gguf,
    make,
    metadata,
    renamed,
    write,
    write_foreign,
)

from llama_jax.checkpoint.lazy_leaf import lazy_leaves
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.gguf import read_gguf, write_gguf
from llama_jax.conversion.gguf_rope import rope_factors
from llama_jax.conversion.source import LazyModel
from llama_jax.errors import CheckpointError, TokenizerError
from llama_jax.model.rope import default_attention_factor
from llama_jax.text.tokenizer import Tokenizer
from tests.support.tokenizers import special_tokens

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


@st.composite
def configs(draw: st.DrawFn) -> LlamaConfig:
    kv_heads = draw(st.integers(1, 3))
    scaling = draw(
        st.sampled_from([None, RopeScaling(kind="linear", factor=2.5), LLAMA31, YARN])
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


@settings(max_examples=25)
@given(config=configs(), dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 99))
def test_written_files_are_read_back_bit_for_bit(
    config: LlamaConfig, dtype: Any, seed: int
) -> None:
    meta, ours = make(config, DTYPES[dtype], seed)
    reports: list[tuple[str, int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.gguf")
        write_gguf(
            path,
            LazyModel(config, lazy_leaves(ours), None),
            dtype=dtype,
            progress=lambda *report: reports.append(report),
        )
        source = read_gguf(path)
        assert source.config == config.replace(rope_scaling=effective(config))
        assert ("output.weight" in source.tensors) is not config.tied_embeddings
        leaves = source.leaves(DTYPES[dtype])
        assert leaves.keys() == ours.keys()
        for name, array in ours.items():
            actual = leaves[name].read()
            assert actual.dtype == array.dtype
            assert actual.tobytes() == array.tobytes(), name
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for name, array in renamed(meta).items():
            expected = array.astype(np.float32) if array.ndim == 1 else array
            assert theirs[name].data.tobytes() == expected.tobytes(), name
            assert theirs[name].shape.tolist() == list(array.shape[::-1])
    total = sum(array.nbytes for array in ours.values())
    assert reports[-1] == ("writing", total, total)
    assert [done for _, done, _ in reports] == sorted({done for _, done, _ in reports})


def test_max_seq_len_can_be_overridden(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "x.gguf", GQA)
    source = read_gguf(tmp_path / "x.gguf", max_seq_len=8)
    assert (source.config.max_seq_len, source.max_seq_len_origin) == (8, "as given")


def test_q8_0_errors_are_within_half_a_step(tmp_path: pathlib.Path) -> None:
    config = GQA.replace(embed_dim=64, mlp_dim=80)  # w2 has rows of 80: float16
    ours = write(tmp_path / "x.gguf", config, dtype="q8_0")
    types = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors
    }
    assert types["blk.1.ffn_down.weight"] == "F16"
    assert types["blk.1.ffn_up.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"
    leaves = read_gguf(tmp_path / "x.gguf").leaves()
    for name, array in ours.items():
        actual = leaves[name].read()
        if "down_proj" in name:
            np.testing.assert_array_equal(actual, array.astype(np.float16), name)
            continue
        if array.ndim == 1:
            np.testing.assert_array_equal(actual, array, name)
            continue
        # Blocks are cut from rows of the file: our rows for the embedding, else our
        # columns. The rotary permutation moves whole rows of the file.
        axis = -1 if "embedding" in name else 0
        blocks = np.moveaxis(array, axis, -1)
        blocks = blocks.reshape(*blocks.shape[:-1], -1, 32)
        error = np.moveaxis(np.abs(actual - array), axis, -1).reshape(blocks.shape)
        scale = np.abs(blocks).max(-1) / 127
        # Half a step, and 127 times the rounding error of a float16 scale.
        assert (error.max(-1) <= scale * (0.5 + 127 * 2.0**-11) * 1.001).all(), name


def test_metadata_contains_what_llama_cpp_needs(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
) -> None:
    config = GQA.replace(rope_theta=5e5)
    write(tmp_path / "tiny.gguf", config, dtype="float16", tokenizer=tiny_tokenizer)
    fields = {
        key: field.contents()
        for key, field in gguf.GGUFReader(tmp_path / "tiny.gguf").fields.items()
    }
    expected = metadata(config) | {
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
    for key, value in expected.items():
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
def test_every_type_is_dequantized_as_by_gguf(
    tmp_path: pathlib.Path, kind: Any
) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    meta, _ = make(BIG)
    tensors, kinds, expected = renamed(meta), {}, {}
    name = "blk.0.ffn_up.weight"
    try:
        raw = gguf.quants.quantize(tensors[name], kind).view(np.uint8)
    except NotImplementedError:
        size = (256, 256 // block * nbytes)
        raw = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    try:
        with np.errstate(all="ignore"):
            expected[name] = gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        expected = {}
    tensors[name], kinds[name] = raw, kind
    path = write_foreign(tmp_path / "x.gguf", metadata(BIG), tensors, kinds=kinds)
    if not expected:
        message = f"the type {kind.name}, which gguf cannot"
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)
        return
    actual = read_gguf(path).tensors[name]
    array = actual.read()
    if kind.name in ("F16", "BF16"):
        assert (actual.dtype.itemsize, actual.host_bytes) == (2, 0)
    np.testing.assert_array_equal(array.astype(np.float32), expected[name])
    leaf = read_gguf(path).leaves()["transformer/layers/0/mlp/up_proj"]
    np.testing.assert_array_equal(leaf.read().astype(np.float32), expected[name].T)


def test_dequantizing_stays_within_host_bytes(
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
        "unknown.key": ["a", "b"],
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
def test_linear_scaling_is_read_as_by_llama_cpp(
    tmp_path: pathlib.Path, fields: dict[str, Any], scaling: float | None
) -> None:
    path = tmp_path / "x.gguf"
    write_foreign(path, metadata(GQA) | fields, renamed(make(GQA)[0]))
    expected = scaling and RopeScaling(kind="linear", factor=scaling)
    assert read_gguf(path).config.rope_scaling == expected


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({}, {}),
        ({"llama.rope.scaling.attn_factor": 0.75}, {"attention_factor": 0.8539721}),
        ({"llama.rope.scaling.yarn_ext_factor": -1.0}, {}),
        ({"llama.rope.scaling.yarn_beta_fast": 32.0}, {}),
        (
            {"llama.rope.scaling.original_context_length": 16},
            {"original_max_seq_len": 16},
        ),
    ],
)
def test_yarn_is_read_as_by_llama_cpp(
    tmp_path: pathlib.Path, fields: dict[str, Any], change: dict[str, Any]
) -> None:
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    path = tmp_path / "x.gguf"
    write_foreign(path, metadata(GQA) | yarn | fields, renamed(make(GQA)[0]))
    scaling = dataclasses.replace(
        YARN,
        original_max_seq_len=GQA.max_seq_len,
        attention_factor=default_attention_factor(4.0),
    )
    expected = dataclasses.replace(scaling, **change)
    assert read_gguf(path).config.rope_scaling == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_factors_equal_metas_formula(factor: float) -> None:
    """Computed here again, in double precision."""
    scaling = dataclasses.replace(LLAMA31, factor=factor)
    config = GQA.replace(head_dim=128, rope_theta=5e5, rope_scaling=scaling)
    actual = rope_factors(config)
    for pair, divisor in enumerate(actual):
        turns = 8192 * 5e5 ** (-2 * pair / 128) / (2 * np.pi)
        smooth = min(1.0, max(0.0, (turns - 1) / 3))
        assert divisor == pytest.approx(1 / ((1 - smooth) / factor + smooth), rel=1e-5)
    assert (actual[0], actual[-1]) == (1, factor)


@pytest.fixture(scope="module", params=["llama2", "codellama", "codellama-step"])
def tokenizer_pair(
    request: pytest.FixtureRequest,
    assets: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, Tokenizer]:
    """Return a published tokenizer, and the same read back from a GGUF file."""
    tokenizer = Tokenizer.from_file(assets / "tokenizers" / f"{request.param}.model")
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    config = GQA.replace(vocab_size=tokenizer.vocab_size, embed_dim=2)
    write(path, config, tokenizer=tokenizer)
    read_back, file = read_gguf(path).find_tokenizer()
    assert file == path
    return tokenizer, read_back


def test_special_pieces_survive(tokenizer_pair: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer, read_back = tokenizer_pair
    for name in ("vocab_size", "bos_id", "eos_id", "unk_id", "pad_id", "infilling"):
        assert getattr(read_back, name) == getattr(tokenizer, name), name
    assert read_back.step_id == tokenizer.step_id


@given(text=st.text(max_size=80))
@settings(max_examples=100)
@example(text="".join(TEXTS))
def test_a_tokenizer_survives_a_round_trip(
    tokenizer_pair: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    tokenizer, read_back = tokenizer_pair
    for case in (text, *TEXTS) if text == "" else (text,):
        ids = tokenizer.encode(case, bos=True, eos=True)
        assert read_back.encode(case, bos=True, eos=True) == ids
        assert read_back.decode(ids) == tokenizer.decode(ids)
        assert read_back.encode_infilling(case) == tokenizer.encode_infilling(case)


def test_added_tokens_survive_and_no_text_encodes_to_them(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
) -> None:
    added = {272: "<|im_start|>", 274: "<|im_end|>"}
    tokenizer = Tokenizer(tiny_tokenizer.contents, settings=special_tokens(added))
    config = GQA.replace(vocab_size=276)
    write(tmp_path / "x.gguf", config, tokenizer=tokenizer)
    read_back, _ = read_gguf(tmp_path / "x.gguf").find_tokenizer()
    assert read_back.vocab_size == 272
    assert read_back.added_tokens == added
    assert read_back.unnamed_ids(276) == (273, 275)
    text = "the <|im_start|>tea[PAD273]"
    ids = read_back.encode(text, bos=True, eos=False)
    assert ids == tokenizer.encode(text, bos=True, eos=False)
    assert max(ids) < 272


def test_add_space_prefix_is_read(
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
        ({"model": "bert"}, "unknown kind 'bert'; name the file"),
        ({"model": None}, "has no tokenizer; name the file"),
        ({"scores": None}, "of different lengths"),
        ({"scores": [0.0]}, "of different lengths"),
        ({"scores": [float("nan")] * 260}, "of different lengths"),
        ({"token_type": [9] * 260}, "of different lengths"),
        ({"tokens": [1] * 260}, "of different lengths"),
        ({"tokens": ["a"] * 260}, "not a SentencePiece model"),
        ({"bos_token_id": 1 << 20}, "bos_token_id is 1048576, which is not a token id"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', which is not a token id"),
    ],
)
def test_other_tokenizers_are_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    values = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *BYTES, "a"],
        "scores": [-1.0] * 260,
        "token_type": [2, 3, 3] + [6] * 256 + [1],
    } | changes
    fields = metadata(GQA) | {
        f"tokenizer.ggml.{key}": value
        for key, value in values.items()
        if value is not None
    }
    path = write_foreign(tmp_path / "x.gguf", fields, renamed(make(GQA)[0]))
    with pytest.raises(TokenizerError, match=message):
        read_gguf(path).find_tokenizer()
