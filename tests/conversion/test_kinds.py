"""What people's downloads contain besides a good checkpoint, in every format.

| kind                        | HF .safetensors / .bin   | Meta    | GGUF | llama2.c | PEFT | ours |
|-----------------------------|--------------------------|---------|------|----------|------|------|
| Git LFS pointer, web page,  | IMPOSTORS × FILES: weights, configurations and tokenizers of all |
| empty, zeros, truncated     | formats                                                          |
| GGML file of 2023           | IMPOSTORS × FILES, under any name                                |
| a part is missing           | shards                   | ranks   | (1)  | (2)      | (2)  | leaf (3) |
| saved by ZeRO-3 ungathered  | both                     | (4)     | (5)  | (6)      | both | (7)  |
| a weight is not a number    | both                     | yes     | yes  | yes      | both | yes  |
| does not fit its new dtype  | WRITTEN: all targets                                             |
| usable, refused elsewhere   | stale index, inv_freq,   | legacy  | (8)  | (8)      | .bin | (8)  |
|                             | legacy .bin, variants,   | .pth    |      |          |      |      |
|                             | no prefix                |         |      |          |      |      |
| given as something else     | OTHER: adapters, runs, hub caches, folders above, single files   |

(1) Parts of split files name the program that joins them: test_gguf_refused. (2) One file
is all; without it nothing is recognized. (3) test_model_folder. (4) ZeRO-3 does not write
this format; the reader is that of .bin. (5) llama.cpp's converter cannot write it: an
empty axis is refused in test_gguf_refused. (6) Its tensors have no shapes of their own.
(7) Nothing but this library writes it. (8) There is one way to write it.
"""  # noqa: E501

import functools
import json
import math
import pathlib
import re
import shutil
import struct
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from support.foreign import (
    TINY,
    meta_tensors,
    write_legacy_pth,
    write_llama2c,
    write_llama2c_tokenizer,
    write_meta,
    write_pth,
    write_tokenizer_model,
)

from llama_jax.checkpoint.lazy_leaf import lazy_leaf
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.conversion import convert, open_source
from llama_jax.conversion.peft import read_peft, write_peft
from llama_jax.conversion.safetensors import read_safetensors, write_safetensors
from llama_jax.errors import CheckpointError, LlamaJaxError
from llama_jax.model.lora import Lora, init_lora
from llama_jax.params import flatten, unflatten
from llama_jax.runtime import Runtime
from llama_jax.train.adapters import merge_checkpoint
from llama_jax.train.run_folder import RUN_FILE

CONFIG = TINY.replace(num_layers=1)
LORA = Lora(rank=2, alpha=4.0, targets=("q_proj",))
MARK = 1234.5
"""A value of one weight, by which its bytes are found in any file."""
MARKED, OURS = "layers.0.feed_forward.w1.weight", "transformer/layers/0/mlp/gate_proj"

# A checkpoint of each format, and its files.
FILES = {
    "hf": ("model.safetensors", "config.json", "tokenizer.model"),
    "hf-bin": ("pytorch_model.bin", "tokenizer.json"),
    "hf-index": ("model.safetensors.index.json",),
    "meta": ("consolidated.01.pth", "params.json", "tokenizer.model"),
    "gguf": ("m.gguf",),
    "llama2c": ("m.bin", "tokenizer.bin"),
    "peft": ("adapter_model.safetensors", "adapter_config.json"),
    "peft-bin": ("adapter_model.bin",),
    "ours": ("config.json", "params/lm_head/.zarray", "params/lm_head/0.0"),
}
ALL_FILES = [(name, file) for name, files in FILES.items() for file in files]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Write a folder with every checkpoint of `FILES`."""
    root = tmp_path_factory.mktemp("checkpoints")
    tensors = meta_tensors(CONFIG)
    tensors[MARKED][3, 5] = MARK
    write_meta(root / "meta", CONFIG, tensors, ranks=2)
    write_tokenizer_model(root / "meta")
    (root / "llama2c").mkdir()
    source = write_llama2c(root / "llama2c/m.bin", CONFIG, tensors)
    write_llama2c_tokenizer(root / "llama2c/tokenizer.bin")
    convert(source, root / "hf", target_format="hf")
    (root / "gguf").mkdir()
    convert(source, root / "gguf/m.gguf", dtype="float32")
    convert(source, root / "ours")
    shutil.copytree(root / "hf", root / "hf-bin")
    write_pth(root / "hf-bin/pytorch_model.bin", arrays_of(root / "hf"))
    (root / "hf-bin/model.safetensors").unlink()
    (root / "hf-bin/tokenizer.model").unlink()
    shutil.copytree(root / "hf", root / "hf-index")
    (root / "hf-index/model.safetensors").rename(root / "hf-index/a.safetensors")
    write_index(
        root / "hf-index", dict.fromkeys(arrays_of(root / "hf"), "a.safetensors")
    )
    adapters = init_lora(CONFIG, jax.random.key(0), LORA, runtime=Runtime())
    a = f"{OURS.replace('mlp/gate', 'attention/q')}/a"
    flat = flatten(adapters)
    flat[a] = flat[a].at[3, 1].set(MARK)
    write_peft(root / "peft", unflatten(flat), CONFIG, LORA, base_model="some/base")
    shutil.copytree(root / "peft", root / "peft-bin")
    adapter = root / "peft-bin/adapter_model.safetensors"
    write_pth(root / "peft-bin/adapter_model.bin", arrays_of(root / "peft"))
    adapter.unlink()
    return root


@pytest.fixture
def copy(
    originals: pathlib.Path, tmp_path: pathlib.Path
) -> Callable[[str], pathlib.Path]:
    """Return a function that copies a checkpoint, to be changed."""

    def copy(name: str) -> pathlib.Path:
        folder = tmp_path / name
        shutil.copytree(originals / name, folder)
        return folder

    return copy


def arrays_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Read the tensors of the only safetensors file in a folder."""
    [file] = folder.glob("*.safetensors")
    return {name: leaf.read().copy() for name, leaf in read_safetensors(file).items()}


def write_arrays(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    if file.suffix == ".bin":
        write_pth(file, arrays)
        return
    leaves = {name: lazy_leaf(array) for name, array in arrays.items()}
    write_safetensors(file, leaves)


def write_index(
    folder: pathlib.Path, weight_map: dict[str, str], name: str = "model.safetensors"
) -> None:
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all of a checkpoint or adapter, its tokenizer included."""
    if folder.name.startswith("peft"):
        adapters, _ = read_peft(folder, CONFIG)
        return flatten(adapters)
    files = [*folder.glob("m.*")]
    source = open_source(files[0] if files else folder, max_seq_len=64)
    source.find_tokenizer()
    leaves = source.leaves(finite=True)
    return {name: leaf.read() for name, leaf in leaves.items()}


def same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return actual.keys() == expected.keys() and all(
        np.array_equal(actual[name], array) for name, array in expected.items()
    )


# Contents, and words of the error.
IMPOSTORS = {
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 26888\n",
        "Git LFS pointer.*git lfs pull",
    ),
    "web page": (b"\n<!DOCTYPE html><html>Log in", "web page.*download"),
    "error of a server": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "web page.*download",
    ),
    "empty": (b"", "is empty; download"),
    "unfinished": (bytes(5000), "zeros only.*download"),
    "GGML": (b"tjgg\x03\0\0\0\x00}\0\0" + b"\1" * 2000, "GGML file.*to GGUF"),
}


@pytest.mark.parametrize(("name", "file"), ALL_FILES)
@pytest.mark.parametrize("kind", IMPOSTORS)
def test_files_that_are_something_else_are_named_with_the_remedy(
    copy: Callable[[str], pathlib.Path], name: str, file: str, kind: str
) -> None:
    content, words = IMPOSTORS[kind]
    path = copy(name) / file
    path.write_bytes(content)
    with pytest.raises(LlamaJaxError, match=f"^{re.escape(str(path))}: .*{words}"):
        read(path.parents[len(pathlib.Path(file).parts) - 1])


@pytest.mark.parametrize(("name", "file"), ALL_FILES)
def test_truncated_files_are_named(
    copy: Callable[[str], pathlib.Path], name: str, file: str
) -> None:
    path = copy(name) / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        LlamaJaxError, match=f"^{re.escape(str(path))}: .*(again|incomplete)"
    ):
        read(path.parents[len(pathlib.Path(file).parts) - 1])


@pytest.mark.parametrize(
    ("name", "start", "words"),
    [
        ("llama2c", b"PK\3\4", "is a file of PyTorch; name the folder"),
        ("hf", b"GGUF\3\0\0\0", "is a GGUF file; name the file itself"),
        ("llama2c", b'\x10\0\0\0\0\0\0\0{"a', "is a safetensors file; name the folder"),
        ("meta", b'{"error":"gated"}', "JSON text, such as a server's error"),
        ("gguf", b"\x1f\x8b\x08", "compressed with gzip; unpack it"),
    ],
)
def test_other_formats_under_a_wrong_name_are_named(
    copy: Callable[[str], pathlib.Path], name: str, start: bytes, words: str
) -> None:
    folder = copy(name)
    (folder / FILES[name][0]).write_bytes(start + b"\1" * 100)
    with pytest.raises(CheckpointError, match=words):
        read(folder)


def test_an_old_ggml_file_of_any_name_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ggml-model-q4_0"
    path.write_bytes(b"lmgg" + b"\1" * 100)
    with pytest.raises(CheckpointError, match="GGML"):
        open_source(path)


ARCHIVES = {"hf": "model.safetensors", "hf-bin": "pytorch_model.bin"}
ADAPTERS = {"peft": "adapter_model.safetensors", "peft-bin": "adapter_model.bin"}


@pytest.mark.parametrize(("name", "file"), (ARCHIVES | ADAPTERS).items())
def test_what_zero_3_has_not_gathered_is_named(
    copy: Callable[[str], pathlib.Path],
    originals: pathlib.Path,
    name: str,
    file: str,
) -> None:
    folder = copy(name)
    arrays = arrays_of(originals / name.removesuffix("-bin"))
    last = sorted(arrays)[-1]
    write_arrays(folder / file, arrays | {last: np.zeros(0, np.float32)})
    with pytest.raises(
        CheckpointError, match=f"{last} of shape .* ZeRO-3.*zero_to_fp32"
    ):
        read(folder)


@pytest.mark.parametrize(
    ("name", "file", "tensor", "value"),
    [
        ("hf", "model.safetensors", "layers.0.mlp.gate_proj.weight", math.nan),
        ("hf-bin", "pytorch_model.bin", "layers.0.mlp.gate_proj.weight", math.inf),
        ("meta", "consolidated.00.pth", MARKED, -math.inf),
        ("gguf", "m.gguf", "blk.0.ffn_gate.weight", math.nan),
        ("llama2c", "m.bin", "w1.0", math.inf),
        ("peft", "adapter_model.safetensors", "q_proj.lora_A.weight", math.inf),
        ("peft-bin", "adapter_model.bin", "q_proj.lora_A.weight", math.nan),
        ("ours", f"params/{OURS.replace('/', '.')}/0.0", OURS, math.nan),
    ],
)
def test_a_weight_that_is_not_a_number_is_named(
    copy: Callable[[str], pathlib.Path],
    tmp_path: pathlib.Path,
    name: str,
    file: str,
    tensor: str,
    value: float,
) -> None:
    folder, new = copy(name), tmp_path / "new"
    path = folder / file
    content = path.read_bytes()
    assert content.count(struct.pack("<f", MARK)) == 1
    path.write_bytes(content.replace(*(struct.pack("<f", x) for x in (MARK, value))))
    words = (
        rf"{re.escape(tensor)} has 1 of [\d,]+ numbers that are NaN or infinite, the"
    )
    with pytest.raises(CheckpointError, match=words):
        read(folder)
    source = path if name in ("gguf", "llama2c") else folder
    convert_it = functools.partial(convert, source, new, max_seq_len=64)
    if name == "ours":
        convert_it = functools.partial(convert_it, target_format="hf")
    if name in ADAPTERS:
        convert_it = functools.partial(merge_checkpoint, copy("ours"), folder, new)
    with pytest.raises(CheckpointError, match=words):
        convert_it()
    assert not new.exists()


def test_an_adapter_is_not_merged_into_weights_that_are_not_numbers(
    copy: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    base = copy("ours")
    np.full((32, 272), np.nan, np.float32).tofile(base / "params/lm_head/0.0")
    with pytest.raises(CheckpointError, match="lm_head has 8,704 of 8,704 numbers"):
        merge_checkpoint(base, copy("peft"), tmp_path / "new")


WRITTEN: list[tuple[Any, Any, str]] = [
    ("orbax", "float16", "65504"),
    ("hf", "float16", "65504"),
    ("hf", "bfloat16", "3.38953e"),
    ("meta", "bfloat16", "3.38953e"),
    ("gguf", "float16", "65504"),
    ("gguf", "bfloat16", "3.38953e"),
    ("gguf", "q8_0", "65504"),
]
"""Format, dtype, and its largest value; llama2.c has only float32."""


@pytest.mark.parametrize(("target", "dtype", "largest"), WRITTEN)
def test_weights_that_do_not_fit_a_dtype_are_named(
    tmp_path: pathlib.Path, target: Any, dtype: Any, largest: str
) -> None:
    if dtype == "q8_0":
        pytest.importorskip("gguf", reason="needs gguf")
    tensors = meta_tensors(CONFIG)
    tensors[MARKED][3, 5] = 3.4e38
    source = write_llama2c(tmp_path / "m.bin", CONFIG, tensors)
    write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    words = rf"(w1\.0|ffn_gate\.weight) does not fit into .*\(largest value {largest}"
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "new", target_format=target, dtype=dtype)
    leaves = {n: lazy_leaf(x) for n, x in read_source(source).items()}
    if target == "orbax":
        with pytest.raises(CheckpointError, match=f"{OURS} does not fit into {dtype}"):
            save_params(tmp_path / "new", leaves, CONFIG, dtype=dtype)
    assert not (tmp_path / "new").exists()


def read_source(source: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: leaf.read() for name, leaf in open_source(source).leaves().items()}


def test_missing_parts_are_named(
    copy: Callable[[str], pathlib.Path], originals: pathlib.Path
) -> None:
    arrays = arrays_of(originals / "hf")
    folder = copy("hf-index")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "a.safetensors").unlink()
    parts = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    for part, names in zip(parts, np.array_split(sorted(arrays), 3), strict=True):
        write_arrays(folder / part, {name: arrays[name] for name in names})
    assert same(read(folder), read(originals / "hf"))  # without an index
    for part in parts:
        (folder / part).rename(folder / "x")
        with pytest.raises(CheckpointError, match=f"{part}: there is no such file"):
            read(folder)
        (folder / "x").rename(folder / part)
    meta = copy("meta")
    (meta / "consolidated.01.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"into 2 files, but consolidated\.01\.pth is missing"
    ):
        read(meta)
    (meta / "consolidated.00.pth").rename(meta / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is missing"):
        read(meta)


def add_bin_index(folder: pathlib.Path) -> None:
    names = dict.fromkeys(arrays_of(folder), "pytorch_model-00001-of-00002.bin")
    write_index(folder, names, "pytorch_model.bin")


def replace_by_bin(folder: pathlib.Path, write: Any = write_pth) -> None:
    arrays = arrays_of(folder)
    write(folder / "pytorch_model.bin", arrays)
    (folder / "model.safetensors").unlink()


def bin_beside_index_of_safetensors(folder: pathlib.Path) -> None:
    names = dict.fromkeys(arrays_of(folder), "model-00001-of-00002.safetensors")
    replace_by_bin(folder)
    write_index(folder, names)


def legacy_bin(folder: pathlib.Path) -> None:
    replace_by_bin(folder, write_legacy_pth)


def rename_to(*names: str) -> Callable[[pathlib.Path], None]:
    def rename(folder: pathlib.Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(content)

    return rename


def wrong_file_in_index(folder: pathlib.Path) -> None:
    """An index from before the tensors were distributed in another way."""
    arrays = arrays_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    for number, part in enumerate((names[:5], names[5:])):
        write_arrays(folder / f"{number}.safetensors", {n: arrays[n] for n in part})
    write_index(folder, {n: f"{i % 2}.safetensors" for i, n in enumerate(names)})


INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
FREQUENCIES = np.asarray([1.0, 0.01], np.float32)  # head_dim 4, theta 10000


def inv_freq_in_index(folder: pathlib.Path) -> None:
    names = [*arrays_of(folder), INV_FREQ]
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    write_index(folder, dict.fromkeys(names, "a.safetensors"))


def inv_freq_in_file(
    folder: pathlib.Path, name: str = INV_FREQ, values: np.ndarray = FREQUENCIES
) -> None:
    arrays = arrays_of(folder)
    (folder / "model.safetensors").unlink()
    write_arrays(folder / "a.safetensors", arrays | {name: values})
    write_index(folder, dict.fromkeys(arrays, "a.safetensors"))


def newer_inv_freq(folder: pathlib.Path) -> None:
    inv_freq_in_file(folder, "model.rotary_emb.inv_freq", FREQUENCIES.astype("float16"))


def bare_model(folder: pathlib.Path, *, head: bool = True) -> None:
    arrays = {n.removeprefix("model."): x for n, x in arrays_of(folder).items()}
    if not head:
        del arrays["lm_head.weight"]
    write_arrays(folder / "model.safetensors", arrays)


USABLE: list[Callable[[pathlib.Path], None]] = [
    add_bin_index,
    bin_beside_index_of_safetensors,
    wrong_file_in_index,
    replace_by_bin,
    legacy_bin,
    rename_to("model.fp16.safetensors"),
    rename_to(
        "model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"
    ),
    rename_to("weights.safetensors"),
    inv_freq_in_index,
    inv_freq_in_file,
    newer_inv_freq,
    bare_model,
]


@pytest.mark.parametrize("change", USABLE)
def test_usable_folders_of_hugging_face_are_read(
    copy: Callable[[str], pathlib.Path],
    originals: pathlib.Path,
    change: Callable[[pathlib.Path], None],
) -> None:
    folder = copy("hf")
    change(folder)
    assert same(read(folder), read(originals / "hf"))


def test_a_tied_head_may_be_in_the_index_only(
    copy: Callable[[str], pathlib.Path], originals: pathlib.Path
) -> None:
    folder = copy("hf")
    inv_freq_in_index(folder)
    arrays = arrays_of(folder)
    del arrays["lm_head.weight"]
    write_arrays(folder / "a.safetensors", arrays)
    with pytest.raises(CheckpointError, match=r"index\.json: lists lm_head\.weight"):
        read(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": True})
    )
    assert read(folder).keys() == read(originals / "hf").keys() - {"lm_head"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: inv_freq_in_file(folder, values=FREQUENCIES**2),
            "inv_freq has other frequencies than the rope_theta 10000",
        ),
        (
            lambda folder: inv_freq_in_file(folder, values=FREQUENCIES[:1]),
            "inv_freq has other frequencies",
        ),
        (rename_to("model.a.safetensors", "model.b.safetensors"), "the variants a, b"),
        (lambda folder: bare_model(folder, head=False), "saved from a LlamaModel"),
        (rename_to("a.safetensors", "b.safetensors"), "which another file contains"),
    ],
)
def test_what_remains_unclear_is_refused(
    copy: Callable[[str], pathlib.Path], change: Any, words: str
) -> None:
    folder = copy("hf")
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        read(folder)


def test_legacy_files_of_meta_and_old_adapters_are_read(
    copy: Callable[[str], pathlib.Path], originals: pathlib.Path
) -> None:
    tensors = meta_tensors(CONFIG)
    tensors[MARKED][3, 5] = MARK
    folder = copy("meta")
    (folder / "consolidated.01.pth").unlink()
    write_legacy_pth(folder / "consolidated.00.pth", tensors)
    assert same(read(folder), read(originals / "meta"))
    adapter = read(originals / "peft")
    assert same(read(originals / "peft-bin"), adapter)
    folder = copy("peft-bin")
    arrays = arrays_of(originals / "peft")
    write_legacy_pth(folder / "adapter_model.bin", arrays)
    assert same(read(folder), adapter)


def refused(path: pathlib.Path, words: str) -> None:
    """Check the error for a path that is no checkpoint."""
    with pytest.raises(CheckpointError, match=words) as error:
        open_source(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_given_as_a_checkpoint_is_named(
    copy: Callable[[str], pathlib.Path], name: str
) -> None:
    adapter = copy(name)
    words = rf"an adapter.*\(some/base\): --checkpoint BASE --adapter {adapter} "
    refused(adapter, words)
    (adapter / "config.json").write_text("{}")  # as some programs copy it there
    refused(adapter, words)
    (adapter / "adapter_config.json").write_text("[]")
    refused(adapter, "base model: --checkpoint BASE")


def test_a_run_given_as_a_checkpoint_or_adapter_names_its_results(
    copy: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / RUN_FILE).write_text("{}")
    refused(run, f"no result yet; resume it with .*--resume --output {run}$")
    for result in ("adapter", "best"):
        shutil.copytree(copy(f"peft{'-bin' * (result == 'best')}"), run / result)
    words = f"--checkpoint BASE --adapter {run}/adapter or {run}/best$"
    refused(run, words)
    with pytest.raises(CheckpointError, match=words):
        read_peft(run, CONFIG)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "best")
    copy("ours").rename(run / "model")
    refused(run, f"training run; give --checkpoint {run}/model$")
    (run / "checkpoints" / "2").mkdir(parents=True)
    for path in (run / "checkpoints", run / "checkpoints" / "2"):
        refused(path, f"training run; give --checkpoint {run}/model$")
    with pytest.raises(CheckpointError, match=f"give --checkpoint {run}/model$"):
        read_peft(run, CONFIG)


def test_folders_around_a_checkpoint_name_it(
    copy: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    hub = tmp_path / "hub"
    snapshots = hub / "models--some--model" / "snapshots"
    snapshots.mkdir(parents=True)
    for hash in ("aaa", "bbb"):
        shutil.copytree(copy("hf"), snapshots / hash)
        shutil.rmtree(tmp_path / "hf")
    (hub / "models--some--model" / "refs").mkdir()
    (hub / "models--some--model" / "refs" / "main").write_text("bbb")
    for path in (hub, hub / "models--some--model"):
        refused(path, f"contains one; name {snapshots}/bbb or {snapshots}/aaa$")
    refused(snapshots, f"name {snapshots}/aaa or {snapshots}/bbb$")
    gguf = copy("gguf")
    refused(gguf, f"name {gguf}/m.gguf$")
    (gguf / "config.json").write_text("{}")
    refused(gguf, f"name {gguf}/m.gguf$")
    for name in ("1", "2", "3"):
        (gguf / f"{name}.gguf").touch()
    refused(gguf, r"1\.gguf or .*2\.gguf or .*3\.gguf \(there are 1 more\)$")
    outer = tmp_path / "outer"
    outer.mkdir()
    for name in ("meta", "ours", "peft"):
        copy(name).rename(outer / name)
    refused(outer, f"name {outer}/meta or {outer}/ours$")
    with pytest.raises(CheckpointError, match=f"contains one; name {outer}/peft$"):
        read_peft(outer, CONFIG)


def test_what_a_folder_lacks_is_named(
    copy: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    folder = copy("hf")
    (folder / "config.json").rename(tmp_path / "config.json")
    refused(folder, "has weights, but no config.json")
    refused(folder / "model.safetensors", f"name its folder, {folder}$")
    (folder / "model.safetensors").unlink()
    (tmp_path / "config.json").rename(folder / "config.json")
    refused(folder, "has a config.json, but no weights")
    (folder / "vocab").symlink_to("../../blobs/abc")
    refused(folder, "vocab is a link to a file that does not exist.*cp -L")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "is an empty folder")
    (empty / "notes").write_text("x")
    refused(empty, "not a checkpoint of a known format; name a folder")
    refused(empty / "notes", "is not a checkpoint; name a folder")


def test_a_model_given_as_an_adapter_is_named(
    copy: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    for name in ("hf", "hf-bin", "hf-index", "meta", "gguf", "ours"):
        folder = copy(name)
        with pytest.raises(CheckpointError, match=f"give it as --checkpoint {folder}$"):
            read_peft(folder, CONFIG)
    adapter = copy("peft")
    with pytest.raises(CheckpointError, match=f"name the folder.*, {adapter}$"):
        read_peft(adapter / "adapter_model.safetensors", CONFIG)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json; download"):
        read_peft(adapter, CONFIG)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="name a folder that peft or"):
        read_peft(adapter, CONFIG)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_peft(tmp_path / "none", CONFIG)
