"""Loading llama_jax checkpoints and foreign formats."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
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
)
from support.tolerances import GOLDEN_LOGITS

from llama_jax import loading as load_module
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.conversion import FormatName, convert
from llama_jax.errors import CheckpointError, ConfigError, MeshError, TokenizerError
from llama_jax.loading import default_runtime, load
from llama_jax.model.extended_context import extend_context
from llama_jax.model.lora import Lora, init_lora
from llama_jax.model.transformer import apply
from llama_jax.params import flatten
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.adapters import merge_checkpoint, save_adapters

GOLDEN = [
    ("meta/llama1-mha-tiny", "llama2.model", "meta/llama1-mha-tiny"),
    ("meta/llama2-gqa-tiny-mp2", "llama2.model", "meta/llama2-gqa-tiny-mp2"),
    ("meta/codellama-tiny", "codellama.model", "meta/codellama-tiny"),
    ("weights/stories15M.bin", "llama2.model", "weights/stories15M.golden"),
]


@pytest.fixture
def foreign(tmp_path: pathlib.Path) -> pathlib.Path:
    """A llama2.c checkpoint with its tokenizer in the same folder."""
    write_llama2c_tokenizer(tmp_path / "tokenizer.bin")
    return write_llama2c(tmp_path / "x.bin", TINY, meta_tensors(TINY))


def assert_golden(loaded: Loaded, golden: pathlib.Path) -> None:
    expected = np.load(golden / "golden.npz")
    tokens, positions = jnp.asarray(expected["tokens"]), expected["positions"]
    at = jnp.asarray(np.broadcast_to(positions, (len(tokens), len(positions))))
    logits, _ = apply(loaded.model, loaded.params, tokens, logits_at=at)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=GOLDEN_LOGITS)


@pytest.mark.parametrize(("source", "tokenizer", "golden"), GOLDEN)
def test_logits_are_those_of_metas_code(
    assets: pathlib.Path,
    tmp_path: pathlib.Path,
    source: str,
    tokenizer: str,
    golden: str,
) -> None:
    pieces = assets / "tokenizers" / tokenizer
    convert(assets / source, tmp_path / "ours", tokenizer=pieces, max_seq_len=256)
    ours = load(tmp_path / "ours", runtime=Runtime())
    assert_golden(ours, assets / golden)
    direct = load(assets / source, runtime=Runtime(), tokenizer=pieces, max_seq_len=256)
    assert direct.model == ours.model
    assert direct.tokenizer.contents == ours.tokenizer.contents
    for path, leaf in flatten(ours.params).items():
        np.testing.assert_array_equal(flatten(direct.params)[path], leaf)


def test_grouped_stories_are_read(assets: pathlib.Path) -> None:
    loaded = load(
        assets / "weights" / "stories260K.bin",
        runtime=Runtime(),
        tokenizer=assets / "tokenizers" / "tok512.bin",
    )
    assert (loaded.model.config.num_heads, loaded.model.config.num_kv_heads) == (8, 4)
    story = "Once upon a time, there was a little girl named Lily. She loved to play"
    ids = jnp.asarray([loaded.tokenizer.encode(story, bos=True, eos=False)])
    logits, _ = apply(loaded.model, loaded.params, ids)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()
    assert loss < 1.5  # a model that was read wrongly is near log 512 = 6.2


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_every_way_of_loading_gives_the_same_logits(
    foreign: pathlib.Path, layout: Any, sharded: bool, converted: bool
) -> None:
    path = foreign
    if converted:
        path = foreign.parent / "ours"
        convert(foreign, path)
    mesh = make_mesh({"fsdp": 2, "tensor": 4}) if sharded else None
    loaded = load(path, runtime=Runtime(layer_layout=layout), mesh=mesh)
    plain = load(foreign, runtime=Runtime())
    tokens = jnp.arange(12).reshape(2, 6)
    actual, _ = apply(loaded.model, loaded.params, tokens)
    expected, _ = apply(plain.model, plain.params, tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=GOLDEN_LOGITS)


@pytest.mark.parametrize("target", ["meta", "hf", "gguf", "orbax"])
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_every_format_is_loaded_onto_a_mesh_as_it_is(
    foreign: pathlib.Path, target: FormatName, layout: Any
) -> None:
    runtime = Runtime(layer_layout=layout)
    convert(foreign, foreign.parent / "other", target_format=target, dtype="float32")
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    packed = foreign.with_name("tokenizer.bin")
    options: dict[str, Any] = {"tokenizer": packed, "max_seq_len": 64}
    expected = load(foreign, runtime=runtime, **options)
    actual = load(foreign.parent / "other", runtime=runtime, mesh=mesh, **options)
    assert actual.model.config == expected.model.config
    whole, part = 0, 0
    for path, leaf in flatten(actual.params).items():
        np.testing.assert_array_equal(leaf, flatten(expected.params)[path], path)
        whole += leaf.nbytes
        part += leaf.addressable_shards[0].data.nbytes
    assert part < whole / 7  # the norms are in fewer parts


def test_loading_a_foreign_checkpoint_writes_nothing(foreign: pathlib.Path) -> None:
    before = sorted(foreign.parent.rglob("*"))
    loaded = load(foreign, runtime=Runtime(dtype="bfloat16"))
    assert sorted(foreign.parent.rglob("*")) == before
    expected = ours_from_meta(TINY, meta_tensors(TINY))
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, expected[path].astype(jnp.bfloat16))


def test_tokenizer_and_context_arguments_take_precedence(foreign: pathlib.Path) -> None:
    smaller = write_llama2c_tokenizer(foreign.parent / "smaller.bin", 270)
    convert(foreign, foreign.parent / "ours")
    for path in (foreign, foreign.parent / "ours"):
        assert load(path).tokenizer.vocab_size == 272
        given = load(path, tokenizer=smaller, max_seq_len=7)
        assert given.tokenizer.vocab_size == 270
        assert given.model.config.max_seq_len == 7
        again = load(path, tokenizer=given.tokenizer)
        assert again.tokenizer is given.tokenizer
        larger = write_llama2c_tokenizer(foreign.parent / "larger.bin", 280)
        with pytest.raises(TokenizerError, match="272"):
            load(path, tokenizer=larger)
        with pytest.raises(ConfigError, match="max_seq_len"):
            load(path, max_seq_len=-1)


def test_a_checkpoint_without_tokenizer_needs_one(foreign: pathlib.Path) -> None:
    ours = foreign.parent / "ours"
    convert(foreign, ours)
    (ours / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match="--tokenizer"):
        load(ours)
    (foreign.parent / "tokenizer.bin").rename(foreign.parent / "elsewhere.bin")
    with pytest.raises(TokenizerError, match="--tokenizer"):
        load(foreign)
    loaded = load(ours, tokenizer=foreign.parent / "elsewhere.bin")
    assert isinstance(loaded.tokenizer, Tokenizer)


def test_paths_without_a_checkpoint_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken" / "params").mkdir(parents=True)
    (tmp_path / "broken" / "config.json").write_text("{")
    for name in ("none", "empty", "file", "hf", "broken"):
        with pytest.raises(CheckpointError, match=str(tmp_path / name)):
            load(tmp_path / name)


def test_a_mesh_that_does_not_divide_the_model_is_refused(
    foreign: pathlib.Path,
) -> None:
    mesh = make_mesh({"tensor": 8})
    write_meta(
        foreign.parent / "odd",
        TINY.replace(num_heads=4, num_kv_heads=4, head_dim=8),
        meta_tensors(TINY),
    )
    write_llama2c_tokenizer(foreign.parent / "t.bin")
    with pytest.raises(MeshError, match="q_proj"):
        load(
            foreign.parent / "odd",
            mesh=mesh,
            tokenizer=foreign.parent / "t.bin",
            max_seq_len=64,
        )


def test_the_bundled_model_is_the_only_one_in_its_folder(
    foreign: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = foreign.parent / "assets"
    assets.mkdir()
    monkeypatch.setattr(load_module, "_ASSETS", assets)
    with pytest.raises(CheckpointError, match="holds 0"):
        load()
    convert(foreign, assets / "one")
    assert load().model.config == TINY
    convert(foreign, assets / "two")
    with pytest.raises(CheckpointError, match="holds 2"):
        load()


class Device:
    """A device with the attributes that `default_runtime` reads."""

    def __init__(self, platform: str, capability: str | None = None) -> None:
        self.platform = platform
        if capability is not None:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (Device("cpu"), "float32"),
        (Device("tpu"), "bfloat16"),
        (Device("gpu", "7.5"), "float16"),
        (Device("gpu", "8.0"), "bfloat16"),
        (Device("gpu", "10.0"), "bfloat16"),
    ],
)
def test_the_default_dtype_is_fast_on_the_device(
    device: Device, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert default_runtime() == Runtime(dtype=dtype)  # type: ignore[arg-type]


def test_loading_our_own_folder_imports_no_converter(foreign: pathlib.Path) -> None:
    ours = foreign.parent / "ours"
    convert(foreign, ours)
    code = (
        "import sys; from llama_jax.loading import load"
        f"\nload({str(ours)!r})"
        "\nprint([m for m in sys.modules"
        " if m.startswith(('llama_jax.conversion', 'orbax', 'tensorstore'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_adapters_bring_the_rotary_positions_that_they_were_trained_with(
    foreign: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    tokenizer = foreign.with_name("tokenizer.bin")
    convert(foreign, tmp_path / "base", tokenizer=tokenizer)
    scaled = extend_context(TINY.replace(rope_theta=5e5), "yarn,factor=4", None)
    lora = Lora(rank=2, alpha=4.0, targets=("q_proj",))
    adapters = init_lora(scaled, jax.random.key(0), lora)
    save_adapters(tmp_path / "adapter", adapters, scaled, lora)
    loaded = load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert loaded.model.config == scaled
    short = load(tmp_path / "base", adapter=tmp_path / "adapter", max_seq_len=8)
    assert short.model.config == scaled.replace(max_seq_len=8)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert load(tmp_path / "merged").model.config == scaled
    same = {"max_seq_len": 8, "rope_theta": 1e4, "rope_scaling": None}
    (tmp_path / "adapter" / "context.json").write_text(json.dumps(same))
    loaded = load(tmp_path / "base", adapter=tmp_path / "adapter")
    assert loaded.model.config == TINY
    (tmp_path / "adapter" / "context.json").write_text('{"rope_theta": -1}')
    with pytest.raises(ConfigError, match=r"context.json: .*rope_theta is -1"):
        load(tmp_path / "base", adapter=tmp_path / "adapter")
