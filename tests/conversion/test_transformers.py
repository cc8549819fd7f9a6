"""Hugging Face folders, written for and by `transformers`, compared by logits."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.foreign import (
    TINY,
    every_kind,
    tiny_tokenizer,
    write_llama2c_tokenizer,
)
from support.models import random_params

from llama_jax.checkpoint.model_folder import save_params
from llama_jax.config import LlamaConfig
from llama_jax.conversion import convert, open_source
from llama_jax.conversion.huggingface_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)
from llama_jax.loading import load
from llama_jax.model.transformer import apply
from llama_jax.runtime import Runtime
from llama_jax.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = pytest.mark.slow
CLOSE = 1e-4  # absolute, of float32 logits


def their_logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    model.eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor(tokens)).logits.numpy()
    return logits


def our_logits(path: pathlib.Path, tokens: np.ndarray, **options: Any) -> np.ndarray:
    loaded = load(path, runtime=Runtime(dtype="float32"), **options)
    logits, _ = apply(loaded.model, loaded.params, jnp.asarray(tokens))
    return np.asarray(logits)


def tokens_of(config: LlamaConfig, length: int = 48) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(config.vocab_size, size=(2, length))


@every_kind
def test_an_exported_folder_gives_our_logits(
    tmp_path: pathlib.Path, config: LlamaConfig
) -> None:
    save_params(
        tmp_path / "ours",
        random_params(config),
        config,
        tokenizer=tiny_tokenizer(tmp_path),
    )
    convert(tmp_path / "ours", tmp_path / "hf", target_format="hf")
    tokens = tokens_of(config)
    expected = our_logits(tmp_path / "ours", tokens)
    actual = their_logits(tmp_path / "hf", tokens)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=CLOSE, rtol=0)


def test_a_trained_model_gives_the_same_logits_and_token_ids(
    tmp_path: pathlib.Path, assets: pathlib.Path
) -> None:
    source = assets / "weights" / "stories15M.bin"
    file = assets / "tokenizers" / "llama2.model"
    convert(source, tmp_path / "hf", target_format="hf", tokenizer=file)
    tokens = tokens_of(open_source(source).config)
    np.testing.assert_allclose(
        their_logits(tmp_path / "hf", tokens),
        our_logits(source, tokens, tokenizer=file),
        atol=CLOSE,
        rtol=0,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer.from_file(file)
    texts = ["", "Once upon a time", "  two  spaces", "naïve 東京 🦙", "1234 tabs\t\n"]
    texts += (
        (assets / "text" / "wikitext2-valid.txt").read_text("utf-8").split("\n")[:200]
    )
    for text in texts:
        if "<unk>" not in text:  # which is a special token to transformers, text to us
            assert theirs(text)["input_ids"] == ours.encode(text, bos=True, eos=False)


def test_fields_of_transformers_that_change_no_logits_are_known() -> None:
    fields = config_to_hugging_face(TINY, "float32", {})
    names = set(transformers.LlamaConfig().to_dict())  # those of generation too in 4.x
    newer = getattr(
        transformers.GenerationConfig, "_get_default_generation_params", dict
    )
    names |= set(newer())
    structure = {
        "add_cross_attention", "cross_attention_hidden_size", "is_encoder_decoder",
        "pruned_heads", "rope_parameters", "tie_encoder_decoder",
    }  # fmt: skip
    for name in sorted(names - structure - fields.keys()):
        assert config_from_hugging_face(fields | {name: 1}) == TINY


@every_kind
def test_a_folder_that_transformers_saved_gives_its_logits(
    tmp_path: pathlib.Path, config: LlamaConfig
) -> None:
    fields = config_to_hugging_face(config, "float32", {"bos": 1, "eos": 2})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    packed = write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    assert open_source(tmp_path / "hf").config == config
    tokens = tokens_of(config)
    np.testing.assert_allclose(
        our_logits(tmp_path / "hf", tokens, tokenizer=packed),
        their_logits(tmp_path / "hf", tokens),
        atol=CLOSE,
        rtol=0,
    )
