"""Meta's folders: configuration, and weights joined from the ranks."""

import hashlib
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.foreign import (
    TINY,
    meta_params,
    meta_tensors,
    ours_from_meta,
    write_meta,
    write_pth,
)

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.checksums import verify_checksums
from llama_jax.conversion.formats import open_source
from llama_jax.conversion.meta import config_from_params, read_meta
from llama_jax.conversion.meta_params import params_from_config, published_max_seq_len
from llama_jax.conversion.pth_reader import read_pth
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.model.presets import PRESETS


def read_all(folder: pathlib.Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    source = read_meta(folder, max_seq_len=config.max_seq_len)
    assert source.config == config
    return {path: leaf.read() for path, leaf in source.leaves().items()}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert actual[path].dtype == array.dtype, path
        np.testing.assert_array_equal(
            actual[path].astype(np.float32), array.astype(np.float32), err_msg=path
        )


@st.composite
def folders(draw: Any) -> tuple[LlamaConfig, int, int, Any]:
    """Draw a model, a number of ranks, the split axis of the embedding, and a dtype."""
    ranks = draw(st.sampled_from([1, 2, 4, 8]))
    kv_heads = ranks * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    embed_dim = heads * 2 * draw(st.integers(1, 3))
    mlp_dim = -(-8 * embed_dim // 3 // ranks) * ranks + ranks * draw(st.integers(0, 2))
    config = TINY.replace(
        num_layers=draw(st.integers(1, 2)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        embed_dim=embed_dim,
        head_dim=embed_dim // heads,
        mlp_dim=mlp_dim,
        vocab_size=ranks * draw(st.integers(1, 5)),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
    )
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    return config, ranks, draw(st.sampled_from([0, 1])), dtype


@given(folder=folders(), seed=st.integers(0, 99))
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_weights_are_mapped_exactly_for_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    folder: tuple[LlamaConfig, int, int, Any],
    seed: int,
) -> None:
    config, ranks, embedding_axis, dtype = folder
    tensors = meta_tensors(config, seed=seed, dtype=dtype)
    extra = {"rope.freqs": np.ones(config.head_dim // 2, np.float32)}
    path = write_meta(
        tmp_path_factory.mktemp("meta"),
        config,
        tensors | extra,
        ranks=ranks,
        embedding_axis=embedding_axis,
    )
    assert_same(read_all(path, config), ours_from_meta(config, tensors))


def test_rotary_tables_of_llama_1_are_dropped(tmp_path: pathlib.Path) -> None:
    tensors = meta_tensors(TINY)
    tables = {
        f"layers.{layer}.attention.inner_attention.rope.freqs": np.ones(2, np.float32)
        for layer in range(TINY.num_layers)
    }
    write_meta(tmp_path, TINY, tensors | tables)
    assert_same(read_all(tmp_path, TINY), ours_from_meta(TINY, tensors))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama1-7b", {"multiple_of": 256}),
        ("llama1-13b", {"multiple_of": 256}),
        ("llama1-33b", {"multiple_of": 256}),
        ("llama1-65b", {"multiple_of": 256}),
        ("llama2-7b", {"multiple_of": 256, "vocab_size": -1}),
        ("llama2-70b", {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        ("codellama-7b", {"multiple_of": 256, "ffn_dim_multiplier": 1.0}),
        ("codellama-13b-python", {"multiple_of": 256, "ffn_dim_multiplier": 1.0}),
        ("codellama-34b", {"multiple_of": 256, "ffn_dim_multiplier": 1.0}),
        ("codellama-70b", {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
        ("codellama-70b-python", {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),
    ],
)
def test_published_params_give_the_published_model(
    name: str, fields: dict[str, Any]
) -> None:
    expected = PRESETS[name]
    params = fields | {
        "dim": expected.embed_dim,
        "n_layers": expected.num_layers,
        "n_heads": expected.num_heads,
        "norm_eps": expected.norm_eps,
    }
    if expected.num_kv_heads != expected.num_heads:
        params["n_kv_heads"] = expected.num_kv_heads
    if expected.rope_theta != 1e4:  # absent means 1e4
        params["rope_theta"] = expected.rope_theta
    config = config_from_params(params, expected.vocab_size, 1)
    max_seq_len, origin = published_max_seq_len(config, "x")
    assert config.replace(max_seq_len=max_seq_len) == expected
    assert "as published for" in origin


@pytest.mark.parametrize(
    ("width", "layers", "factor"),
    [(4096, 32, 8.0), (8192, 80, 8.0), (2048, 16, 32.0), (3072, 28, 32.0)],
)
def test_the_scaling_of_llama_3_is_read_and_written(
    width: int, layers: int, factor: float
) -> None:
    params = {
        "dim": width, "n_layers": layers, "n_heads": width // 128, "n_kv_heads": 8,
        "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5,
        "rope_theta": 5e5, "vocab_size": 128256,
    }  # fmt: skip
    config = config_from_params(params | {"use_scaled_rope": True}, 128256, 8)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("llama3", factor)
    written = params_from_config(config)
    assert written["use_scaled_rope"]
    assert config_from_params(written, 128256, 8) == config
    unscaled = config_from_params(params | {"use_scaled_rope": False}, 128256, 8)
    assert unscaled == config.replace(rope_scaling=None)
    other = RopeScaling(kind="linear", factor=factor)
    with pytest.raises(ConfigError, match="cannot store rope_scaling"):
        params_from_config(config.replace(rope_scaling=other))


def test_epsilon_distinguishes_llama_1_from_llama_2() -> None:
    for name in ("llama1-7b", "llama1-13b", "llama2-7b", "llama2-13b"):
        expected = PRESETS[name]
        actual = published_max_seq_len(expected.replace(max_seq_len=1), "x")
        assert actual == (expected.max_seq_len, f"as published for {name}")
    odd = PRESETS["llama2-70b"].replace(norm_eps=1e-4, max_seq_len=1)
    assert published_max_seq_len(odd, "x") == (4096, "as published for llama2-70b")


def test_an_unpublished_size_needs_max_seq_len(tmp_path: pathlib.Path) -> None:
    write_meta(tmp_path, TINY, meta_tensors(TINY))
    with pytest.raises(ConfigError, match="--max-seq-len"):
        read_meta(tmp_path)
    assert read_meta(tmp_path, max_seq_len=7).max_seq_len_origin == "as given"
    with pytest.raises(ConfigError, match="positive"):
        open_source(tmp_path, max_seq_len=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1; it must be true or false"),
        ({"max_seq_len": 2048}, "unknown fields max_seq_len"),
        ({"dim": "32"}, "dim is '32'"),
        ({"dim": 32.0}, "dim is 32.0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_layers": 10**30}, "n_layers is 10"),
        ({"n_layers": 2**30}, "1073741824 layers"),
        ({"n_heads": 5}, "not a multiple of n_heads"),
        ({"n_kv_heads": 3}, "not a multiple of num_kv_heads"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"ffn_dim_multiplier": float("inf")}, "ffn_dim_multiplier is inf"),
        ({"ffn_dim_multiplier": 0.001}, "mlp_dim is 0"),
        ({"ffn_dim_multiplier": 2.0}, "feed_forward"),
        ({"multiple_of": -8}, "multiple_of is -8"),
        ({"vocab_size": 273}, "the embedding has 272"),
        ({"vocab_size": -2}, "vocab_size is -2"),
        ({"norm_eps": None}, "missing fields norm_eps"),
        ({"n_heads": 32}, "odd"),
        ({"n_kv_heads": 4}, "wk.weight has the shape"),
        ({"dim": 64}, "has the shape"),
        ({"n_layers": 1}, "layers.1"),
        ({"n_layers": 3}, "lacks layers.2"),
    ],
)
def test_unsupported_params_are_refused_by_name(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    params = meta_params(TINY, **changes)
    write_meta(tmp_path, TINY, meta_tensors(TINY), params=params)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        read_meta(tmp_path, max_seq_len=64).leaves()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"1" * 5000]
)
def test_a_params_file_that_is_not_an_object_is_refused(
    tmp_path: pathlib.Path, content: bytes
) -> None:
    write_meta(tmp_path, TINY, meta_tensors(TINY))
    (tmp_path / "params.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"params\.json"):
        read_meta(tmp_path, max_seq_len=64)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_is_named(tmp_path: pathlib.Path, rank: int) -> None:
    write_meta(tmp_path, TINY, meta_tensors(TINY), ranks=4)
    (tmp_path / f"consolidated.{rank:02}.pth").unlink()
    with pytest.raises(CheckpointError, match=f"consolidated.{rank:02}.pth is missing"):
        read_meta(tmp_path, max_seq_len=64)


def test_missing_last_ranks_are_named(tmp_path: pathlib.Path) -> None:
    write_meta(tmp_path, TINY, meta_tensors(TINY), ranks=4)
    (tmp_path / "consolidated.03.pth").unlink()
    (tmp_path / "consolidated.02.pth").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"4 files, but consolidated\.02\.pth to 03 is missing",
    ):
        read_meta(tmp_path, max_seq_len=64)


def test_a_folder_without_ranks_is_refused(tmp_path: pathlib.Path) -> None:
    write_meta(tmp_path, TINY, meta_tensors(TINY))
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match="no consolidated"):
        read_meta(tmp_path, max_seq_len=64)
    (tmp_path / "consolidated.0.pth").touch()
    with pytest.raises(CheckpointError, match="unexpected name"):
        read_meta(tmp_path, max_seq_len=64)


def test_ranks_that_differ_are_refused(tmp_path: pathlib.Path) -> None:
    tensors = meta_tensors(TINY)
    write_meta(tmp_path, TINY, tensors, ranks=2)
    last = tmp_path / "consolidated.01.pth"
    whole = {name: array.copy() for name, array in read_pth(last).items()}

    write_pth(last, whole | {"norm.weight": whole["norm.weight"] + 1})
    leaves = read_meta(tmp_path, max_seq_len=64).leaves()
    with pytest.raises(CheckpointError, match=r"norm\.weight should be equal"):
        leaves["transformer/final_norm/scale"].read()

    write_pth(last, whole | {"extra": whole["norm.weight"]})
    with pytest.raises(CheckpointError, match="only one of ranks 0 and 1 has extra"):
        read_meta(tmp_path, max_seq_len=64)

    half = whole["output.weight"].astype(np.float16)
    write_pth(last, whole | {"output.weight": half})
    with pytest.raises(CheckpointError, match=r"dtype of output\.weight"):
        read_meta(tmp_path, max_seq_len=64)


def test_an_adapter_or_bias_is_refused(tmp_path: pathlib.Path) -> None:
    tensors = meta_tensors(TINY)
    tensors["layers.0.attention.wq.bias"] = np.zeros(32, np.float32)
    write_meta(tmp_path, TINY, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wq\.bias"):
        read_meta(tmp_path, max_seq_len=64).leaves()


def test_checksums_are_compared_with_the_files(tmp_path: pathlib.Path) -> None:
    write_meta(tmp_path, TINY, meta_tensors(TINY), ranks=2)
    lines = [
        f"{hashlib.md5((tmp_path / name).read_bytes()).hexdigest()}  {name}"
        for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json")
    ]
    checklist = tmp_path / "checklist.chk"
    checklist.write_text("\n".join(lines) + "\n")
    reports: list[tuple[str, int, int]] = []
    source = read_meta(tmp_path, max_seq_len=64)
    verify_checksums(source.checksums, lambda *report: reports.append(report))
    size = sum((tmp_path / line.split()[1]).stat().st_size for line in lines)
    assert reports[-1] == ("verifying checksums", size, size)

    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params, indent=1))
    with pytest.raises(CheckpointError, match=r"params\.json: its md5"):
        verify_checksums(read_meta(tmp_path, max_seq_len=64).checksums)

    checklist.write_text("0" * 32 + "  consolidated.02.pth\n")
    with pytest.raises(CheckpointError, match=r"consolidated\.02\.pth is missing"):
        read_meta(tmp_path, max_seq_len=64)
    checklist.write_text("what is this\n")
    with pytest.raises(CheckpointError, match="not a checksum"):
        read_meta(tmp_path, max_seq_len=64)
