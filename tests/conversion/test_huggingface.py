"""Hugging Face folders: configuration, files, and what is refused."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from support.foreign import (
    TINY,
    meta_tensors,
    write_llama2c,
    write_llama2c_tokenizer,
    write_pth,
)

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, lazy_leaf
from llama_jax.conversion import convert, open_source
from llama_jax.conversion.huggingface import write_hugging_face
from llama_jax.conversion.huggingface_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)
from llama_jax.conversion.safetensors import read_safetensors, write_safetensors
from llama_jax.conversion.source import LazyModel
from llama_jax.errors import CheckpointError, ConfigError, TokenizerError
from llama_jax.loading import load

FIELDS = config_to_hugging_face(TINY, "float16", {"bos": 1, "eos": 2})


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Write a Hugging Face folder with one safetensors file."""
    write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    source = write_llama2c(tmp_path / "x.bin", TINY, meta_tensors(TINY))
    convert(source, tmp_path / "hf", target_format="hf")
    return tmp_path / "hf"


def edit(folder: pathlib.Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def tensors_of(folder: pathlib.Path) -> dict[str, LazyLeaf]:
    tensors = read_safetensors(folder / "model.safetensors")
    return {name: lazy_leaf(leaf.read().copy()) for name, leaf in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tied_embeddings": True},
        {"head_dim": 6},
        {"num_kv_heads": 2},
    ],
)
def test_configurations_survive_a_round_trip(change: dict[str, Any]) -> None:
    config = TINY.replace(**change)
    fields = json.loads(json.dumps(config_to_hugging_face(config, "float16", {})))
    assert config_from_hugging_face(fields) == config


def test_fields_missing_in_early_files_get_defaults() -> None:
    fields = dict(FIELDS)
    for name in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling"):
        del fields[name]
    assert config_from_hugging_face(fields) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0, but only 1.0"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 33}, None),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
    ],
)
def test_unsupported_fields_are_refused_by_name(
    change: dict[str, Any], message: str | None
) -> None:
    fields = FIELDS | change
    if message is None:  # width and heads need not agree if head_dim is given
        assert config_from_hugging_face(fields).embed_dim == 33
        del fields["head_dim"]
        message = "hidden_size 33 is not a multiple"
    with pytest.raises(ConfigError, match=message):
        config_from_hugging_face(fields)


@pytest.mark.parametrize(
    "extra",
    [
        {"sliding_window": None, "use_bfoo": False, "quantization_config": None},
        {"torch_dtype": "float16", "dtype": "bfloat16", "use_cache": False},
        {"use_sdpa": True, "_flash_attn_2_enabled": True, "pretraining_tp": 2},
        {"max_length": 64, "do_sample": True, "temperature": 0.9, "top_p": 0.6},
        {"logits_scaling": 1, "model_max_length": 64, "stop_strings": ["x"]},
        {"is_decoder": True, "sep_token_id": 3, "_attn_implementation": "sdpa"},
        {"auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}},
    ],
)
def test_fields_that_change_no_logits_are_ignored(extra: dict[str, Any]) -> None:
    assert config_from_hugging_face(FIELDS | extra) == TINY


def test_the_first_llama_folders_have_the_context_of_transformers(
    folder: pathlib.Path,
) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    for name in ("max_position_embeddings", "num_key_value_heads", "head_dim"):
        del fields[name]
    # Nothing reads the first, and the ids are not the tokenizer's.
    fields |= {"max_sequence_length": 64, "bos_token_id": 0, "eos_token_id": 1}
    file.write_text(json.dumps(fields | {"pad_token_id": -1}))
    assert open_source(folder).config == TINY.replace(max_seq_len=2048)
    assert open_source(folder, max_seq_len=64).config == TINY
    loaded = load(folder)
    assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (1, 2)


def test_large_models_are_split_into_several_files(
    tmp_path: pathlib.Path, folder: pathlib.Path
) -> None:
    source = open_source(folder)
    tokenizer, _ = source.find_tokenizer()
    split = tmp_path / "split"
    split.mkdir()
    model = LazyModel(source.config, source.leaves(), tokenizer)
    write_hugging_face(split, model, shard_bytes=40_000)
    index = json.loads((split / "model.safetensors.index.json").read_text())
    files = sorted(split.glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 4 * 44192
    again = open_source(split)
    for path, leaf in source.leaves().items():
        assert again.leaves()[path].read().tobytes() == leaf.read().tobytes()
    files[1].rename(split / "elsewhere")
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(split)
    files[0].rename(files[1])
    with pytest.raises(CheckpointError):
        open_source(split)


@pytest.mark.parametrize("name", ["../x.safetensors", "a/b.safetensors", 3])
def test_an_index_cannot_name_files_in_other_folders(
    folder: pathlib.Path, name: Any
) -> None:
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_source(folder)


def test_pytorch_bin_files_are_read(folder: pathlib.Path) -> None:
    leaves = open_source(folder).leaves()
    expected = {path: leaf.read().tobytes() for path, leaf in leaves.items()}
    tensors = tensors_of(folder)
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    inverse = np.asarray([1, 0.01], np.float32)  # of theta 10000
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = inverse
    write_pth(folder / "pytorch_model.bin", arrays)
    (folder / "model.safetensors").unlink()
    actual = open_source(folder).leaves()
    for path, data in expected.items():
        assert actual[path].read().tobytes() == data


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_must_equal_tied_embeddings(
    folder: pathlib.Path, equal: bool
) -> None:
    tensors = tensors_of(folder)
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_safetensors(folder / "model.safetensors", tensors)
    edit(folder, tie_word_embeddings=True)
    leaves = open_source(folder).leaves()
    assert "lm_head" not in leaves
    if equal:
        assert leaves["transformer/embedding"].read().shape == (272, 32)
        return
    with pytest.raises(CheckpointError, match="ties the embeddings"):
        leaves["transformer/embedding"].read()


def test_added_tokens_beyond_the_vocabulary_are_dropped(
    folder: pathlib.Path,
) -> None:
    grown = np.zeros((274, 32), np.float32)
    tensors = tensors_of(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = lazy_leaf(grown)
    write_safetensors(folder / "model.safetensors", tensors)
    edit(folder, vocab_size=274)
    added = {"[PAD]": 272, "<|im_end|>": 273, "<never>": 274, "<s>": 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer, file = open_source(folder).find_tokenizer()
    assert dict(tokenizer.added_tokens) == {272: "[PAD]", 273: "<|im_end|>"}
    assert file == folder / "tokenizer.model"
    convert(folder, folder.parent / "ours")
    convert(folder.parent / "ours", folder.parent / "back", target_format="hf")
    again, _ = open_source(folder.parent / "back").find_tokenizer()
    assert again.added_tokens == tokenizer.added_tokens
    (folder / "added_tokens.json").write_text('{"a": "b"}')
    with pytest.raises(TokenizerError, match="integer"):
        open_source(folder).find_tokenizer()


def test_either_tokenizer_file_is_found_and_a_missing_one_is_an_error(
    folder: pathlib.Path,
) -> None:
    (folder / "tokenizer.model").unlink()
    tokenizer, file = open_source(folder).find_tokenizer()
    assert file.name == "tokenizer.json"  # made from tokenizer.model
    assert tokenizer.encode("the", bos=True, eos=False)[0] == 1
    file.unlink()
    with pytest.raises(TokenizerError, match="--tokenizer"):
        open_source(folder).find_tokenizer()
