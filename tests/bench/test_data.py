"""The benchmark of the data pipeline: that it runs, and what it counts."""

import json
import pathlib

import pytest

from llama_jax.bench import __main__ as entry


@pytest.mark.parametrize("packing", ["pack", "pad", "split"])
def test_the_loader_and_its_parts_are_measured(
    tmp_path: pathlib.Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join("Once upon a time" * n for n in range(1, 40)))
    options = ["--packing", packing, "--length", "64", "--batch", "4", "--json"]
    assert entry.main(["data", str(path), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["benchmark"], found["packing"]) == ("data", packing)
    assert found["records"] == 39
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["seconds"])
    for part in ("read", "encode", "pack"):
        assert found[f"{part}_tokens_per_s"] > 0
    assert found["fill_rate"] > (0.95 if packing == "split" else 0.5)


def test_text_is_made_up_where_no_file_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert entry.main(["data"]) == 0
    printed = capsys.readouterr().out
    assert "files made up" in printed
    assert "tokenizing alone" in printed


def test_files_that_cannot_be_read_end_with_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert entry.main(["data", "none.jsonl"]) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
