"""`rlhf ppo` as a command, on the bundled model."""

import json
import pathlib

import pytest
from support.commands import run_command

import llama_jax
from llama_jax.rlhf.__main__ import main
from llama_jax.train.metrics import read_metrics

REWARD = """
def brevity(prompts, answers):
    return [-len(answer) for answer in answers]
"""


@pytest.fixture
def files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    (tmp_path / "ppo_test_rewards.py").write_text(REWARD)
    prompts = [{"text": "Once upon a time"}, {"prompt": "The cat"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


REQUIRED = (
    "ppo", "--input", "in.jsonl", "--reward", "ppo_test_rewards:brevity", "--output",
    "run", "--batch-size", "4", "--mini-batch", "4", "--seq-length", "32",
    "--max-new-tokens", "4",
)  # fmt: skip


def test_adapters_are_trained_and_a_run_goes_on(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (
        *REQUIRED, "--estimator", "rloo", "--num-samples", "2", "--lora-rank", "2",
        "--steps", "2",
    )  # fmt: skip
    status, _, err = run_command(main, capsys, *argv)
    assert status == 0, err
    assert "run: adapter, after 2 steps" in err
    records = read_metrics(files / "run" / "metrics.jsonl")
    assert [record["first_ratio_error"] for record in records] == [0.0, 0.0]
    assert len(list((files / "run" / "rollouts").iterdir())) == 2
    loaded = llama_jax.load(adapter=files / "run" / "adapter")
    assert llama_jax.text_completion(loaded, ["The"], max_new_tokens=2)[0].text
    status, _, err = run_command(main, capsys, *argv, "--resume")
    assert status == 0, err
    status, _, err = run_command(main, capsys, *argv)
    assert status == 2
    assert "run" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--estimator", "grpo"), "num_samples: grpo compares answers"),
        (("--estimator", "rloo", "--decay", "0.9"), "--decay: has no effect"),
        (("--lora-alpha", "3"), "--lora-alpha: has no effect without --lora-rank"),
        (("--temperature", "0"), "temperature: must be positive"),
    ],
)
def test_bad_input_is_one_sentence(
    files: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: str,
) -> None:
    status, _, err = run_command(main, capsys, *REQUIRED, "--steps", "1", *flags)
    assert status == 2
    assert words in err
