"""The benchmark of the data pipeline runs and counts its tokens."""

import json
import pathlib

import pytest
from support.commands import run_command

from llama_jax.bench.__main__ import main


@pytest.mark.parametrize("packing", ["pad", "split"])
def test_the_loader_and_its_stages_are_measured(
    tmp_path: pathlib.Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join("Once upon a time" * n for n in range(1, 40)))
    options = ["--packing", packing, "--length", "64", "--batch", "4", "--json"]
    assert main(["data", str(path), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["benchmark"], report["packing"]) == ("data", packing)
    assert report["records"] == 39
    assert report["tokens_per_s"] == pytest.approx(report["tokens"] / report["seconds"])
    for stage in ("read", "encode", "pack"):
        assert report[f"{stage}_tokens_per_s"] > 0
    assert report["fill_rate"] > (0.95 if packing == "split" else 0.5)


def test_text_is_generated_without_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["data"]) == 0
    printed = capsys.readouterr().out
    assert "files generated" in printed
    assert "tokenizing alone" in printed


def test_a_missing_file_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_command(main, capsys, "data", "none.jsonl")
    assert status == 2
    assert "none.jsonl: cannot be read" in err
