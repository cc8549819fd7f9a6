"""Reward models: their loss on pairs, and training from a language model."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.data.files import Corpus
from llama_jax.errors import ConfigError
from llama_jax.model.transformer import ScalarModel
from llama_jax.params import stack_layers
from llama_jax.rlhf.pairs import PairBatch, PairSource
from llama_jax.rlhf.reward_model import agreement, reward_loss, score_pairs
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.text.prompt_formats import get_format
from llama_jax.train.methods import train_weights

SCALAR = TALKING.replace(head="scalar")


def draw_batch(seed: int = 0, rows: int = 4, length: int = 8) -> PairBatch:
    draw = np.random.default_rng(seed)
    last = draw.integers(2, length, (rows, 2))
    arrays: list[Any] = [
        draw.integers(3, 60, (rows, 2, length)).astype(np.int32),
        np.arange(length) <= last[..., None],
        last.astype(np.int32),
        draw.random(rows).astype(np.float32),
        np.full(rows, -1, np.int32),
        draw.integers(-1, 2, (rows, 2)).astype(np.int32),
        np.ones(rows, np.float32),
    ]
    return PairBatch(*arrays)


@pytest.fixture(scope="module")
def model() -> ScalarModel:
    return ScalarModel(SCALAR, Runtime(layer_layout="stacked"))


@pytest.fixture(scope="module")
def gradient(model: ScalarModel) -> Any:
    def total(params: Any, batch: Any) -> Any:
        sums = reward_loss(safety_weight=0.5)(model, params, batch)
        return sums.total, sums

    return jax.jit(jax.grad(total, has_aux=True))


def on_device(batch: PairBatch) -> PairBatch:
    return jax.tree.map(jnp.asarray, batch)


def test_padding_and_empty_rows_change_no_bit(
    model: ScalarModel, gradient: Any
) -> None:
    params = stack_layers(random_params(SCALAR))
    batch = draw_batch()
    clean = gradient(params, on_device(batch))
    after = np.arange(8) > batch.last[..., None]
    other = batch._replace(tokens=np.where(after, 61, batch.tokens))
    jax.tree.map(
        np.testing.assert_array_equal, clean, gradient(params, on_device(other))
    )
    assert float(clean[1].weight) == 4
    half = batch._replace(weight=np.array([1, 1, 0, 0], np.float32))
    loss = reward_loss(safety_weight=0.5)
    first = jax.tree.map(lambda x: jnp.asarray(x[:2]), batch)
    expected, actual = loss(model, params, first), gradient(params, on_device(half))[1]
    np.testing.assert_allclose(actual.total, expected.total, rtol=1e-5)


def test_the_loss_is_the_papers(model: ScalarModel) -> None:
    params = stack_layers(random_params(SCALAR))
    batch = draw_batch()
    rows = batch.tokens.reshape(8, 8)
    scalars, _ = llama_jax.apply(model, params, jnp.asarray(rows))
    scores = np.asarray(scalars)[np.arange(8), batch.last.ravel()].reshape(4, 2)
    difference = scores[:, 0] - scores[:, 1]
    losses = np.log1p(np.exp(-(difference - batch.margin)))
    plain = reward_loss()(model, params, on_device(batch))
    np.testing.assert_allclose(plain.total, losses.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        plain.metrics["margin"], difference.sum(), rtol=1e-4, atol=1e-6
    )
    assert float(plain.metrics["accuracy"]) == (difference > 0).sum()
    safety = np.where(batch.safe == 1, scores, -scores)
    cross_entropy = np.where(batch.safe < 0, 0, np.log1p(np.exp(-safety)))
    both = reward_loss(safety_weight=0.5)(model, params, on_device(batch))
    expected = losses.sum() + 0.5 * cross_entropy.mean(axis=1).sum()
    np.testing.assert_allclose(both.total, expected, rtol=1e-5)
    with pytest.raises(ConfigError, match="safety_weight"):
        reward_loss(safety_weight=-1.0)


def test_a_margin_belongs_to_its_own_pair(model: ScalarModel) -> None:
    params = stack_layers(random_params(SCALAR))
    batch = draw_batch()
    totals = [
        float(reward_loss()(model, params, on_device(given)).total)
        for given in (batch, batch._replace(margin=batch.margin[::-1].copy()))
    ]
    assert abs(totals[0] - totals[1]) > 1e-3, "B margins against [B, 1] scores"


def test_a_reward_model_learns_from_a_file_of_preferences(
    tmp_path: pathlib.Path,
) -> None:
    words = ("the tea", "he", "she", "a", "tea")
    records = [
        {"prompt": word, "chosen": f"{other} he", "rejected": f"{other} she"}
        for word in words
        for other in words
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    tokenizer = tiny_tokenizer()
    save_params(tmp_path / "base", random_params(TALKING), TALKING, tokenizer=tokenizer)

    def pairs(epochs: int | None) -> PairSource:
        return PairSource(
            corpus=Corpus([tmp_path / "pairs.jsonl"]),
            tokenizer=tokenizer,
            format=get_format("wizardlm-7b"),
            batch_size=8,
            length=48,
            epochs=epochs,
        )

    method = train_weights(
        SCALAR,
        Runtime(rules=TRAINING_RULES),
        opened=llama_jax.open_model(tmp_path / "base"),
        loss=reward_loss(),
    )
    config = llama_jax.RunConfig(steps=25, batch_size=8, learning_rate=1e-2, warmup=0)
    source = pairs(None)
    result = llama_jax.run(
        config,
        method,
        source,
        tmp_path / "run",
        tokenizer=tokenizer,
        describe=lambda _: source.facts(),
    )
    loaded = llama_jax.load(result.path)
    measured = agreement(score_pairs(loaded, pairs(1)))
    assert measured.pairs == 25
    assert measured.accuracy == 1.0
    with pytest.raises(ConfigError, match="scoring: needs a model with head"):
        score_pairs(llama_jax.load(tmp_path / "base"), pairs(1))
