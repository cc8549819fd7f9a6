"""Configurations: the published ones, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from support.models import TINY, configs

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import ConfigError
from llama_jax.model.transformer import Llama
from llama_jax.params import count_params, param_shapes
from llama_jax.presets import PRESETS, preset
from llama_jax.runtime import Runtime

# L, D, N, K, F, V, max_seq_len, rope_theta, norm_eps, parameters
PUBLISHED = {
    "llama1-7b": (
        32, 4096, 32, 32, 11008, 32000, 2048, 1e4, 1e-6, 6_738_415_616),
    "llama1-13b": (
        40, 5120, 40, 40, 13824, 32000, 2048, 1e4, 1e-6, 13_015_864_320),
    "llama1-33b": (
        60, 6656, 52, 52, 17920, 32000, 2048, 1e4, 1e-6, 32_528_943_616),
    "llama1-65b": (
        80, 8192, 64, 64, 22016, 32000, 2048, 1e4, 1e-5, 65_285_660_672),
    "llama2-7b": (
        32, 4096, 32, 32, 11008, 32000, 4096, 1e4, 1e-5, 6_738_415_616),
    "llama2-13b": (
        40, 5120, 40, 40, 13824, 32000, 4096, 1e4, 1e-5, 13_015_864_320),
    "llama2-70b": (
        80, 8192, 64, 8, 28672, 32000, 4096, 1e4, 1e-5, 68_976_648_192),
    "codellama-7b": (
        32, 4096, 32, 32, 11008, 32016, 16384, 1e6, 1e-5, 6_738_546_688),
    "codellama-13b": (
        40, 5120, 40, 40, 13824, 32016, 16384, 1e6, 1e-5, 13_016_028_160),
    "codellama-34b": (
        48, 8192, 64, 8, 22016, 32000, 16384, 1e6, 1e-5, 33_743_970_304),
    "codellama-70b": (
        80, 8192, 64, 8, 28672, 32016, 16384, 1e6, 1e-5, 68_976_910_336),
    "codellama-70b-python": (
        80, 8192, 64, 8, 28672, 32016, 4096, 1e4, 1e-5, 68_976_910_336),
    # Without infilling pieces: V is Llama 2's, and so is the number of parameters.
    "codellama-7b-python": (
        32, 4096, 32, 32, 11008, 32000, 16384, 1e6, 1e-5, 6_738_415_616),
    "codellama-13b-python": (
        40, 5120, 40, 40, 13824, 32000, 16384, 1e6, 1e-5, 13_015_864_320),
}  # fmt: skip
SAME_AS = {
    "llama2-7b-chat": "llama2-7b",
    "llama2-13b-chat": "llama2-13b",
    "llama2-70b-chat": "llama2-70b",
    "codellama-7b-instruct": "codellama-7b",
    "codellama-13b-instruct": "codellama-13b",
    "codellama-34b-python": "codellama-34b",
    "codellama-34b-instruct": "codellama-34b",
    "codellama-70b-instruct": "codellama-70b-python",
}


def test_every_preset_is_published() -> None:
    assert set(PRESETS) == set(PUBLISHED) | set(SAME_AS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_sizes(name: str) -> None:
    config = preset(name)
    found = (
        config.num_layers,
        config.embed_dim,
        config.num_heads,
        config.num_kv_heads,
        config.mlp_dim,
        config.vocab_size,
        config.max_seq_len,
        config.rope_theta,
        config.norm_eps,
    )
    assert found == PUBLISHED[name][:-1]
    assert config.head_dim == 128
    assert not config.tied_embeddings


@pytest.mark.parametrize(("variant", "base"), SAME_AS.items())
def test_variant_has_its_bases_architecture(variant: str, base: str) -> None:
    assert preset(variant) == preset(base)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    config, wanted = PRESETS[name], PUBLISHED[name][-1]
    assert count_params(param_shapes(config)) == wanted
    model = Llama(config, Runtime(layer_layout="stacked"))
    init = functools.partial(model.init, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((1, 1), jnp.int32))
    assert count_params(shapes["params"]) == wanted


def test_preset_suggests_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama2-7b'") as caught:
        preset("lama2-7b")
    assert all(name in str(caught.value) for name in PRESETS)


def test_preset_lists_all_names_where_none_is_near() -> None:
    with pytest.raises(ConfigError, match="choose from llama1-7b, ") as caught:
        preset("xyz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("num_layers", -1),
        ("embed_dim", 32.0),
        ("num_heads", True),
        ("mlp_dim", "48"),
        ("max_seq_len", None),
        ("rope_theta", 0.0),
        ("rope_theta", float("inf")),
        ("rope_scaling", 8.0),
        ("norm_eps", float("nan")),
        ("norm_eps", -1e-5),
        ("tied_embeddings", 1),
        ("tied_embeddings", None),
        ("head", "lm_head"),
        ("head", None),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        TINY.replace(**{field: value})


def test_heads_that_do_not_group_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="num_heads 4 is not a multiple of num_kv_heads 3"
    ):
        TINY.replace(num_kv_heads=3)


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="head_dim 7 is odd"):
        TINY.replace(head_dim=7)


def test_no_fact_has_a_default() -> None:
    for name in TINY.to_dict():
        fields = TINY.to_dict()
        del fields[name]
        with pytest.raises(TypeError, match=name):
            LlamaConfig(**fields)
        if name == "head":  # absent in files of the first versions
            assert LlamaConfig.from_dict(fields).head == "lm"
            continue
        with pytest.raises(ConfigError, match=f"missing {name}"):
            LlamaConfig.from_dict(fields)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown fields sliding_window"):
        LlamaConfig.from_dict({**TINY.to_dict(), "sliding_window": 4096})


LLAMA31 = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_seq_len": 8192,
}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "yarn"}, "kind is 'yarn'; choose from linear, llama3"),
        ({"kind": ["llama3"]}, "kind is"),
        ({"factor": 0.5}, "factor is 0.5; it must be a number of at least 1"),
        ({"factor": "8"}, "factor is '8'"),
        ({"factor": float("inf")}, "factor is inf"),
        ({"low_freq_factor": None}, "low_freq_factor is None"),
        ({"high_freq_factor": True}, "high_freq_factor is True"),
        ({"high_freq_factor": 1.0}, "1.0 is not below high_freq_factor 1.0"),
        ({"original_max_seq_len": 8192.0}, "must be a positive integer"),
        ({"kind": "linear"}, "must be None for kind 'linear'"),
        ({"beta_fast": 32}, "unknown fields beta_fast"),
    ],
)
def test_a_rope_scaling_out_of_range_is_refused(
    fields: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=f"rope_scaling .*{complaint}"):
        LlamaConfig.from_dict({**TINY.to_dict(), "rope_scaling": LLAMA31 | fields})


def test_a_rope_scaling_without_its_kind_or_factor_is_refused() -> None:
    for name in ("kind", "factor"):
        fields = {key: value for key, value in LLAMA31.items() if key != name}
        with pytest.raises(ConfigError, match=f"rope_scaling lacks {name}"):
            RopeScaling.from_dict(fields)


def test_a_config_is_a_key_of_what_is_compiled() -> None:
    scaled = TINY.replace(rope_scaling=RopeScaling.from_dict(LLAMA31))
    again = TINY.replace(rope_scaling=RopeScaling.from_dict(LLAMA31))
    assert hash(scaled) == hash(again)
    assert scaled == again != TINY
    assert scaled.to_dict()["rope_scaling"] == LLAMA31


@given(configs())
def test_a_config_survives_json(config: LlamaConfig) -> None:
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("dtype", "float64", "float32, bfloat16, float16"),
        ("param_dtype", "int8", "float32, bfloat16, float16, None"),
        ("layer_layout", "scanned", "unrolled, stacked"),
        ("remat", "all", "none, block, dots"),
    ],
)
def test_a_runtime_choice_that_does_not_exist_is_refused(
    field: str, value: str, choices: str
) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value!r}; .* {choices}$"):
        Runtime(**{field: value})


def test_weights_are_held_in_the_dtype_of_activations_unless_asked() -> None:
    assert Runtime(dtype="bfloat16").weight_dtype == "bfloat16"
    assert Runtime(dtype="bfloat16", param_dtype="float32").weight_dtype == "float32"
