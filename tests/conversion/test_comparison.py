"""Comparisons, and `verify`, `inspect`, `--dry-run` and memory limit of the command."""

import json
import math
import pathlib
import re
import struct
import time
from typing import Any

import numpy as np
import pytest
from support.foreign import (
    TINY,
    meta_tensors,
    write_llama2c,
    write_llama2c_tokenizer,
    write_meta,
)
from support.type_checks import without_type_checks

from llama_jax.conversion import compare, convert, open_source, prepare_conversion
from llama_jax.conversion.__main__ import main
from llama_jax.conversion.host_memory import anonymous_bytes, track_peak_memory
from llama_jax.conversion.huggingface_config import config_to_hugging_face
from llama_jax.conversion.report import describe_comparison
from llama_jax.conversion.tensor_mapping import source_shapes
from llama_jax.conversion.tensor_tables import HUGGING_FACE
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.model.presets import preset


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    """A llama2.c checkpoint with its tokenizer."""
    write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    return write_llama2c(tmp_path / "x.bin", TINY, meta_tensors(TINY))


def write_changed(folder: pathlib.Path, name: str, factor: float) -> pathlib.Path:
    """Write the same model with one tensor scaled."""
    tensors = meta_tensors(TINY)
    tensors[name] = tensors[name] * np.float32(factor)
    return write_meta(folder, TINY, tensors)


def test_equal_checkpoints_have_no_differences(source: pathlib.Path) -> None:
    other = write_meta(source.parent / "meta", TINY, meta_tensors(TINY))
    comparison = compare(open_source(source), open_source(other, max_seq_len=64))
    assert comparison.same
    assert (comparison.tensors, comparison.equal, comparison.rounded) == (21, 21, 0)
    assert (
        comparison.max_logit_error == comparison.kl == comparison.max_weight_error == 0
    )
    assert comparison.top1_agreement == 1
    assert comparison.first_diverging_layer is None
    assert set(comparison.layer_errors) == {0.0}


def test_a_rounded_checkpoint_is_equal_after_rounding(source: pathlib.Path) -> None:
    convert(source, source.parent / "half", target_format="hf", dtype="bfloat16")
    comparison = compare(open_source(source), open_source(source.parent / "half"))
    assert comparison.same
    assert (comparison.equal, comparison.rounded) == (0, 21)
    assert comparison.max_logit_error > 0
    assert 0 < comparison.kl < 0.1


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("tok_embeddings.weight", -1),
        ("layers.0.attention.wv.weight", 0),
        ("layers.1.feed_forward.w2.weight", 1),
        ("output.weight", None),
    ],
)
def test_the_first_diverging_layer_is_reported(
    source: pathlib.Path, name: str, layer: int | None
) -> None:
    other = write_changed(source.parent / "other", name, 1.5)
    comparison = compare(open_source(source), open_source(other, max_seq_len=64))
    assert not comparison.same
    assert len(comparison.differing) == 1
    assert comparison.equal == 20
    assert comparison.first_diverging_layer == layer
    assert comparison.max_logit_error > 0.1
    assert comparison.max_weight_error == pytest.approx(
        np.abs(meta_tensors(TINY)[name]).max() * 0.5
    )
    assert comparison.differing[0] in "\n".join(describe_comparison(comparison))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_weight_that_is_not_a_number_ends_a_comparison(
    source: pathlib.Path, factor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_changed(source.parent / "other", "norm.weight", factor)
    for pair in ((source, other), (other, source), (other, other)):
        status, out, err = run(capsys, "verify", *pair, "--max-seq-len", "64")
        assert (status, out) == (2, "")
        assert f"{other}: norm.weight has 32 of 32 numbers that are NaN" in err


@pytest.mark.parametrize("order", [1, -1])
def test_tied_and_copied_embeddings_are_the_same_model(
    tmp_path: pathlib.Path, order: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    tied = TINY.replace(tied_embeddings=True)
    source = write_llama2c(tmp_path / "x.bin", tied, meta_tensors(tied))
    other = tmp_path / "meta"
    status, out, _ = run(capsys, source, other, "--to", "meta", "--dry-run")
    assert status == 0
    assert re.search(r"token_embedding .*-> output\.weight", out)
    convert(source, other, target_format="meta")
    both = open_source(source), open_source(other, max_seq_len=64)
    comparison = compare(*both[::order])
    assert (comparison.tensors, comparison.equal, comparison.max_logit_error) == (
        21,
        21,
        0,
    )
    tensors = meta_tensors(tied)
    tensors["output.weight"] = tensors["output.weight"] * 2
    both = (
        open_source(source),
        open_source(write_meta(tmp_path / "untied", TINY, tensors), max_seq_len=64),
    )
    assert compare(*both[::order]).differing == ("lm_head",)


def test_different_models_cannot_be_compared(source: pathlib.Path) -> None:
    smaller = TINY.replace(mlp_dim=88)
    other = write_meta(source.parent / "meta", smaller, meta_tensors(smaller))
    with pytest.raises(ConfigError, match="mlp_dim is 96 in one and 88"):
        compare(open_source(source), open_source(other, max_seq_len=64))


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_verifies_any_two_checkpoints(
    source: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = source.parent / "new"
    status, out, err = run(capsys, source, new, "--verify")
    assert (status, err) == (0, "")
    assert "21 tensors, 21 bit-identical" in out
    status, out, _ = run(capsys, "verify", source, new)
    assert status == 0
    assert "top-1 agreement 100.0%" in out
    other = write_changed(source.parent / "other", "norm.weight", 2)
    status, out, _ = run(capsys, "verify", new, other, "--max-seq-len", 64)
    assert status == 1
    assert "transformer/final_norm/scale" in out
    status, out, err = run(capsys, "verify", new, source.parent / "none")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")


def test_inspect_describes_a_checkpoint(
    source: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_meta(source.parent / "meta", TINY, meta_tensors(TINY), ranks=2)
    status, out, _ = run(capsys, "inspect", source.parent / "meta", "--max-seq-len", 9)
    assert status == 0
    for part in ("Meta", "rank files       2", "44,192", "float32[272, 32]"):
        assert part in out
    assert "layers.1." not in out
    _, out, _ = run(
        capsys, "inspect", source.parent / "meta", "--all", "--max-seq-len", 9
    )
    assert "layers.1." in out


def test_a_dry_run_prints_the_table_and_writes_nothing(
    source: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(source.parent.iterdir())
    status, out, _ = run(
        capsys, source, source.parent / "new", "--to", "meta", "--dry-run"
    )
    assert status == 0
    assert sorted(source.parent.iterdir()) == before
    (row,) = [line for line in out.splitlines() if "wq" in line]
    assert re.fullmatch(r" +wq\.0 .*-> layers\.0\.attention\.wq\.weight +float.*", row)
    assert "176,768 bytes" in out
    assert "host memory" in out


@pytest.mark.parametrize("arguments", [["--ranks", "3"], ["--ranks", "0"]])
def test_a_dry_run_refuses_what_the_conversion_would(
    source: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    new = source.parent / "new"
    status, out, err = run(capsys, source, new, "--to", "meta", "--dry-run", *arguments)
    assert (status, out) == (2, "")
    assert f"ranks is {arguments[1]}" in err


def test_a_conversion_over_the_memory_limit_is_refused(
    source: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(source.parent.iterdir())
    new = source.parent / "new"
    status, _, err = run(capsys, source, new, "--max-host-bytes", "1Mi")
    assert status == 2
    assert "1,048,576" in err
    assert sorted(source.parent.iterdir()) == before
    assert run(capsys, source, new, "--max-host-bytes", "20G")[0] == 0
    with pytest.raises(SystemExit):
        main([str(source), str(new), "--max-host-bytes", "lots"])


def test_peak_memory_includes_temporary_allocations() -> None:
    with track_peak_memory() as peak:
        before = anonymous_bytes()
        assert before is not None
        # Other threads may free memory meanwhile, so less than all must be seen.
        array = np.ones(400_000_000, np.uint8)
        deadline = time.monotonic() + 20
        while (peak.bytes or 0) < before + 100_000_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        del array
    assert (peak.bytes or 0) >= before + 100_000_000


@pytest.mark.parametrize("format", ["meta", "hf", "gguf", "llama2c", "orbax"])
def test_a_named_format_is_not_guessed(tmp_path: pathlib.Path, format: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "x.bin").write_bytes(struct.pack("<7i", 1, 2, 3, 4, 5, 6, 7))
    path = tmp_path / "x.bin" if format in ("gguf", "llama2c") else tmp_path
    with pytest.raises((CheckpointError, ConfigError)):
        open_source(path, format=format)


@without_type_checks()
def test_an_unknown_format_is_refused(source: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="onnx"):
        open_source(source, format="onnx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="onnx"):
        convert(source, source.parent / "y", target_format="onnx")  # type: ignore[arg-type]


def test_the_memory_limit_of_a_70b_model_is_a_few_tensors(
    tmp_path: pathlib.Path,
) -> None:
    """Of a Hugging Face folder whose 140 GB are a sparse file."""
    config = preset("llama2-70b")
    fields = config_to_hugging_face(config, "bfloat16", {})
    (tmp_path / "config.json").write_text(json.dumps(fields))
    header, offset = {}, 0
    for name, shape in source_shapes(HUGGING_FACE, config).items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + offset)
    assert offset == 2 * 68_976_648_192
    packed = write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    for format in ("orbax", "meta", "hf"):
        prepared = prepare_conversion(
            tmp_path, tmp_path / "x", target_format=format, tokenizer=packed
        )
        needed = (prepared.host_bytes or 0) - (anonymous_bytes() or 0)
        # Two or three times the embedding, the largest tensor, and overhead.
        assert 2 < needed / (2 * 32000 * 8192) < 3.2, format
