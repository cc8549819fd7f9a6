"""GGUF files, run by llama.cpp.

Needs `LLAMA_JAX_NODE_LLAMA_CPP`, a folder in which `npm install node-llama-cpp` was
run; that package contains llama.cpp, compiled.
"""

import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.foreign import every_kind
from support.models import random_params

from llama_jax.checkpoint.lazy_leaf import lazy_leaves
from llama_jax.config import LlamaConfig
from llama_jax.conversion.gguf import write_gguf
from llama_jax.conversion.llama2c import read_llama2c
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.conversion.source import LazyModel
from llama_jax.generation.generate import generate
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.loading import load
from llama_jax.model.transformer import Llama, apply
from llama_jax.runtime import Runtime
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
    completed = subprocess.run(
        ["node", program, folder, job],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    logits = np.fromfile(file, np.float32).reshape(len(tokens) - 1, -1)
    return json.loads(answer.read_text()), logits


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
