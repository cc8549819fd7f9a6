"""Published models against their published sizes."""

import functools

import jax
import jax.numpy as jnp
import pytest

from llama_jax.errors import ConfigError
from llama_jax.model.presets import PRESETS, preset
from llama_jax.model.transformer import Llama
from llama_jax.params import count_params, param_shapes
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
    actual = (
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
    assert actual == PUBLISHED[name][:-1]
    assert config.head_dim == 128
    assert not config.tied_embeddings


@pytest.mark.parametrize(("variant", "base"), SAME_AS.items())
def test_variant_has_its_bases_architecture(variant: str, base: str) -> None:
    assert preset(variant) == preset(base)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name: str) -> None:
    config, expected = PRESETS[name], PUBLISHED[name][-1]
    assert count_params(param_shapes(config)) == expected
    model = Llama(config, Runtime(layer_layout="stacked"))
    init = functools.partial(model.init, jax.random.key(0))
    shapes = jax.eval_shape(init, jnp.zeros((1, 1), jnp.int32))
    assert count_params(shapes["params"]) == expected


def test_preset_suggests_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama2-7b'") as caught:
        preset("lama2-7b")
    assert all(name in str(caught.value) for name in PRESETS)


def test_an_unknown_preset_lists_all_names() -> None:
    with pytest.raises(ConfigError, match="is not one of llama1-7b, ") as caught:
        preset("xyz")
    assert "did you mean" not in str(caught.value)
