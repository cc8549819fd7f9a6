"""`sample --input`: prompts from files, completions into a file."""

import json
import pathlib

import pytest
from support.commands import run_command

from llama_jax import sample

RECORDS = [
    {"text": "Once upon a time"},
    {"prompt": "The cat", "response": "sat"},
    {"messages": [{"role": "user", "content": "Hi"}]},
]


def write(path: pathlib.Path) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(path)


def test_prompts_are_completed_and_a_cut_file_is_continued_with_its_seed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    argv = ["--input", write(tmp_path / "in.jsonl"), "--output", str(output)]
    argv += ["--max-new-tokens", "4"]
    status, out, err = run_command(sample.main, capsys, *argv)
    assert (status, out) == (0, "")
    assert err.splitlines()[0].startswith("1 of 3 records have an answer, which")
    assert err.splitlines()[1].startswith(f"3 prompts in {output}: 12 new tokens, ")
    assert len(err.splitlines()) == 2  # no bar: standard error is no terminal
    whole = output.read_text("utf-8")
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["prompt"] for line in lines] == [
        "Once upon a time", "The cat", RECORDS[2]["messages"],
    ]  # fmt: skip
    assert {line["settings"]["checkpoint"] for line in lines} == {"bundled"}
    output.write_text(whole[: len(whole) // 2], "utf-8")
    _, _, err = run_command(sample.main, capsys, *argv)
    assert "3 prompts (1 of them before)" in err
    assert output.read_text("utf-8") == whole


def test_with_a_system_message_texts_are_messages(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    run_command(
        sample.main, capsys, "--input", write(tmp_path / "in.jsonl"), "--system", "Be.",
        "--output", str(output), "--max-new-tokens", "1", "--seed", "1",
    )  # fmt: skip
    lines = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert all(line["prompt_tokens"] > 20 for line in lines)
    assert lines[0]["settings"]["system"] == "Be."


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--input", "a.jsonl"], "--input: has no effect without --output"),
        (["--output", "a.jsonl"], "--output: has no effect without --input"),
        (["--on-bad", "drop"], "--on-bad: has no effect without --input"),
        (
            ["--input", "a.jsonl", "--output", "b.jsonl", "--json"],
            "--json: has no effect with --input",
        ),
        (["--input", "a.jsonl", "--prompt", "x"], "not allowed with argument"),
        (["--input", "no.jsonl", "--output", "b.jsonl"], "no.jsonl: cannot be read"),
    ],
)
def test_flags_without_effect_are_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    status, out, err = run_command(sample.main, capsys, *argv)
    assert (status, out) == (2, "")
    assert words in err
