"""Model folders: round trips, damage, and reading with stock Orbax."""

import json
import pathlib
import random
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.foreign import TINY, write_llama2c_tokenizer

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.checkpoint.model_folder import (
    is_checkpoint,
    load_params,
    read_config,
    read_tokenizer,
    save_params,
)
from llama_jax.checkpoint.orbax_io import open_leaves
from llama_jax.config import LlamaConfig
from llama_jax.conversion import convert
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.errors import CheckpointError, ConfigError, LlamaJaxError
from llama_jax.generation.generate import generate
from llama_jax.generation.request import Request
from llama_jax.loading import load
from llama_jax.model.init import init_params
from llama_jax.model.transformer import Llama, ScalarModel, apply
from llama_jax.params import flatten, leaf_paths, param_shapes, stack_layers, unflatten
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, param_shardings
from llama_jax.text.tokenizer import Tokenizer
from tests.support.tokenizers import special_tokens

DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def random_params(config: LlamaConfig = TINY, dtype: Any = "float32") -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype),
        param_shapes(config, dtype=jnp.dtype(dtype)),
    )


def assert_same(actual: Any, expected: Any) -> None:
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert actual[path].dtype == array.dtype, path
        assert np.asarray(actual[path]).tobytes() == np.asarray(array).tobytes(), path


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkpoint of `random_params()`."""
    save_params(tmp_path / "model", random_params(), TINY)
    return tmp_path / "model"


@DTYPES
def test_weights_round_trip_bit_for_bit(tmp_path: pathlib.Path, dtype: Any) -> None:
    params = random_params(dtype=dtype)
    save_params(tmp_path / "model", params, TINY)
    assert read_config(tmp_path / "model") == TINY
    runtime = Runtime(param_dtype=dtype)
    assert_same(load_params(tmp_path / "model", TINY, runtime=runtime), params)


@DTYPES
def test_stock_orbax_restores_the_tree(tmp_path: pathlib.Path, dtype: Any) -> None:
    params = random_params(dtype=dtype)
    save_params(tmp_path / "model", params, TINY)
    folder = tmp_path / "model" / "params"
    with ocp.StandardCheckpointer() as standard:
        assert_same(standard.restore(folder), params)
    with ocp.PyTreeCheckpointer() as pytree:
        assert_same(pytree.restore(folder), params)


def test_stock_orbax_restores_it_sharded(saved: pathlib.Path) -> None:
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    shardings = param_shardings(TINY, Runtime(), mesh)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        param_shapes(TINY),
        shardings,
    )
    with ocp.StandardCheckpointer() as standard:
        restored = standard.restore(saved / "params", target)
    assert_same(restored, random_params())
    weight = restored["transformer"]["layers"]["0"]["mlp"]["up_proj"]
    assert weight.sharding == shardings["transformer"]["layers"]["0"]["mlp"]["up_proj"]


@DTYPES
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_layout_dtype_and_placement_holds_the_same_numbers(
    saved: pathlib.Path, dtype: Any, layout: Any, sharded: bool
) -> None:
    mesh = make_mesh({"fsdp": 2, "tensor": 4}) if sharded else None
    runtime = Runtime(param_dtype=dtype, layer_layout=layout)
    actual = load_params(saved, TINY, runtime=runtime, mesh=mesh)
    expected = random_params()
    if layout == "stacked":
        expected = stack_layers(expected, np.stack)
    assert_same(
        actual, jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), expected)
    )
    if mesh is not None:
        for path, sharding in flatten(param_shardings(TINY, runtime, mesh)).items():
            leaf = flatten(actual)[path]
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), path
        embedding = actual["transformer"]["embedding"]
        assert embedding.addressable_shards[0].data.shape == (272 // 4, 32 // 2)


def test_stacked_and_sharded_arrays_are_saved_unrolled(tmp_path: pathlib.Path) -> None:
    params = random_params()
    stacked = stack_layers(jax.tree.map(jnp.asarray, params))
    save_params(tmp_path / "stacked", stacked, TINY)
    assert_same(load_params(tmp_path / "stacked", TINY, runtime=Runtime()), params)
    placement = NamedSharding(make_mesh({"tensor": 8}), PartitionSpec("tensor"))
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, placement), params)
    save_params(tmp_path / "sharded", placed, TINY)
    assert_same(load_params(tmp_path / "sharded", TINY, runtime=Runtime()), params)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_scalar_model_round_trips(
    tmp_path: pathlib.Path, layout: Any, sharded: bool, tied: bool
) -> None:
    config = TINY.replace(head="scalar", tied_embeddings=tied)
    mesh = make_mesh({"fsdp": 2, "tensor": 4}) if sharded else None
    runtime = Runtime(layer_layout=layout)
    model = ScalarModel(config, runtime, mesh)
    params = init_params(model, jax.random.key(0))
    tokenizer = Tokenizer(
        read_llama2c_tokenizer(write_llama2c_tokenizer(tmp_path / "t.bin"))
    )
    save_params(tmp_path / "model", params, config, tokenizer=tokenizer)
    loaded = load(tmp_path / "model", runtime=runtime, mesh=mesh)
    assert loaded.model == model
    assert set(loaded.params) == {"transformer", "scalar_head"}
    assert_same(loaded.params, params)
    values, _ = apply(loaded.model, loaded.params, jnp.arange(8).reshape(2, 4))
    assert values.shape == (2, 4)


def test_a_scalar_model_cannot_be_read_or_used_as_a_language_model(
    tmp_path: pathlib.Path,
) -> None:
    config = TINY.replace(head="scalar")
    tokenizer = Tokenizer(
        read_llama2c_tokenizer(write_llama2c_tokenizer(tmp_path / "t.bin"))
    )
    save_params(tmp_path / "model", random_params(config), config, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="lacks lm_head"):
        load_params(tmp_path / "model", TINY, runtime=Runtime())
    loaded = load(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"generation: needs .* head 'lm'"):
        generate(loaded, [Request([1, 2])])
    with pytest.raises(ConfigError, match=r"Llama: needs .* the head is 'scalar'"):
        Llama(config, Runtime())
    for target in ("hf", "meta", "gguf", "llama2c"):
        with pytest.raises(ConfigError, match=r"export to .* the head is 'scalar'"):
            convert(tmp_path / "model", tmp_path / "new", target_format=target)


def test_a_config_without_a_head_is_a_language_models(saved: pathlib.Path) -> None:
    file = saved / "config.json"
    content = json.loads(file.read_text())
    assert content["config"].pop("head") == "lm"
    file.write_text(json.dumps(content))
    assert read_config(saved) == TINY


def test_lazy_leaves_are_read_once_each_and_in_order(tmp_path: pathlib.Path) -> None:
    params = flatten(random_params())
    reads: list[str] = []

    def lazy(path: str, array: np.ndarray) -> LazyLeaf:
        return LazyLeaf(
            array.shape,
            array.dtype,
            lambda: reads.append(path) or array,  # type: ignore[func-returns-value]
        )

    leaves = {path: lazy(path, array) for path, array in params.items()}
    reports: list[tuple[str, int, int]] = []
    save_params(
        tmp_path / "model",
        leaves,
        TINY,
        progress=lambda *report: reports.append(report),
    )
    assert sorted(reads) == sorted(leaf_paths(TINY))
    total = sum(array.nbytes for array in params.values())
    assert reports[-1] == ("writing", total, total)
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)


def test_a_tree_written_by_stock_orbax_is_read(
    saved: pathlib.Path,
) -> None:
    params = random_params(dtype="bfloat16")
    for name in sorted(saved.glob("params/**/*"), reverse=True):
        name.unlink() if name.is_file() else name.rmdir()
    (saved / "params").rmdir()
    with ocp.StandardCheckpointer() as standard:
        standard.save(saved / "params", params)
    actual = load_params(saved, TINY, runtime=Runtime(param_dtype="bfloat16"))
    assert_same(actual, params)


def test_reading_a_checkpoint_does_not_import_orbax(saved: pathlib.Path) -> None:
    code = (
        "import sys"
        "\nfrom llama_jax.checkpoint.model_folder import load_params, read_config"
        "\nfrom llama_jax.runtime import Runtime"
        f"\nconfig = read_config({str(saved)!r})"
        f"\nload_params({str(saved)!r}, config, runtime=Runtime())"
        "\nprint([m for m in ('orbax', 'tensorstore') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_mapped_weight_cannot_change_its_file(saved: pathlib.Path) -> None:
    file = saved / "params" / "lm_head" / "0.0"
    before = file.read_bytes()
    params = load_params(saved, TINY, runtime=Runtime())
    double = jax.jit(lambda w: w * 2, donate_argnums=0)
    doubled = double(params["lm_head"])
    np.testing.assert_array_equal(doubled, 2 * random_params()["lm_head"])
    assert file.read_bytes() == before


def test_the_tokenizer_is_saved_with_the_weights(tmp_path: pathlib.Path) -> None:
    model = read_llama2c_tokenizer(
        write_llama2c_tokenizer(tmp_path / "tokenizer.bin", 270)
    )
    for name, added in (("plain", {}), ("added", {270: "<pad>", 271: "é"})):
        tokenizer = Tokenizer(model, settings=special_tokens(added))
        save_params(tmp_path / name, random_params(), TINY, tokenizer=tokenizer)
        actual = read_tokenizer(tmp_path / name)
        assert actual is not None
        assert actual.model_proto == model
        assert dict(actual.added_tokens) == added
    file = tmp_path / "added" / "text_settings.json"
    assert not (tmp_path / "plain" / file.name).exists()
    for damage in ('{"added_tokens": {"x": {}}}', '{"end_ids": ["2"]}', '{"a": 1}'):
        file.write_text(damage)
        with pytest.raises(
            LlamaJaxError, match=r"text_settings\.json: text settings: "
        ):
            read_tokenizer(tmp_path / "added")


def test_nothing_is_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    save_params(tmp_path / "empty", random_params(), TINY)
    assert is_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="already exists"):
        save_params(tmp_path / "empty", random_params(), TINY)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="already exists"):
        save_params(tmp_path / "file", random_params(), TINY)


@pytest.mark.parametrize(
    "failure", [RuntimeError("x"), CheckpointError("x"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("number", [0, 1, 11, 20])
def test_a_failed_save_leaves_no_files(
    tmp_path: pathlib.Path, failure: BaseException, number: int
) -> None:
    leaves = flatten(random_params())
    path = list(leaves)[number]

    def fail() -> np.ndarray:
        raise failure

    leaves[path] = LazyLeaf(leaves[path].shape, leaves[path].dtype, fail)
    expected = (
        KeyboardInterrupt if not isinstance(failure, Exception) else CheckpointError
    )
    with pytest.raises(expected):
        save_params(tmp_path / "model", leaves, TINY)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_config_are_refused(tmp_path: pathlib.Path) -> None:
    def save(changes: dict[str, Any], drop: str = "") -> None:
        leaves = flatten(random_params()) | changes
        leaves.pop(drop, None)
        save_params(tmp_path / "model", unflatten(leaves), TINY)

    with pytest.raises(CheckpointError, match="lacks lm_head"):
        save({}, drop="lm_head")
    with pytest.raises(CheckpointError, match="has the unknown weight extra"):
        save({"extra": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"lm_head has shape \[272, 32\]"):
        save({"lm_head": np.zeros((272, 32), np.float32)})
    with pytest.raises(CheckpointError, match="lm_head has dtype int8"):
        save({"lm_head": np.zeros((32, 272), np.int8)})
    deep = TINY.replace(num_layers=2**31)
    with pytest.raises(CheckpointError, match="2147483648 layers"):
        save_params(tmp_path / "model", random_params(), deep)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "cannot be read"),
        ("config.json", b"{", "is not JSON .*; copy or convert the model again"),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b'{"model_type": "llama"}', "not the configuration"),
        ("config.json", b'{"format": "llama_jax", "format_version": 2}', "upgrade"),
        (
            "config.json",
            b'{"format": "llama_jax", "format_version": 1}',
            "has no `config`",
        ),
        (
            "config.json",
            b'{"format": "llama_jax", "format_version": 1, "config": {"x": 1}}',
            "missing",
        ),
        ("params/_METADATA", None, "not an Orbax checkpoint"),
        ("params/lm_head/0.0", None, "0 bytes instead of 34,816"),
        ("params/lm_head/0.0", b"123", "3 bytes instead of 34,816"),
        ("params/lm_head/.zarray", None, "lacks lm_head"),
        ("params/lm_head/.zarray", b"", "is empty"),
        ("params/lm_head/.zarray", b"[" * 9999, "not the description"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(
    saved: pathlib.Path, file: str, content: bytes | None, message: str
) -> None:
    if content is None:
        (saved / file).unlink()
    else:
        (saved / file).write_bytes(content)
    with pytest.raises(LlamaJaxError, match=message) as caught:
        load_params(saved, read_config(saved), runtime=Runtime())
    assert "\n" not in str(caught.value)


# TensorStore reports to the event loop of a restore that has failed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mutated_descriptions_are_refused_or_read(saved: pathlib.Path) -> None:
    file = saved / "params" / "lm_head" / ".zarray"
    whole = json.loads(file.read_text())
    rng = random.Random(0)
    values: list[Any] = [
        None, 0, -1, 1 << 70, 32, "x", "<f4", "<f8", [], [32], [32, 272], [32, 272.0],
        [272, 32], [1, 1, 1, 1], {}, {"id": "zstd"}, True, "F", "/", "../..", [[]],
    ]  # fmt: skip
    refused = 0
    for _ in range(150):
        changed = dict(whole)
        for key in rng.sample(sorted(whole), rng.choice((1, 1, 2))):
            changed[key] = rng.choice(values)
            if rng.random() < 0.1:
                del changed[key]
        file.write_text(json.dumps(changed))
        try:
            load_params(saved, TINY, runtime=Runtime())
        except LlamaJaxError:
            refused += 1
    assert 75 < refused < 150


def test_compressed_leaves_are_read_through_orbax(saved: pathlib.Path) -> None:
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as compressing:
        compressing.save(saved / "other", random_params())
    (saved / "params").rename(saved / "before")
    (saved / "other").rename(saved / "params")
    description = json.loads((saved / "params/lm_head/.zarray").read_text())
    assert description["compressor"] is not None
    assert_same(load_params(saved, TINY, runtime=Runtime()), random_params())


def test_a_bfloat16_leaf_is_described_as_one(tmp_path: pathlib.Path) -> None:
    save_params(tmp_path / "model", random_params(dtype="bfloat16"), TINY)
    leaf = tmp_path / "model" / "params" / "lm_head"
    described = json.loads((leaf / ".zarray").read_text())
    assert described["dtype"] == "bfloat16"
    raw = np.frombuffer((leaf / "0.0").read_bytes(), ml_dtypes.bfloat16)
    expected = random_params(dtype="bfloat16")["lm_head"]
    np.testing.assert_array_equal(raw.reshape(32, 272), expected)


@pytest.mark.parametrize("layout", ["stacked", "unrolled"])
def test_weights_are_rounded_as_they_are_written(
    tmp_path: pathlib.Path, layout: Any
) -> None:
    params = random_params()
    given = stack_layers(params) if layout == "stacked" else params
    save_params(tmp_path / "half", given, TINY, dtype="float16")
    leaves = open_leaves(tmp_path / "half" / "params")
    expected = flatten(params)
    assert leaves.keys() == expected.keys()
    for path, leaf in leaves.items():
        assert leaf.dtype == np.float16
        rounded = np.asarray(expected[path]).astype(np.float16)
        np.testing.assert_array_equal(leaf.read(), rounded)
