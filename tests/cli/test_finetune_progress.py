"""What people see of a run: a bar in a terminal, lines elsewhere, what was left out."""

import fcntl
import io
import json
import os
import pathlib
import struct
import sys
import termios
from typing import Any

import pytest

from llama_jax import finetune
from llama_jax.cli import progress
from llama_jax.cli.progress import ProgressBar
from llama_jax.loading import bundled

SHORT = {"instruction": "Say hello.", "input": "", "output": "Hello!"}
LONG = {"instruction": "Say it often.", "input": "", "output": "Hello! " * 90}


def record(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 + step, "tokens_per_second": 1500.0, **more}


def test_a_log_gets_a_line_at_intervals(monkeypatch: Any, capsys: Any) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = ProgressBar(10, 20, seconds=30.0)
    for step in range(11, 21):
        now += 12.0
        bar.update(record(step, mfu=0.5))
    bar.print("done")
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 11 of 20: loss 13.0000, 1,500 tokens/s, MFU 50%",
        "step 14 of 20: loss 16.0000, 1,500 tokens/s, MFU 50%, 01:12 left",
        "step 17 of 20: loss 19.0000, 1,500 tokens/s, MFU 50%, 00:36 left",
        "step 20 of 20: loss 22.0000, 1,500 tokens/s, MFU 50%, 00:00 left",
        "done",
    ]


@pytest.mark.parametrize("rows", [40, 0])
def test_a_terminal_with_a_size_gets_a_bar(rows: int, monkeypatch: Any) -> None:
    inside, outside = os.openpty()
    size = struct.pack("HHHH", rows, 120 if rows else 0, 0, 0)
    fcntl.ioctl(outside, termios.TIOCSWINSZ, size)
    with open(outside, "w", encoding="utf-8") as channel:
        monkeypatch.setattr(sys, "stderr", channel)
        bar = ProgressBar(0, 4)
        bar.update(record(1))
        bar.close()
        print("the end", file=channel, flush=True)
        read = b""
        while not read.endswith(b"the end\r\n"):
            read += os.read(inside, 1 << 16)
    os.close(inside)
    said = read.decode().removesuffix("the end\r\n")
    if rows:
        assert "| 1/4 [" in said
        assert "step/s" in said or "s/step" in said
        assert "loss 3.0000, 1,500 tokens/s" in said
    else:
        assert said.rstrip() == "step 1 of 4: loss 3.0000, 1,500 tokens/s"


def test_a_stream_without_a_file_is_no_terminal(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = ProgressBar(0, 1)
    bar.update(record(1))
    assert sys.stderr.getvalue().startswith("step 1 of 1: ")  # type: ignore[attr-defined]


def test_a_run_reports_how_many_records_it_drops(
    tmp_path: pathlib.Path, capsys: Any
) -> None:
    files = []
    for name, items in (("train", [SHORT] * 3 + [LONG]), ("held", [LONG, SHORT])):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(items))
    preset = "L1,D16,N2,F24,V2048"
    flags = [
        "--from-scratch", "--preset", preset, "--tokenizer", str(bundled()),
        "--format", "alpaca", "--seq-length", "128", "--batch-size", "4",
        "--data", str(files[0]), "--eval-data", str(files[1]), "--packing", "pad",
    ]  # fmt: skip
    assert finetune.main([*flags, "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "data: 4 records in 3 rows" in said
    assert f"filled; dropped: 1 long, such as\n  {files[0]}, item 4: has" in said
    assert "held-out loss 7.6" in said
    assert "targets of 2 records; dropped: 1 long\n" in said
    assert "step 1 of 1: loss 7." in said
    assert "| records | dropped: 1 long |" in (tmp_path / "run/report.md").read_text()
    cut = ["--on-long", "truncate", "--output", str(tmp_path / "cut")]
    assert finetune.main([*flags, *cut]) == 0
    said = capsys.readouterr().err
    assert "filled; dropped: none; truncated: 1\n" in said
    assert "targets of 2 records; dropped: none; truncated: 1\n" in said
