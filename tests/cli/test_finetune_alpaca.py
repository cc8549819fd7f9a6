"""A story model becomes one that answers: stories15M on real Alpaca records."""

import dataclasses
import json
import pathlib

import pytest

from llama_jax import finetune
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.generation.generate import generate
from llama_jax.generation.request import chat_request
from llama_jax.generation.sampling import Sampling
from llama_jax.loading import load
from llama_jax.train.metrics import read_metrics

LONGEST = 64  # tokens of an answer


def ended(loaded: Loaded, records: list[dict[str, str]]) -> int:
    """How many greedy answers end by the token that ends answers."""
    requests = [
        chat_request(
            loaded.tokenizer,
            [{"role": "user", "content": record["instruction"]}],
            format="alpaca",
            sampling=Sampling(temperature=0),
            max_new_tokens=LONGEST,
        )
        for record in records
    ]
    # The end-of-sequence token alone counts, not the format's stop string.
    requests = [dataclasses.replace(request, stop=()) for request in requests]
    answers = generate(loaded, requests)
    return sum(c.finish_reason == "stop" and c.text.strip() != "" for c in answers)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_story_model_learns_to_answer_and_to_stop(
    assets: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = str(assets / "weights" / "stories15M.bin")
    tokenizer = str(assets / "tokenizers" / "llama2.model")
    records = json.loads((assets / "text" / "alpaca-999.json").read_text())
    parts = {"train": records[:-99], "held-out": records[-99:]}
    for name, part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    run = tmp_path / "run"
    flags = [
        "--checkpoint", model, "--tokenizer", tokenizer, "--format", "alpaca",
        "--data", str(tmp_path / "train.json"), "--output", str(run),
        "--eval-data", str(tmp_path / "held-out.json"), "--seq-length", "128",
        "--batch-size", "8", "--learning-rate", "3e-4", "--warmup", "5",
        "--steps", "40", "--remat", "none",
    ]  # fmt: skip
    assert finetune.main(flags) == 0
    found = read_metrics(run / "metrics.jsonl")
    assert len(found) == 40
    assert found[-1]["eval_loss"] < found[0]["eval_loss_before"] - 1.0
    # What nobody trained on, and the story model would never end.
    asked = [
        one
        for one in parts["held-out"]
        if len(one["instruction"]) < 60 and not one["input"]
    ][:12]
    assert ended(load(model, tokenizer=tokenizer), asked) == 0
    assert ended(load(run / "model"), asked) >= 6
