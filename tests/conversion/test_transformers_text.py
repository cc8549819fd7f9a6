"""Token ids of Hugging Face folders and exports against `transformers`.

It runs with the version that is installed, 4 or 5, and with that of the interpreter in
LLAMA_JAX_TRANSFORMERS, which needs nothing else. In exports, all tokenizers (fast and
slow) give our ids. Of sources, those that read the folder as the fast ones of version 4
do; SOURCES lists the others.
"""

import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
from typing import Any

import pytest
from support.huggingface_folders import (
    ADDED,
    CHATML,
    decoder_of,
    json_of,
    template_processing,
    write_folder,
)
from support.huggingface_tokenizers import small_model
from support.tokenizers import byte_level_json

from llama_jax.conversion import convert, open_source
from llama_jax.text.settings import AddedToken

INTERPRETERS = [os.environ.get("LLAMA_JAX_TRANSFORMERS", "")]
if importlib.util.find_spec("transformers"):
    INTERPRETERS.append(sys.executable)
INTERPRETERS = list(filter(None, INTERPRETERS))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETERS, reason="needs transformers"),
]

COUNT = 3000
PARTS = (
    *(token.text for token in ADDED.values()), "<s>", "</s>", "<unk>", " ", "  ", "xx",
    "once upon a", "time", "a", "ü", "é", "\n", "▁", "undersea", "sea_", "<ent>", "🦙",
    ".", "12", "def f(x):", "你好",
)  # fmt: skip
MODEL = {"tokenizer.model": small_model()}
WORDS = {
    320: AddedToken("<|im_start|>"),
    321: AddedToken("<|im_end|>", rstrip=True),
    322: AddedToken("zorblat", special=False, normalized=True),
    323: AddedToken("sea", special=False, single_word=True),
}
BYTE_LEVEL = byte_level_json()
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"}
FOLDERS: dict[str, dict[str, Any]] = {
    "only added_tokens.json": {**MODEL, "added_tokens.json": {"[PAD]": 320}},
    "flags": {
        **MODEL,
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer", "legacy": True,
            "added_tokens_decoder": decoder_of(WORDS),
        },
    },
    "legacy false": {
        **MODEL,
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer", "legacy": False,
            "added_tokens_decoder": decoder_of(WORDS),
        },
    },
    "everything": CHATML,
    "tokenizer.json beside": {
        **MODEL,
        "tokenizer.json": json_of(post_processor=template_processing(begins=True)),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
            "eos_token": "</s>", "unk_token": "<unk>",
        },
    },
    "Metaspace": {
        "tokenizer.json": json_of(
            "first_once", post_processor=template_processing(begins=True, ends=True)
        ),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
            "eos_token": "</s>", "unk_token": "<unk>",
        },
    },
    "user-defined pieces": {
        "tokenizer.model": small_model(user_defined=("<ent>", "sea"))
    },
    "byte-level": {"tokenizer.json": BYTE_LEVEL, "tokenizer_config.json": FAST},
}  # fmt: skip
SOURCES = {
    # A gap in the ids of `added_tokens_decoder` is closed by transformers.
    "everything": (),
    "only added_tokens.json": ("4 slow",),
    "flags": ("4 fast",),
    "legacy false": ("4 fast",),
    "user-defined pieces": ("4 slow",),  # whose ids are SentencePiece's
}
"""Which tokenizers read a folder as we do; all, if it is not listed."""

THEIRS = """
import json, os, sys
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import transformers
version, texts = transformers.__version__.split(".")[0], json.load(sys.stdin)
kinds = {"fast": True, "slow": False} if version == "4" else {"fast": True}
ids = {}
for kind, fast in kinds.items():
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], use_fast=fast)
    marked = [tokenizer(x, add_special_tokens=False).input_ids for x in texts]
    ids[f"{version} {kind}"] = marked, [tokenizer(x).input_ids for x in texts]
json.dump(ids, sys.stdout)
"""


def random_texts() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PARTS, k=rng.randrange(9))) for _ in range(COUNT)]


def our_ids(folder: pathlib.Path, texts: list[str]) -> list[list[list[int]]]:
    """Ids of the texts, and with begin and end of sequence."""
    tokenizer, _ = open_source(folder).find_tokenizer()
    settings = tokenizer.settings
    begin = tokenizer.encode("", bos=settings.add_bos, eos=False)
    end = tokenizer.encode("", bos=False, eos=settings.add_eos)
    marked = [tokenizer.encode_marked(text) for text in texts]
    return [marked, [[*begin, *ids, *end] for ids in marked]]


def their_ids(python: str, folder: pathlib.Path, texts: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-c", THEIRS, folder],
        input=json.dumps(texts), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ids: dict[str, Any] = json.loads(done.stdout)
    return ids


@pytest.mark.parametrize("python", INTERPRETERS, ids=range(len(INTERPRETERS)))
@pytest.mark.parametrize("kind", FOLDERS)
def test_ids_are_those_of_transformers(
    tmp_path: pathlib.Path, kind: str, python: str
) -> None:
    texts = random_texts()
    source = write_folder(tmp_path / "hf", FOLDERS[kind], vocab_size=410)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "export", target_format="hf")
    ours = our_ids(source, texts)
    assert our_ids(tmp_path / "ours", texts) == ours
    assert our_ids(tmp_path / "export", texts) == ours
    for folder in (source, tmp_path / "export"):
        for name, theirs in their_ids(python, folder, texts).items():
            differ = [
                sum(a != b for a, b in zip(*pair, strict=True))
                for pair in zip(theirs, ours, strict=True)
            ]
            print(f"{kind}, {folder.name}, transformers {name}: {differ} differ")
            if folder != source or name in SOURCES.get(kind, (name,)):
                assert differ == [0, 0], (kind, folder.name, name)
