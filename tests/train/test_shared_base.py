"""One set of frozen weights for policy, critic and reward model."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.errors import ConfigError
from llama_jax.model.lora import Lora, merge
from llama_jax.params import flatten
from llama_jax.rlhf.reward_model import score_rows
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.train.adapters import merge_checkpoint, save_adapters
from llama_jax.train.methods import Method, train_adapters
from llama_jax.train.shared_base import load_reward_model_on, train_critic_on
from llama_jax.weights import Adapted

LORA = Lora(rank=2, alpha=4.0)
ROWS = [[1, 5, 9, 7], [1, 4, 6], [1, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A base model, and a reward model of adapters."""
    path = tmp_path_factory.mktemp("shared")
    params = random_params(TALKING)
    save_params(path / "base", params, TALKING, tokenizer=tiny_tokenizer())
    critic = train_critic_on(policy_of(path / "base"), seed=3)
    trained = critic.init()
    draw = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * draw.standard_normal(leaf.shape), leaf.dtype),
        trained,
    )
    critic.save(path / "reward", trained)
    return path


def policy_of(base: pathlib.Path, quantize: Any = None) -> Method:
    return train_adapters(
        llama_jax.open_model(base),
        Runtime(rules=TRAINING_RULES),
        LORA,
        quantize=quantize,
        base_model=str(base),
    )


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_reward_model_and_critic_have_the_policys_arrays(
    folder: pathlib.Path, quantize: Any
) -> None:
    policy = policy_of(folder / "base", quantize)
    reward = load_reward_model_on(policy, folder / "reward", tiny_tokenizer())
    critic = train_critic_on(policy, adapter=folder / "reward")
    ours = flatten(policy.frozen)
    for params in (reward.params, critic.params(critic.init())):
        theirs = flatten(params)
        assert theirs.pop("scalar_head").shape == (TALKING.embed_dim,)
        assert theirs.keys() == ours.keys()
        for path, leaf in theirs.items():
            base = leaf.base if isinstance(leaf, Adapted) else leaf
            assert base is ours[path], path
    assert set(policy.init()) == {"transformer"}
    drawn = train_critic_on(policy).init()
    assert jnp.all(drawn["transformer"]["layers"]["mlp"]["up_proj"]["b"] == 0)
    assert jnp.any(drawn["scalar_head"] != 0)


def test_a_shared_reward_model_scores_as_the_loaded_and_the_merged_one(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    policy = policy_of(folder / "base")
    shared = load_reward_model_on(policy, folder / "reward", tiny_tokenizer())
    beside = llama_jax.load(folder / "base", adapter=folder / "reward")
    assert "lm_head" not in beside.params
    merge_checkpoint(folder / "base", folder / "reward", tmp_path / "merged")
    merged = llama_jax.load(tmp_path / "merged")
    expected = score_rows(merged, ROWS)
    assert np.ptp(expected) > 0.01
    for loaded in (shared, beside):
        np.testing.assert_allclose(score_rows(loaded, ROWS), expected, atol=1e-5)


def test_adapters_of_other_weights_are_refused_by_both_fingerprints(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # Merged adapters leave the norms as they are.
    draw = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * draw.standard_normal(leaf.shape), leaf.dtype),
        llama_jax.init_lora(
            TALKING, jax.random.key(0), LORA, runtime=Runtime(layer_layout="unrolled")
        ),
    )
    other = merge(random_params(TALKING), adapters, LORA.scaling)
    save_params(tmp_path / "other", other, TALKING, tokenizer=tiny_tokenizer())
    policy = policy_of(tmp_path / "other")
    theirs = fingerprint(llama_jax.open_model(folder / "base").leaves)
    assert policy.fingerprint != theirs
    for refused in (
        lambda: load_reward_model_on(policy, folder / "reward", tiny_tokenizer()),
        lambda: train_critic_on(policy, adapter=folder / "reward"),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        for words in (theirs, str(policy.fingerprint), str(folder / "base"), "other"):
            assert words in str(error.value)
    save_adapters(
        tmp_path / "headless", adapters, TALKING, LORA, base_weights=policy.fingerprint
    )
    with pytest.raises(ConfigError, match="adapters have no scalar head"):
        train_critic_on(policy, adapter=tmp_path / "headless")
    with pytest.raises(ConfigError, match=f"is a model with the weights {theirs}"):
        train_critic_on(policy, adapter=folder / "base")
    whole = dataclasses.replace(policy, lora=None)
    with pytest.raises(ConfigError, match="the policy trains all its weights"):
        train_critic_on(whole)
