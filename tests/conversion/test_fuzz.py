"""Damaged files of every format give a typed error or are read, nothing else."""

import json
import pathlib
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.foreign import (
    TINY,
    meta_tensors,
    write_llama2c,
    write_llama2c_tokenizer,
    write_meta,
    write_tokenizer_model,
)
from support.type_checks import without_type_checks

from llama_jax.conversion import convert, open_source
from llama_jax.conversion.host_memory import track_peak_memory
from llama_jax.conversion.tensor_tables import FormatName
from llama_jax.errors import LlamaJaxError

CONFIG = TINY.replace(num_layers=1)
# Limits for a file of this size; most of the memory is the interpreter growing.
MAX_BYTES = 300_000_000
MAX_SECONDS = 10.0
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1)


def make_meta(folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    source = write_meta(folder / "meta", CONFIG, meta_tensors(CONFIG), ranks=2)
    return source, ["consolidated.00.pth", "consolidated.01.pth", "params.json"]


def make_hf(folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    source = write_llama2c(folder / "x.bin", CONFIG, meta_tensors(CONFIG))
    convert(source, folder / "hf", target_format="hf")
    source.unlink()
    return folder / "hf", ["model.safetensors", "config.json"]


def make_llama2c(folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    source = write_llama2c(folder / "y.bin", CONFIG, meta_tensors(CONFIG))
    return source, [""]


def make_gguf(folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    pytest.importorskip("gguf", reason="needs gguf")
    source = write_llama2c(folder / "x.bin", CONFIG, meta_tensors(CONFIG))
    convert(source, folder / "z.gguf")
    source.unlink()
    return folder / "z.gguf", [""]


def make_orbax(folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    source = write_llama2c(folder / "x.bin", CONFIG, meta_tensors(CONFIG))
    convert(source, folder / "ours")
    source.unlink()
    return folder / "ours", [
        "config.json",
        "params/lm_head/.zarray",
        "params/lm_head/0.0",
    ]


MAKERS: dict[str, Callable[[pathlib.Path], tuple[pathlib.Path, list[str]]]] = {
    "meta": make_meta,
    "hf": make_hf,
    "llama2c": make_llama2c,
    "gguf": make_gguf,
    "orbax": make_orbax,
}


def mutate(good: bytes, rng: random.Random) -> bytes:
    """Damage a file, most often near its ends, where headers and directories are."""
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        near = rng.randrange(min(len(data), 4096))
        at = rng.choice((near, len(data) - 1 - near, rng.randrange(len(data))))
        kind = rng.randrange(6)
        if kind <= 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            size = rng.choice((2, 4, 8))
            number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
            data[at : at + size] = number.to_bytes(size, "little")
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 64)]
        else:
            del data[at : at + rng.choice((1, 8, 1000, len(data)))]
        if not data:
            return bytes(data)
    return bytes(data)


def mutate_json(good: bytes, rng: random.Random) -> bytes:
    """Replace a value by one of any kind, or damage the text."""
    if rng.random() < 0.3:
        return mutate(good, rng)
    fields = json.loads(good)
    inner = fields.get("config", fields)
    name = rng.choice(list(inner))
    numbers: tuple[Any, ...] = (-1, 0, 1, 3, 1 << 31, 1 << 70, 1e308, 0.5, True)
    inner[name] = rng.choice((*numbers, None, "x", [], [1], {}, {"a": 1}))
    if rng.random() < 0.1:
        del inner[name]
    return json.dumps(fields).encode()


def attack(
    name: str, folder: pathlib.Path, count: int, *, every: int
) -> tuple[int, int]:
    """Return how many of `count` damaged copies were refused, and how many were not."""
    write_llama2c_tokenizer(folder / "tokenizer.bin")
    write_tokenizer_model(folder)
    source, names = MAKERS[name](folder)
    files = [source / file if file else source for file in names]
    good = {file: file.read_bytes() for file in files}
    rng = random.Random(name)
    target: FormatName = "hf" if name == "orbax" else "orbax"
    refused = 0
    for number in range(count):
        file = rng.choice(files)
        change = mutate_json if file.suffix in (".json", ".zarray") else mutate
        file.write_bytes(change(good[file], rng))
        start = time.monotonic()
        try:
            if number % every == 0:
                convert(source, folder / "out", target_format=target, max_seq_len=64)
                shutil.rmtree(folder / "out")
            else:
                opened = open_source(source, max_seq_len=64)
                for leaf in opened.leaves("float32").values():
                    leaf.read()
        except LlamaJaxError as error:
            refused += "\n" not in str(error)
        assert time.monotonic() - start < MAX_SECONDS
        assert not list(folder.glob("out*"))
        file.write_bytes(good[file])
    convert(source, folder / "out2", max_seq_len=64, target_format="meta")
    return refused, count - refused


def check(name: str, folder: pathlib.Path, count: int, *, every: int) -> None:
    with without_type_checks(), track_peak_memory() as peak:
        before = peak.bytes or 0
        refused, accepted = attack(name, folder, count, every=every)
    assert (peak.bytes or 0) - before < MAX_BYTES
    # Some damage changes only the value of a weight, or a name that is not used.
    assert refused > count / 4
    assert refused + accepted == count


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_files_are_refused_or_read(tmp_path: pathlib.Path, name: str) -> None:
    check(name, tmp_path, 80, every=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_two_thousand_damaged_files_are_refused_or_read(
    tmp_path: pathlib.Path, name: str
) -> None:
    check(name, tmp_path, 400, every=4)
