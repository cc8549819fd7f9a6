"""Configurations: fields out of range, and JSON."""

import json

import pytest
from hypothesis import given
from support.models import TINY, configs

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import ConfigError
from llama_jax.runtime import Runtime


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


@pytest.mark.parametrize(
    ("change", "kind", "complaint"),
    [
        ({"head_dim": 2}, "dynamic", "head_dim is 2, for which .*'dynamic'"),
        ({"rope_theta": 1.0}, "dynamic", "rope_theta is 1.0; it must be above 1"),
        ({"rope_theta": 1.0}, "yarn", "rope_theta is 1.0; it must be above 1"),
    ],
)
def test_a_scaling_that_has_no_frequencies_is_refused(
    change: dict[str, object], kind: str, complaint: str
) -> None:
    fields = {"kind": kind, "factor": 2.0, "original_max_seq_len": 16}
    scaling = RopeScaling.from_dict((YARN if kind == "yarn" else {}) | fields)
    with pytest.raises(ConfigError, match=complaint):
        TINY.replace(rope_scaling=scaling, **change)


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
YARN = {
    "kind": "yarn",
    "attention_factor": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "low_freq_factor": None,
    "high_freq_factor": None,
}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "su"}, "kind is 'su'; choose from linear, dynamic, yarn, llama3"),
        ({"kind": "yarn"}, "attention_factor is None; it must be a positive number"),
        ({"kind": "dynamic"}, "low_freq_factor is 1.0; .* None for kind 'dynamic'"),
        ({"kind": ["llama3"]}, "kind is"),
        ({"factor": 0.5}, "factor is 0.5; it must be a number of at least 1"),
        ({"factor": "8"}, "factor is '8'"),
        ({"factor": float("inf")}, "factor is inf"),
        ({"low_freq_factor": None}, "low_freq_factor is None"),
        ({"high_freq_factor": True}, "high_freq_factor is True"),
        ({"high_freq_factor": 1.0}, "1.0 is not below high_freq_factor 1.0"),
        ({"original_max_seq_len": 8192.0}, "must be a positive integer"),
        ({"kind": "linear"}, "must be None for kind 'linear'"),
        ({"beta_fast": 32}, "must be None for kind 'llama3'"),
        ({"beta_middle": 2}, "unknown fields beta_middle"),
        (YARN | {"beta_slow": 32.0}, "32.0 is not below beta_fast 32.0"),
        (YARN | {"truncate": 1}, "truncate is 1; it must be true or false"),
        (
            YARN | {"attention_factor": 0},
            "attention_factor is 0; it must be a positive",
        ),
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


def test_configs_are_hashable_by_value() -> None:
    scaled = TINY.replace(rope_scaling=RopeScaling.from_dict(LLAMA31))
    again = TINY.replace(rope_scaling=RopeScaling.from_dict(LLAMA31))
    assert hash(scaled) == hash(again)
    assert scaled == again != TINY
    assert scaled.to_dict()["rope_scaling"] == LLAMA31


@given(configs())
def test_a_config_survives_json(config: LlamaConfig) -> None:
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.wrong_types
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


def test_weights_default_to_the_dtype_of_activations() -> None:
    assert Runtime(dtype="bfloat16").weight_dtype == "bfloat16"
    assert Runtime(dtype="bfloat16", param_dtype="float32").weight_dtype == "float32"
