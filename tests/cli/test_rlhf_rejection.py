"""`rlhf rejection` as a command, in two rounds on the bundled model."""

import json
import pathlib
from typing import Any

import pytest
from support.commands import run_command

from llama_jax.rlhf.__main__ import main

REWARD = """
def brevity(prompts, answers):
    return [-len(answer) for answer in answers]
"""


@pytest.fixture
def files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    (tmp_path / "rejection_test_rewards.py").write_text(REWARD)
    prompts = [{"text": "Once upon a time"}, {"prompt": "The cat"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


REQUIRED = (
    "rejection", "--input", "in.jsonl", "--reward", "rejection_test_rewards:brevity",
    "--max-new-tokens", "4",
)  # fmt: skip


def read(folder: pathlib.Path) -> list[Any]:
    text = (folder / "records.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_two_rounds_keep_the_best_answers(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (*REQUIRED, "--num-samples", "2", "--allow-cut")
    status, out, err = run_command(
        main, capsys, *argv, "--temperature", "0.7", "1.5", "--output", "one",
        "--seed", "3",
    )  # fmt: skip
    assert status == 0, err
    assert [line.split()[1:4:2] for line in out.splitlines()[2:6]] == [
        ["0.7", "1"], ["0.7", "2"], ["1.5", "1"], ["1.5", "2"],
    ]  # fmt: skip
    assert out.splitlines()[-1] == f"2 records in {pathlib.Path('one/records.jsonl')}"
    assert "seed 3" in err
    names = {file.name for file in (files / "one").iterdir()} - {"rewards.png"}
    assert names == {"samples.jsonl", "records.jsonl", "report.json", "report.md"}
    first = read(files / "one")
    assert all(len(record["rewards"]) == 4 for record in first)

    status, _, err = run_command(
        main, capsys, *argv, "--output", "two", "--keep-from", "one", "--seed", "4",
        "--system-prompt", "Be brief.",
    )  # fmt: skip
    assert status == 0, err
    for before, after in zip(first, read(files / "two"), strict=True):
        assert after["prompt"] == before["prompt"]
        assert after["reward"] >= before["reward"] == after["rewards"][-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--output", "o", "--temperature", "0"), "all 8 answers to a prompt would be"),
        (("--output", "o", "--temperature", "1", "1"), "has a number twice"),
        (("--output", "o", "--temperature", "1", "-1"), "temperature is -1.0"),
        (("--output", "o", "--safety-model", "d"), "no effect without --reward-model"),
        (("--output", "o", "--keep-from", "nowhere"), "nowhere: cannot be read"),
        (("--output", "o", "--num-samples", "1"), "no answer ended within"),
        ((), "--output"),
    ],
)
def test_bad_input_is_one_sentence(
    files: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    words: str,
) -> None:
    status, _, err = run_command(main, capsys, *REQUIRED, *argv)
    assert status == 2
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


def test_the_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "rejection" in capsys.readouterr().out
