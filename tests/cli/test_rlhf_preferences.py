"""`rlhf reward`, `rlhf score` and `rlhf dpo` as commands, on a tiny model."""

import json
import pathlib

import numpy as np
import pytest
from support.commands import run_command
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.rlhf.__main__ import main
from llama_jax.train.metrics import read_metrics

WORDS = ("the tea", "he", "she", "a", "tea")
TRAIN = (
    "--checkpoint", "base", "--data", "pairs.jsonl", "--output", "run", "--format",
    "wizardlm-7b", "--batch-size", "8", "--learning-rate", "1e-2", "--warmup", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("preferences")
    records = [
        {
            "prompt": word,
            "chosen": f"{other} he",
            "rejected": f"{other} she",
            "rating": number % 4,
        }
        for number, word in enumerate(WORDS)
        for other in WORDS
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    answers = [
        {"prompt": "a", "response": "tea he"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a", "completion": "tea she"},
    ]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    save_params(
        folder / "base", random_params(TALKING), TALKING, tokenizer=tiny_tokenizer()
    )
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def reward_model(folder: pathlib.Path) -> str:
    """The run of a reward model of adapters."""
    run = str(folder / "reward")
    argv = ["reward", *TRAIN, "--output", run, "--lora-rank", "4", "--margins", "small"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*argv, "--eval-data", "pairs.jsonl", "--epochs", "6"]) == 0
    return run


def test_a_reward_model_of_adapters_is_trained_and_reported(
    reward_model: str, folder: pathlib.Path
) -> None:
    records = read_metrics(folder / "reward" / "metrics.jsonl")
    assert len(records) == 19  # 25 pairs, 6 epochs, batches of 8
    assert records[-1]["eval_accuracy"] > 0.9
    assert records[-1]["tokens"] < 8 * 2 * 32
    report = (folder / "reward" / "report.md").read_text("utf-8")
    for words in (
        "| accuracy | 1",
        "| accuracy of preferring the shorter answer |",
        "| correlation of score and length |",
        "| accuracy, significantly better |",
        "| score | chosen | rejected |",
    ):
        assert words in report
    loaded = llama_jax.load(folder / "base", adapter=folder / "reward" / "adapter")
    assert loaded.model.config.head == "scalar"


def test_scores_of_pairs_and_of_answers_agree(
    reward_model: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("score", "--checkpoint", "base", "--adapter", f"{reward_model}/adapter")
    argv = (*argv, "--format", "wizardlm-7b")
    status, out, err = run_command(main, capsys, *argv, "--data", "pairs.jsonl")
    assert status == 0, err
    assert "pairs: 25\naccuracy: " in err
    pairs = [json.loads(line) for line in out.splitlines()]
    last = pairs[-6]  # "a", "tea"
    assert last["location"] == "pairs.jsonl, line 20"
    assert last["rating"] == "significantly better"
    command = (*argv, "--data", "answers.jsonl", "--output", "scores.jsonl")
    status, out, err = run_command(main, capsys, *command)
    assert (status, out) == (2, "")
    assert "answers.jsonl, line 2: has no answer to score" in err
    status, out, err = run_command(main, capsys, *command, "--on-bad", "drop")
    assert (status, out) == (0, ""), err
    assert "dropped: answers.jsonl, line 2" in err
    lines = (folder / "scores.jsonl").read_text("utf-8").splitlines()
    answers = list(map(json.loads, lines))
    np.testing.assert_allclose(
        [line["score"] for line in answers], [last["chosen"], last["rejected"]], 1e-5
    )
    assert [line["tokens"] for line in answers] == last["tokens"]


def test_a_policy_shares_its_weights_with_reward_model_and_critic(
    reward_model: str,
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "prompts.jsonl").write_text(json.dumps({"text": "the tea"}))
    argv = (
        "ppo", "--checkpoint", "base", "--input", "prompts.jsonl", "--steps", "1",
        "--batch-size", "4", "--mini-batch", "4", "--seq-length", "16",
        "--max-new-tokens", "4", "--lora-rank", "2", "--quantize", "int8",
        "--reward-model", f"{reward_model}/adapter",
    )  # fmt: skip
    critic = ("--critic", f"{reward_model}/adapter")
    output = ("--output", str(tmp_path / "run"))
    status, _, err = run_command(main, capsys, *argv, *critic, *output)
    assert status == 0, err
    record = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert record["kl"] == 0.0
    save_params(
        folder / "another", random_params(TALKING, 5), TALKING,
        tokenizer=tiny_tokenizer(),
    )  # fmt: skip
    output = ("--output", str(tmp_path / "other"))
    status, _, err = run_command(
        main, capsys, *argv, "--checkpoint", "another", *output
    )
    assert status == 2
    assert "so they cannot share them" in err


def test_a_run_resumes_and_refuses_another_setting(
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    reward_model: str,
) -> None:
    status, _, err = run_command(
        main, capsys, "reward", "--resume", "--output", reward_model
    )
    assert status == 0
    assert "this run is finished" in err
    for flags, words in (
        (("--safety-weight", "0.5"), "safety_weight: is 0.5, but the run was started"),
        (("--lora-rank", "2"), "lora_rank: is 2, but"),
    ):
        status, _, err = run_command(
            main, capsys, "reward", "--resume", "--output", reward_model, *flags
        )
        assert status == 2
        assert words in err


def test_preferences_are_learnt_directly(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("dpo", *TRAIN, "--output", "dpo", "--steps", "6", "--lora-rank", "4")
    status, _, err = run_command(main, capsys, *argv, "--beta", "0.5")
    assert status == 0, err
    assert "data: 25 pairs" in err
    assert "dpo: adapter, metrics.jsonl" in err
    records = read_metrics(folder / "dpo" / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert records[-1]["margin"] > 0.1
    assert records[-1]["loss"] < records[0]["loss"]
    assert llama_jax.load("base", adapter="dpo/adapter")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("reward", "--output", "x"), "--data is required"),
        (("reward", "--output", "x", "--resume"), "there is no run to resume"),
        (("reward", *TRAIN, "--final", "0", "--schedule", "constant"), "--final: has"),
        (("reward", *TRAIN, "--safety-weight", "-1"), "safety_weight: must be 0 or"),
        (("reward", *TRAIN, "--lora-alpha", "2"), "--lora-alpha: has no effect"),
        (("reward", *TRAIN, "--seq-length", "64"), "64 is more than the model's"),
        (("reward", *TRAIN, "--seq-length", "4"), "no pair can be learnt from"),
        (("dpo", *TRAIN, "--beta", "0"), "beta: must be positive"),
        (("dpo", *TRAIN, "--loss", "ipo", "--margins", "small"), "--margins: has no"),
        (
            ("score", "--checkpoint", "base", "--data", "pairs.jsonl"),
            "needs a model with head 'scalar'",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    status, _, err = run_command(main, capsys, *argv)
    assert status == 2
    assert words in err
    assert "Traceback" not in err
