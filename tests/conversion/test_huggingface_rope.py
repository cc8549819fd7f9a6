"""Rotary positions of Hugging Face's folders: fields, and numbers of `transformers`."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.foreign import TINY, tiny_tokenizer
from support.models import random_params, random_tokens

from llama_jax.checkpoint.model_folder import save_params
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion import convert, open_source
from llama_jax.conversion.huggingface_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)
from llama_jax.errors import ConfigError
from llama_jax.loading import load
from llama_jax.model.rope import rope_frequencies
from llama_jax.model.transformer import apply
from llama_jax.runtime import Runtime

ORIGINAL, LONGEST = 32, 128
LONG = TINY.replace(head_dim=16, num_heads=4, num_kv_heads=2, max_seq_len=LONGEST)
FIELDS = config_to_hugging_face(LONG, "float32", {})
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
ATTENTION = 1.138629436111989
# Fields of `rope_scaling`, and what transformers 4.57 and 5.24 compute from them: the
# attention factor, and the second, third, fourth and last of 8 frequencies.
COMPUTED: dict[str, tuple[dict[str, Any], float, list[float]]] = {
    "yarn": (YARN, ATTENTION, [0.1976424, 0.025, 0.007905695, 7.905695e-5]),
    "yarn, attention_factor": (
        YARN | {"attention_factor": 0.9, "mscale": 0.7, "mscale_all_dim": 0.5},
        0.9,
        [0.1976424, 0.025, 0.007905695, 7.905695e-5],
    ),
    "yarn, mscale and mscale_all_dim": (
        YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
        1.0268361529030026,
        [0.1976424, 0.025, 0.007905695, 7.905695e-5],
    ),
    "yarn, mscale alone": (
        YARN | {"mscale": 0.707},
        ATTENTION,
        [0.1976424, 0.025, 0.007905695, 7.905695e-5],
    ),
    "yarn, betas": (
        YARN | {"beta_fast": 2.0, "beta_slow": 0.1},
        ATTENTION,
        [0.2569351, 0.0625, 0.01383497, 7.905695e-5],
    ),
    "yarn, not truncated": (
        YARN | {"truncate": False},
        ATTENTION,
        [0.1484903, 0.025, 0.007905695, 7.905695e-5],
    ),
    "yarn, truncate is null": (
        YARN | {"truncate": None},
        ATTENTION,
        [0.1484903, 0.025, 0.007905695, 7.905695e-5],
    ),
    "dynamic": (DYNAMIC, 1.0, [0.2394813, 0.05735132, 0.01373457, 4.517539e-5]),
}
computed = pytest.mark.parametrize(
    ("scaling", "attention", "frequencies"), COMPUTED.values(), ids=COMPUTED
)


def fields_with(scaling: Any, **more: Any) -> dict[str, Any]:
    fields = FIELDS | {"rope_scaling": scaling} | more
    if isinstance(scaling, dict) and scaling.get("rope_type") == "dynamic":
        fields["max_position_embeddings"] = ORIGINAL
    return fields


@computed
def test_frequencies_equal_those_of_transformers(
    scaling: dict[str, Any], attention: float, frequencies: list[float]
) -> None:
    config = config_from_hugging_face(fields_with(scaling))
    actual = rope_frequencies(config, LONGEST)
    assert actual[0] == 1
    np.testing.assert_allclose(actual[[1, 2, 3, 7]], frequencies, rtol=1e-6)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.attention_factor or 1.0) == attention


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
        *(scaling for scaling, *_ in COMPUTED.values()),
    ],
)
def test_scalings_are_read_in_every_form_and_written(scaling: Any) -> None:
    config = config_from_hugging_face(fields_with(scaling, rope_theta=5e5))
    written = json.loads(json.dumps(config_to_hugging_face(config, "float16", {})))
    assert config_from_hugging_face(written) == config
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    nested = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": 5e5}
    newer = fields_with(scaling) | {"rope_parameters": nested}
    del newer["rope_theta"], newer["rope_scaling"]
    assert config_from_hugging_face(newer) == config
    if scaling is not None:
        older = {"type": scaling["rope_type"], "finetuned": True, **scaling}
        del older["rope_type"]
        fields = fields_with(scaling, rope_theta=5e5) | {"rope_scaling": older}
        assert config_from_hugging_face(fields) == config


def test_the_original_context_of_yarn_defaults_to_the_models() -> None:
    config = config_from_hugging_face(fields_with({"type": "yarn", "factor": 4}))
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_seq_len == LONGEST


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": 3}, "rope_scaling is 3; it must be an object"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 4.0}},
            "of the type 'longrope'; supported are default, linear, dynamic, yarn, ll",
        ),
        ({"rope_scaling": {"type": ["yarn"]}}, "is of the type .'yarn'."),
        ({"rope_parameters": {"rope_type": "su"}}, "rope_parameters is of the type 's"),
        ({"rope_scaling": {"type": "yarn"}}, "'yarn' lacks factor; add it"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0}},
            "'llama3' lacks low_freq_factor, high_freq_factor, original_max_position",
        ),
        (
            {"rope_scaling": DYNAMIC | {"original_max_position_embeddings": 32}},
            "'dynamic' has unknown fields original_max_position_embeddings; remove",
        ),
        ({"rope_scaling": YARN | {"short_factor": [1.0]}}, "unknown fields short_fact"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor is 'x'; it must"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1; it must be true"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_slow 1.0 is not below"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "rotary_factor is 0"),
        (
            {"rope_scaling": YARN, "rope_parameters": LLAMA3},
            "rope_scaling and rope_parameters are different",
        ),
    ],
)
def test_an_impossible_scaling_is_refused_by_name(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hugging_face(FIELDS | {"rope_scaling": None} | fields)


def test_a_longer_context_of_dynamic_scaling_is_not_exported() -> None:
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_max_seq_len=ORIGINAL)
    with pytest.raises(ConfigError, match="convert with --max-seq-len 32"):
        config_to_hugging_face(LONG.replace(rope_scaling=scaling), "float32", {})


@pytest.mark.slow
@computed
def test_the_numbers_above_are_those_of_transformers(
    scaling: dict[str, Any], attention: float, frequencies: list[float]
) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    pytest.importorskip("transformers", reason="needs transformers")
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = TheirConfig(**json.loads(json.dumps(fields_with(scaling))))
    rope = LlamaRotaryEmbedding(theirs)
    rope(torch.zeros(1), torch.arange(LONGEST)[None])
    assert rope.attention_scaling == attention
    actual = rope.inv_freq.numpy()[[1, 2, 3, 7]]
    np.testing.assert_allclose(actual, frequencies, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [s for s, *_ in COMPUTED.values()], ids=COMPUTED)
def test_logits_equal_those_of_transformers_within_and_beyond_the_context(
    tmp_path: pathlib.Path, scaling: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = config_from_hugging_face(fields_with(scaling))
    save_params(
        tmp_path / "ours",
        random_params(config),
        config,
        tokenizer=tiny_tokenizer(tmp_path),
    )
    convert(tmp_path / "ours", tmp_path / "hf", target_format="hf")
    assert open_source(tmp_path / "hf").config == config
    loaded = load(tmp_path / "hf", runtime=Runtime(dtype="float32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    ).eval()
    for length in (ORIGINAL // 2, ORIGINAL, ORIGINAL + 1, LONGEST):
        tokens = np.asarray(random_tokens(config, 2, length))
        actual = np.asarray(apply(loaded.model, loaded.params, jnp.asarray(tokens))[0])
        with torch.no_grad():
            expected = model(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
