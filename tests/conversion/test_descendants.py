"""A descendant like SmolLM2: byte-level tokenizer, tied embeddings, end to end."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from support.foreign_gguf import GQA, write
from support.tokenizers import byte_level_json, byte_level_tokenizer

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.conversion import convert
from llama_jax.generation.generate import generate
from llama_jax.generation.request import text_request
from llama_jax.loading import load
from llama_jax.model.transformer import apply
from llama_jax.runtime import Runtime

CONFIG = GQA.replace(vocab_size=401, num_layers=1, tied_embeddings=True, rope_theta=1e5)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Beside those of every Llama, as published.
KEYS = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}
TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "GPT2Tokenizer",
    "model_max_length": 64,
    "chat_template": TEMPLATE,
}
GGUF = ("source.gguf", "ours_of_gguf", "again.gguf")
TEXT = "Hello zorblat, it's 2024\n  <|im_end|> 你好"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The same model in a folder as it is published, and what it is converted to."""
    root = tmp_path_factory.mktemp("descendant")
    tokenizer = byte_level_tokenizer(
        chat_templates={"default": TEMPLATE}, sampling={"temperature": 0.2}
    )
    write(root / "source.gguf", CONFIG, tokenizer=tokenizer)
    folder = root / "hf"
    convert(root / "source.gguf", folder, target_format="hf")
    for name, content in (
        ("config.json", json.loads((folder / "config.json").read_text()) | KEYS),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}),
        ("tokenizer.json", byte_level_json()),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(content))
    convert(folder, root / "from_hf.gguf", dtype="float32")
    convert(root / "from_hf.gguf", root / "hf_again", target_format="hf")
    convert(root / "hf_again", root / "ours")
    convert(root / "source.gguf", root / "ours_of_gguf")
    convert(root / "ours_of_gguf", root / "again.gguf", dtype="float32")
    names = ("hf", "from_hf.gguf", "hf_again", "ours", *GGUF)
    return {name: root / name for name in names}


def loaded(path: pathlib.Path) -> Loaded:
    return load(path, runtime=Runtime(dtype="float32"))


def test_every_format_gives_equal_ids_and_logits(
    paths: dict[str, pathlib.Path],
) -> None:
    expected = loaded(paths["hf"])
    ids = expected.tokenizer.encode(TEXT, bos=False, eos=False)
    assert 400 in ids
    assert 2 not in ids
    assert expected.model.config.tied_embeddings
    logits, _ = apply(expected.model, expected.params, jnp.asarray([ids]))
    for name, path in paths.items():
        actual = loaded(path)
        assert actual.tokenizer.encode(TEXT, bos=False, eos=False) == ids, name
        assert actual.tokenizer.decode(ids) == expected.tokenizer.decode(ids)
        again, _ = apply(actual.model, actual.params, jnp.asarray([ids]))
        np.testing.assert_array_equal(again, logits, err_msg=name)


def test_what_a_gguf_file_says_is_kept(paths: dict[str, pathlib.Path]) -> None:
    for name in GGUF:
        tokenizer = loaded(paths[name]).tokenizer
        settings = tokenizer.settings
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2), name
        assert tokenizer.end_ids == (2,), name
        assert (settings.add_bos, settings.add_eos) == (False, False), name
        assert settings.chat_templates == {"default": TEMPLATE}, name
        assert settings.sampling == {"temperature": 0.2}, name


def test_a_descendant_continues_a_text(paths: dict[str, pathlib.Path]) -> None:
    model = loaded(paths["again.gguf"])
    request = text_request(model.tokenizer, "Hello", max_new_tokens=4)
    assert request.prompt_ids[0] != 1
    assert 2 in request.stop_ids
    (completion,) = generate(model, [request])
    assert 0 < len(completion.token_ids) <= 4
