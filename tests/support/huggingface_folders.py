"""Hugging Face folders that say something about text, in the files of their time."""

import functools
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from support.foreign import TINY
from support.huggingface_tokenizers import small_model, their_tokenizer
from support.models import random_params

from llama_jax.checkpoint.model_folder import save_params
from llama_jax.conversion import convert
from llama_jax.text.settings import AddedToken
from llama_jax.text.tokenizer import Tokenizer

CONFIG = TINY.replace(vocab_size=326, num_layers=1)
"""Of the models: 320 pieces, six more rows."""

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADDED = {
    320: AddedToken("[PAD]"),
    321: AddedToken("<|im_start|>"),
    322: AddedToken("<|im_end|>"),
    324: AddedToken("zorblat", special=False, normalized=True),
}
"""Added tokens with a gap at 323."""


def decoder_of(tokens: Mapping[int, AddedToken]) -> dict[str, Any]:
    """The `added_tokens_decoder` of `tokenizer_config.json`."""
    fields = {id: dict(token._asdict()) for id, token in tokens.items()}
    return {str(id): {"content": f.pop("text"), **f} for id, f in fields.items()}


def json_of(rule: str = "always", **changes: Any) -> dict[str, Any]:
    """A `tokenizer.json` with ChatML's tokens, as `tokenizers` writes it."""
    added = {320: AddedToken("<|im_start|>"), 321: AddedToken("<|im_end|>")}
    spec = json.loads(their_tokenizer(small_model(), added, rule).to_str())  # type: ignore[arg-type]
    return {**spec, **changes}


def template_processing(*, begins: bool, ends: bool = False) -> dict[str, Any]:
    """The `post_processor` of a `tokenizer.json`."""
    before = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * begins
    after = [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * ends
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*before, *text, *after],
        "pair": [*before, *text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            name: {"id": name, "ids": [id], "tokens": [name]}
            for name, id in (("<s>", 1), ("</s>", 2))
        },
    }


CHATML = {
    "tokenizer.model": small_model(),
    "added_tokens.json": {"<|im_end|>": 322, "<|im_start|>": 321, "[PAD]": 320},
    "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "pad_token": "[PAD]",
        "add_bos_token": False,
        "added_tokens_decoder": decoder_of(ADDED),
        "chat_template": [
            {"name": "default", "template": TEMPLATE},
            {"name": "tool_use", "template": "{{ tools }}"},
        ],
    },
    "generation_config.json": {
        "eos_token_id": [2, 322], "do_sample": True, "temperature": 0.7, "top_k": 40,
        "top_p": 0.95, "repetition_penalty": 1.1,
    },
}  # fmt: skip
"""A folder that says everything."""


def write_folder(
    path: pathlib.Path, files: Mapping[str, Any], *, vocab_size: int = CONFIG.vocab_size
) -> pathlib.Path:
    """Write a model with these tokenizer files: bytes, text, or JSON."""
    path.mkdir()
    config, weights = _model(vocab_size)
    fields = json.loads(config) | files.get("config.json", {})
    files = {**files, "config.json": fields, "model.safetensors": weights}
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name).write_text(text, "utf-8")
    return path


@functools.cache
def _model(vocab_size: int) -> tuple[bytes, bytes]:
    """Configuration and weights."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pathlib.Path(folder) / "ours", pathlib.Path(folder) / "hf"
        tokenizer = Tokenizer(small_model())
        model = CONFIG.replace(vocab_size=vocab_size)
        save_params(ours, random_params(model), model, tokenizer=tokenizer)
        convert(ours, theirs, target_format="hf")
        config = json.loads((theirs / "config.json").read_text())
        del config["eos_token_id"], config["bos_token_id"]
        weights = (theirs / "model.safetensors").read_bytes()
    return json.dumps(config).encode(), weights
