"""`rlhf ghost-attention` as a command, on the bundled model."""

import json
import pathlib

import pytest
from support.commands import run_command

from llama_jax.rlhf.__main__ import main


def test_dialogs_and_instructions_become_records(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": text} for text in ("Hi", "And?")]
    messages = [turns[0], {"role": "assistant", "content": "Ho"}, turns[1]]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}))
    (tmp_path / "instructions.txt").write_text("Be brief.\nBe kind.\n")
    output = tmp_path / "out"
    argv = (
        "ghost-attention", "--input", str(tmp_path / "in.jsonl"), "--per-dialog", "2",
        "--instructions", str(tmp_path / "instructions.txt"), "--output", str(output),
        "--seed", "1", "--stop", "a",
    )  # fmt: skip
    status, out, err = run_command(main, capsys, *argv)
    assert status == 0, err
    assert out == f"2 records in {output / 'records.jsonl'}\n"
    lines = (output / "records.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line)["messages"] for line in lines]
    firsts = {record[0]["content"] for record in records}
    assert firsts == {"Be brief.\n\nHi", "Be kind.\n\nHi"}
    assert [record[2]["content"] for record in records] == ["And?", "And?"]
    assert [m.get("train") for m in records[0]] == [None, False, None, True]
    status, _, err = run_command(main, capsys, *argv, "--max-new-tokens", "1")
    assert status == 2
    assert "was written with max_new_tokens 512, not 1" in err
