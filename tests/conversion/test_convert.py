"""Conversions from end to end, by function and by command."""

import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.foreign import (
    TINY,
    meta_tensors,
    ours_from_meta,
    write_llama2c,
    write_llama2c_tokenizer,
    write_meta,
    write_tokenizer_model,
)
from support.type_checks import without_type_checks

from llama_jax.checkpoint.atomic_write import new_folder
from llama_jax.checkpoint.model_folder import load_params, read_config, read_tokenizer
from llama_jax.conversion import convert, open_source
from llama_jax.conversion.__main__ import main
from llama_jax.errors import CheckpointError, ConfigError, LlamaJaxError, TokenizerError
from llama_jax.params import flatten
from llama_jax.runtime import Runtime


@pytest.fixture
def meta(tmp_path: pathlib.Path) -> pathlib.Path:
    """Write a Meta folder of two ranks, with a tokenizer."""
    folder = write_meta(tmp_path / "meta", TINY, meta_tensors(TINY), ranks=2)
    write_tokenizer_model(folder)
    return folder


def assert_contains(folder: pathlib.Path, expected: dict[str, np.ndarray]) -> None:
    actual = flatten(load_params(folder, read_config(folder), runtime=Runtime()))
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array.astype(np.float32))


def test_a_meta_folder_converts_to_ours(meta: pathlib.Path) -> None:
    out = meta.parent / "out"
    result = convert(meta, out, max_seq_len=64)
    assert read_config(out) == result.config == TINY
    assert_contains(out, ours_from_meta(TINY, meta_tensors(TINY)))
    tokenizer = read_tokenizer(out)
    assert tokenizer is not None
    assert tokenizer.contents == (meta / "tokenizer.model").read_bytes()
    assert result.num_bytes == sum(
        f.stat().st_size for f in out.rglob("*") if f.is_file()
    )
    assert 4 * result.num_params < result.num_bytes < 5 * result.num_params
    assert result.num_params == sum(a.size for a in meta_tensors(TINY).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_once(tmp_path: pathlib.Path, dtype: Any) -> None:
    tensors = meta_tensors(TINY)
    source = write_llama2c(tmp_path / "x.bin", TINY, tensors)
    packed = write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    convert(source, tmp_path / "out", tokenizer=packed, dtype=dtype)
    expected = ours_from_meta(TINY, tensors)
    expected = {
        path: array.astype(jnp.dtype(dtype)) for path, array in expected.items()
    }
    assert_contains(tmp_path / "out", expected)
    zarray = tmp_path / "out" / "params" / "lm_head" / ".zarray"
    kinds = {"float32": "<f4", "float16": "<f2"}
    assert json.loads(zarray.read_text())["dtype"] == kinds.get(dtype, dtype)


@pytest.mark.parametrize("location", ["beside", "above"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.bin"])
def test_a_tokenizer_is_found_beside_or_above(
    tmp_path: pathlib.Path, location: str, name: str
) -> None:
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    source = write_llama2c(folder / "x.bin", TINY, meta_tensors(TINY))
    with pytest.raises(TokenizerError, match="--tokenizer"):
        convert(source, tmp_path / "out")
    parent = folder if location == "beside" else folder.parent
    if name == "tokenizer.model":
        write_tokenizer_model(parent)
    else:
        write_llama2c_tokenizer(parent / name)
    assert convert(source, tmp_path / "out").tokenizer_file == parent / name


def test_a_tokenizer_larger_than_the_model_is_refused(meta: pathlib.Path) -> None:
    write_tokenizer_model(meta, 273)
    with pytest.raises(TokenizerError, match="272"):
        convert(meta, meta.parent / "out", max_seq_len=64)
    write_tokenizer_model(meta, 271)  # a smaller one is allowed
    convert(meta, meta.parent / "out", max_seq_len=64)


def test_other_files_and_folders_are_refused(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / "x.gguf"):
        if path.suffix:
            path.touch()
        with pytest.raises(CheckpointError, match=str(path)):
            convert(path, tmp_path / "out")
    with without_type_checks(), pytest.raises(ConfigError, match="choose from"):
        convert(tmp_path, tmp_path / "out", dtype="int8")  # type: ignore[arg-type]


def test_our_own_checkpoint_is_not_converted_to_itself(meta: pathlib.Path) -> None:
    convert(meta, meta.parent / "out", max_seq_len=64)
    with pytest.raises(CheckpointError, match="already"):
        convert(meta.parent / "out", meta.parent / "again")


def test_an_interrupted_conversion_leaves_no_files(meta: pathlib.Path) -> None:
    before = sorted(meta.parent.iterdir())
    for moment in range(0, 24, 5):
        calls = iter(range(100))

        def interrupt(*_: Any, moment: int = moment, calls: Any = calls) -> None:
            if next(calls) == moment:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(meta, meta.parent / "out", max_seq_len=64, progress=interrupt)
        assert sorted(meta.parent.iterdir()) == before


def test_the_command_converts_and_prints_a_summary(
    meta: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(meta.parent / "out")
    assert main([str(meta), out, "--max-seq-len", "64", "--dtype", "bfloat16"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 4
    for part in (
        "44,192 parameters", "peak host memory", "num_heads 8", "rope_theta 10000.0",
        "max_seq_len 64 (as given)", str(meta / "tokenizer.model"),
    ):  # fmt: skip
        assert part in captured.out, captured.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["none", "out"],
        ["meta", "out"],
        ["meta", "meta", "--max-seq-len", "64"],
        ["meta", "out", "--max-seq-len", "0"],
        ["meta", "out", "--max-seq-len", "64", "--tokenizer", "none"],
        ["meta", "out", "--max-seq-len", "64", "--tokenizer", "meta/params.json"],
        ["meta", "out", "--max-seq-len", "64", "--tokenizer", "."],
        ["meta", "meta/params.json/out", "--max-seq-len", "64"],
        ["meta/params.json", "out"],
        ["meta", "out.safetensors", "--max-seq-len", "64"],
        ["meta", "out.gguf", "--to", "hf", "--max-seq-len", "64"],
    ],
)
def test_every_error_is_one_line_and_status_2(
    meta: pathlib.Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(meta.parent)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not list(meta.parent.glob("out*"))


def test_unknown_arguments_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["a", "b", "--dtype", "int8"])
    assert caught.value.code == 2
    assert "bfloat16" in capsys.readouterr().err


def _write_zeros(path: pathlib.Path, layers: int, dim: int, vocab: int) -> int:
    """Write a llama2.c checkpoint of zeros as a sparse file; return its size."""
    config = TINY.replace(
        embed_dim=dim, num_layers=layers, vocab_size=vocab, mlp_dim=3 * dim,
        num_heads=dim // 64, num_kv_heads=dim // 64, head_dim=64, tied_embeddings=True,
    )  # fmt: skip
    weights = layers * (4 * dim * dim + 3 * dim * config.mlp_dim + 2 * dim)
    size = 28 + 4 * (weights + vocab * dim + dim + 2 * 64 * 32)
    heads = config.num_heads
    with path.open("wb") as file:
        file.write(
            struct.pack("<7i", dim, config.mlp_dim, layers, heads, heads, vocab, 64)
        )
        file.truncate(size)
    return size


def _interrupted(tmp_path: pathlib.Path, sent: int) -> tuple[int, str]:
    """Send a signal to a conversion to `out` halfway; return its status and stderr."""
    _write_zeros(tmp_path / "x.bin", layers=40, dim=1024, vocab=272)
    write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    command = [sys.executable, "-m", "llama_jax.conversion", "x.bin", "out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial-*/params*/*/0.0")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_removes_unfinished_output(tmp_path: pathlib.Path, sent: int) -> None:
    status, stderr = _interrupted(tmp_path, sent)
    said = {signal.SIGINT: "interrupted; nothing was written\n", signal.SIGTERM: ""}
    assert (status, stderr) == (128 + sent, said[sent])
    assert {file.name for file in tmp_path.iterdir()} == {"x.bin", "tokenizer.bin"}


def test_leftovers_of_a_killed_conversion_are_removed_by_the_next_one(
    tmp_path: pathlib.Path,
) -> None:
    status, _ = _interrupted(tmp_path, signal.SIGKILL)
    assert status == -signal.SIGKILL
    (leftover,) = tmp_path.glob("out*")
    assert leftover.name.startswith("out.partial-")
    with pytest.raises(CheckpointError):
        open_source(leftover)
    write_llama2c(tmp_path / "x.bin", TINY, meta_tensors(TINY))
    convert(tmp_path / "x.bin", tmp_path / "out")
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"x.bin", "tokenizer.bin", "out"}


def test_a_running_conversion_is_not_removed_by_another(tmp_path: pathlib.Path) -> None:
    with new_folder(tmp_path / "out") as first:
        (first / "file").touch()
        with new_folder(tmp_path / "out"):
            assert (first / "file").is_file()
        (tmp_path / "out").rmdir()
    assert (tmp_path / "out" / "file").is_file()


def test_damaged_meta_folders_raise_only_our_errors(meta: pathlib.Path) -> None:
    rng = random.Random(0)
    files = {
        name: (meta / name).read_bytes()
        for name in ("params.json", "consolidated.01.pth", "tokenizer.model")
    }
    refused = 0
    for number in range(150):
        name = list(files)[0 if number % 2 else rng.randrange(3)]
        data = bytearray(files[name])
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (meta / name).write_bytes(data)
        try:
            read_everything(meta)
        except LlamaJaxError as error:
            refused += "\n" not in str(error)
        (meta / name).write_bytes(files[name])
    assert 75 < refused < 150


def read_everything(meta: pathlib.Path) -> None:
    """Do all that a conversion does except writing."""
    source = open_source(meta, max_seq_len=64)
    tokenizer, _ = source.find_tokenizer()
    tokenizer.check_fits(source.config.vocab_size)
    for leaf in source.leaves("bfloat16").values():
        leaf.read()


@pytest.mark.slow
def test_a_large_model_is_never_in_memory_as_a_whole(tmp_path: pathlib.Path) -> None:
    size = _write_zeros(tmp_path / "x.bin", layers=12, dim=1536, vocab=32000)
    assert size > 1_400_000_000
    write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    code = """
import threading, time
from llama_jax.conversion.__main__ import main
peak = 0
def watch():
    global peak
    while True:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.005)
import orbax.checkpoint, jax
jax.devices()
threading.Thread(target=watch, daemon=True).start()
time.sleep(0.1)
before = peak
assert main(["x.bin", "out"]) == 0
print(peak - before)
"""
    completed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *_, extra = completed.stdout.split()
    largest = 4 * 32000 * 1536
    assert int(extra) < 3 * largest, completed.stdout
    assert 3 * largest < size / 2
