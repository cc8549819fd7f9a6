"""GGUF files, run by llama.cpp.

Needs `LLAMA_JAX_NODE_LLAMA_CPP`, a folder in which `npm install node-llama-cpp` was
run; that package contains llama.cpp, compiled.
"""

import json
import os
import pathlib
import random
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.foreign import TINY, every_kind
from support.foreign_gguf import write
from support.models import random_params
from support.tokenizers import byte_level_json

from llama_jax.checkpoint.lazy_leaf import lazy_leaves
from llama_jax.config import LlamaConfig
from llama_jax.conversion import gguf_byte_level
from llama_jax.conversion.gguf import read_gguf, write_gguf
from llama_jax.conversion.gguf_byte_level import SPLIT_RULES
from llama_jax.conversion.llama2c import read_llama2c
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.conversion.source import LazyModel
from llama_jax.generation.generate import generate
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.loading import load
from llama_jax.model.transformer import Llama, apply
from llama_jax.runtime import Runtime
from llama_jax.text.byte_level_json import make_byte_level_json, merge_pairs
from llama_jax.text.settings import AddedToken, TextSettings, added_token
from llama_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

# Absolute, of logits. Below float32, llama.cpp also rounds the activations to the type
# of the weights before it multiplies; we compute in float32.
CLOSE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1, "q8_0": 5e-1}
PROMPT = "Once upon a time, Lily"
TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    " leading,  double and trailing spaces  ",
    "naïve Größe, Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "日本語と中文，한국어 🐕‍🦺 12345",
    "def f(x):\n\treturn x**2\n\n",
    "<s> </s> <0x41> [INST] ﬁ ½",
    " ",
)
# Reads a job from a JSON file; writes the logits after all tokens but the last to one
# file, everything else as JSON to another.
PROGRAM = """
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
const entry = `${process.argv[2]}/node_modules/node-llama-cpp/dist/index.js`;
const {getLlama} = await import(pathToFileURL(entry));
const job = JSON.parse(readFileSync(process.argv[3], "utf-8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: job.model});
const context = await model.createContext({
  contextSize: 256, threads: 1, flashAttention: false,
  experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
});
const sequence = context.getSequence();
const inputs = job.tokens.slice(0, -1);
const outputs = await sequence.controlledEvaluate(
  inputs.map((id) => [id, {generateNext: {logits: true}}]));
const size = outputs[0].next.logits.size;
const logits = new Float32Array(inputs.length * size);
outputs.forEach((output, row) => {
  for (const [id, logit] of output.next.logits) logits[row * size + id] = logit;
});
writeFileSync(job.logits, logits);
await sequence.clearHistory();
const greedy = [];
for await (const id of sequence.evaluate(job.prompt, {temperature: 0})) {
  greedy.push(id);
  if (greedy.length == job.count) break;
}
writeFileSync(job.answer, JSON.stringify({
  greedy, text: model.detokenize(greedy),
  texts: job.texts.map((text) => [...model.tokenize(text)]),
  special: [model.tokens.bos, model.tokens.eos],
  begins: model.tokens.shouldPrependBosToken,
}));
process.exit(0);
"""

# Reads texts and files of models; writes what their vocabularies make of the texts.
TOKENIZE = """
import {readFileSync, writeFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
const entry = `${process.argv[2]}/node_modules/node-llama-cpp/dist/index.js`;
const {getLlama} = await import(pathToFileURL(entry));
const job = JSON.parse(readFileSync(process.argv[3], "utf-8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const answers = [];
for (const modelPath of job.models) {
  const model = await llama.loadModel({modelPath, vocabOnly: true});
  const ids = [...Array(job.size).keys()];
  answers.push({
    plain: job.texts.map((text) => [...model.tokenize(text)]),
    marked: job.texts.map((text) => [...model.tokenize(text, true)]),
    ends: ids.filter((id) => model.isEogToken(id)),
    special: [model.tokens.bos, model.tokens.eos],
    begins: model.tokens.shouldPrependBosToken,
  });
  await model.dispose();
}
writeFileSync(job.answer, JSON.stringify(answers));
process.exit(0);
"""


@pytest.fixture(scope="module")
def folder() -> pathlib.Path:
    """Return the folder of node-llama-cpp."""
    named = os.environ.get("LLAMA_JAX_NODE_LLAMA_CPP")
    if named is None or shutil.which("node") is None:
        pytest.skip(
            "needs node, and a folder with `npm install node-llama-cpp` in "
            "LLAMA_JAX_NODE_LLAMA_CPP"
        )
    return pathlib.Path(named)


def run(
    folder: pathlib.Path,
    model: pathlib.Path,
    *,
    tokens: Sequence[int],
    prompt: Sequence[int],
    count: int,
    texts: Sequence[str] = (),
) -> tuple[dict[str, Any], np.ndarray]:
    """Run llama.cpp; return its answer, and the logits after the tokens."""
    job, answer, file, program = (
        model.with_suffix(suffix) for suffix in (".job", ".json", ".logits", ".mjs")
    )
    fields = {
        "model": str(model),
        "answer": str(answer),
        "logits": str(file),
        "tokens": list(map(int, tokens)),
        "prompt": list(prompt),
        "count": count,
        "texts": list(texts),
    }
    job.write_text(json.dumps(fields))
    program.write_text(PROGRAM)
    node(program, folder, job)
    logits = np.fromfile(file, np.float32).reshape(len(tokens) - 1, -1)
    return json.loads(answer.read_text()), logits


def node(program: pathlib.Path, folder: pathlib.Path, job: pathlib.Path) -> None:
    completed = subprocess.run(
        ["node", program, folder, job],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr


def our_logits(path: pathlib.Path, tokens: Sequence[int]) -> np.ndarray:
    loaded = load(path, runtime=Runtime(dtype="float32"))
    logits, _ = apply(loaded.model, loaded.params, jnp.asarray([tokens]))
    return np.asarray(logits)[0, :-1]


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("name", ["stories15M", "stories260K"])
def test_llama_cpp_generates_our_story(
    tmp_path: pathlib.Path,
    assets: pathlib.Path,
    folder: pathlib.Path,
    name: str,
    dtype: Any,
) -> None:
    source = read_llama2c(assets / "weights" / f"{name}.bin")
    if name == "stories15M":
        tokenizer = Tokenizer.from_file(assets / "tokenizers" / "llama2.model")
    else:
        tokenizer = Tokenizer(
            read_llama2c_tokenizer(assets / "tokenizers" / "tok512.bin")
        )
    path = tmp_path / "stories.gguf"
    write_gguf(path, LazyModel(source.config, source.leaves(), tokenizer), dtype=dtype)
    prompt = tokenizer.encode(PROMPT, bos=True, eos=False)
    ours = load(path, runtime=Runtime(dtype="float32"))
    greedy = Sampling(temperature=0)
    request = Request(
        prompt, max_new_tokens=80, sampling=greedy, stop_ids=(tokenizer.eos_id,)
    )
    (story,) = generate(ours, [request])
    tokens = [*prompt, *story.token_ids]
    theirs, logits = run(
        folder, path, tokens=tokens, prompt=prompt, count=80, texts=TEXTS
    )
    assert theirs["special"] == [tokenizer.bos_id, tokenizer.eos_id]
    assert theirs["begins"]
    for text, ids in zip(TEXTS, theirs["texts"], strict=True):
        assert ids == tokenizer.encode(text, bos=False, eos=False), text
    np.testing.assert_allclose(
        logits, our_logits(path, tokens), rtol=0, atol=CLOSE[dtype]
    )
    if dtype != "q8_0":  # llama.cpp quantizes activations too, and may differ in words
        assert tuple(theirs["greedy"]) == story.token_ids
        assert theirs["text"] == story.text


@every_kind
def test_llama_cpp_gives_our_logits(
    tmp_path: pathlib.Path,
    folder: pathlib.Path,
    config: LlamaConfig,
    tiny_tokenizer: Tokenizer,
) -> None:
    params = random_params(config)
    path = tmp_path / "x.gguf"
    write_gguf(
        path, LazyModel(config, lazy_leaves(params), tiny_tokenizer), dtype="float32"
    )
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=48).tolist()
    _, actual = run(folder, path, tokens=tokens, prompt=[1], count=1)
    model = Llama(config, Runtime(dtype="float32"))
    expected, _ = apply(model, params, jnp.asarray([tokens]))
    expected = np.asarray(expected)[0, :-1]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=CLOSE["float32"])


ALPHABET = "once upon a TIME it's 1234,.!?\n\t éßÀ你好世界 हि 🦙 ▁"
WORDS = ("zorblat", "a time", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>")
WORD = {"special": False}


def random_texts(count: int) -> list[str]:
    """Random strings in which special tokens and words are frequent."""
    rng = random.Random(0)

    def part() -> str:
        if rng.random() < 0.3:
            return rng.choice(WORDS)
        return "".join(rng.choices(ALPHABET, k=rng.randrange(1, 8)))

    return ["".join(part() for _ in range(rng.randrange(1, 9))) for _ in range(count)]


def sentencepiece_tokenizer(assets: pathlib.Path) -> Tokenizer:
    """Llama 2's, with the added tokens of a ChatML fine-tune."""
    added = {
        32_000: AddedToken("<|im_end|>"),
        32_001: AddedToken("<|im_start|>"),
        32_002: AddedToken("zorblat", special=False),
        32_003: AddedToken("a time", special=False),
    }
    settings = TextSettings(
        added_tokens=added, eos_id=32_000, end_ids=(2,), prefix_space="always"
    )
    path = assets / "tokenizers" / "llama2.model"
    return Tokenizer.from_file(path, settings=settings)


def test_llama_cpp_gives_our_ids(
    tmp_path: pathlib.Path,
    assets: pathlib.Path,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For every name of a rule that splits text, and with special and plain words."""
    sentencepiece = sentencepiece_tokenizer(assets)
    files = {"llama": sentencepiece}
    names = [name for name in SPLIT_RULES if name != "tekken"]
    spec = byte_level_json()
    model = spec["model"]
    for name in names:
        rule = SPLIT_RULES[name]
        content = make_byte_level_json(
            model["vocab"],
            merge_pairs(model["merges"]),
            {token["id"]: added_token(token) for token in spec["added_tokens"]},
            patterns=rule.patterns,
            ignore_merges=rule.ignore_merges,
        )
        settings = TextSettings(bos_id=1, eos_id=2, end_ids=(0,), add_bos=rule.add_bos)
        files[name] = Tokenizer(json.dumps(content).encode(), settings=settings)
    paths = []
    for name, tokenizer in files.items():
        paths.append(tmp_path / f"{name}.gguf")
        size = 32_004 if tokenizer is sentencepiece else 402
        config = TINY.replace(vocab_size=size, embed_dim=2, num_layers=1)
        with monkeypatch.context() as patch:
            if tokenizer is not sentencepiece:  # the first of equal rules is written
                rules = {name: SPLIT_RULES[name]}
                patch.setattr(gguf_byte_level, "SPLIT_RULES", rules)
            write(paths[-1], config, tokenizer=tokenizer)
    job, program = tmp_path / "job", tmp_path / "tokenize.mjs"
    texts = [*TEXTS, *random_texts(3000)]
    fields = {
        "models": [str(path) for path in paths],
        "texts": texts,
        "size": 402,
        "answer": str(tmp_path / "answer"),
    }
    job.write_text(json.dumps(fields))
    program.write_text(TOKENIZE)
    node(program, folder, job)
    answers = json.loads((tmp_path / "answer").read_text())
    for (name, tokenizer), path, theirs in zip(
        files.items(), paths, answers, strict=True
    ):
        ours, _ = read_gguf(path).find_tokenizer()
        assert ours.settings == tokenizer.settings, name
        assert theirs["special"] == [ours.bos_id, ours.eos_id], name
        assert theirs["begins"] is ours.settings.add_bos, name
        ends = {id for id in ours.end_ids if id < 402}
        assert ends == {*theirs["ends"]}, name
        for text, plain, marked in zip(
            texts, theirs["plain"], theirs["marked"], strict=True
        ):
            assert ours.encode(text, bos=False, eos=False) == plain, (name, text)
            assert ours.encode_marked(text) == marked, (name, text)
