"""DPO and IPO: what counts, the reference, and learning."""

import json
import math
import pathlib
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.data.files import Corpus
from llama_jax.errors import ConfigError
from llama_jax.model.transformer import Llama
from llama_jax.params import stack_layers
from llama_jax.rlhf.direct_preference import (
    DirectLoss,
    answer_logprobs,
    prefer_directly,
    preference_sums,
)
from llama_jax.rlhf.pairs import PairBatch, PairSource
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.text.prompt_formats import get_format
from llama_jax.train.methods import Method, train_adapters, train_weights
from llama_jax.train.metrics import read_metrics

WORDS = ("the tea", "he", "she", "a", "tea")
RUNTIME = Runtime(rules=TRAINING_RULES)
LORA = llama_jax.Lora(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("dpo")
    records = [
        {"prompt": word, "chosen": f"{other} he", "rejected": "she she", "rating": 1}
        for word in WORDS
        for other in WORDS
        if other != "she"
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    save_params(
        folder / "base", random_params(TALKING), TALKING, tokenizer=tiny_tokenizer()
    )
    return folder


def pairs(folder: pathlib.Path, **settings: Any) -> PairSource:
    ours = {"batch_size": 4, "length": 32, "margins": "none", **settings}
    return PairSource(
        corpus=Corpus([folder / "pairs.jsonl"]),
        tokenizer=tiny_tokenizer(),
        format=get_format("wizardlm-7b"),
        **ours,
    )


@pytest.fixture(scope="module")
def batch(folder: pathlib.Path) -> PairBatch:
    return on_device(next(iter(pairs(folder))))


def on_device(batch: PairBatch) -> PairBatch:
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="module", params=["weights", "adapters"])
def method(request: pytest.FixtureRequest, folder: pathlib.Path) -> Method:
    opened = llama_jax.open_model(folder / "base")
    if request.param == "weights":
        return train_weights(TALKING, RUNTIME, opened=opened)
    return train_adapters(opened, RUNTIME, LORA)


@pytest.mark.parametrize(("loss", "value"), [("dpo", math.log(2)), ("ipo", 25.0)])
def test_the_initial_policy_equals_its_reference_and_has_a_gradient(
    method: Method, batch: PairBatch, loss: DirectLoss, value: float
) -> None:
    learning = prefer_directly(method, loss=loss, beta=0.1)

    def total(trained: Any, frozen: Any) -> Any:
        sums = learning.loss(trained, frozen, batch)
        return sums.total / sums.weight, sums.metrics

    compute = jax.jit(jax.value_and_grad(total, has_aux=True))
    (mean, metrics), grad = compute(learning.init(), learning.frozen)
    assert mean == np.float32(value), "to the last bit"
    assert metrics["margin"] == 0
    assert metrics["accuracy"] == 0.5 * len(batch.weight)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad)) > 0


def test_prompt_tokens_and_padding_do_not_count(batch: PairBatch) -> None:
    model = Llama(TALKING, Runtime(layer_layout="stacked"))
    params = stack_layers(random_params(TALKING))
    sums = np.asarray(answer_logprobs(model, params, batch))
    loaded = llama_jax.Loaded(
        Llama(TALKING, Runtime()), random_params(TALKING), tiny_tokenizer()
    )
    for row, side in np.ndindex(sums.shape):
        last = int(batch.last[row, side])
        ids = np.asarray(batch.tokens[row, side, : last + 1]).tolist()
        alone = llama_jax.score(loaded, [llama_jax.Request(prompt_ids=ids)])[0]
        is_answer = np.asarray(batch.answer[row, side, : last + 1])
        assert 0 < is_answer.sum() < len(ids)
        expected = alone.logprobs[is_answer].sum()
        np.testing.assert_allclose(sums[row, side], expected, rtol=1e-5)
    after = np.arange(32) > np.asarray(batch.last)[..., None]
    other = batch._replace(tokens=jnp.where(after, 61, batch.tokens))
    np.testing.assert_array_equal(answer_logprobs(model, params, other), sums)
    everything = batch._replace(answer=jnp.asarray(~after))
    assert (np.asarray(answer_logprobs(model, params, everything)) < sums).all()


def test_no_token_spans_prompt_and_answer(folder: pathlib.Path) -> None:
    source = pairs(folder, epochs=1)
    for preference, *dialogs in source.pairs():
        prompt = source.format.encode(source.tokenizer, preference.chosen[:-1])
        for ids, prompt_length in dialogs:
            assert ids[:prompt_length] == prompt


@pytest.mark.parametrize("loss", get_args(DirectLoss))
def test_the_loss_is_the_papers(batch: PairBatch, loss: DirectLoss) -> None:
    draw = np.random.default_rng(0)
    logprobs, reference = draw.normal(size=(2, 4, 2)).astype(np.float32)
    margin, weight = draw.random((2, 4)).astype(np.float32)
    weight[3] = 0
    given = batch._replace(margin=jnp.asarray(margin), weight=jnp.asarray(weight))
    total = 0.0
    for row in range(4):
        chosen, rejected = logprobs[row] - reference[row]
        if loss == "dpo":
            logit = 0.3 * (chosen - rejected) - margin[row]
            total += weight[row] * math.log1p(math.exp(-logit))
        else:
            total += weight[row] * (chosen - rejected - 1 / 0.6) ** 2
    sums = preference_sums(
        jnp.asarray(logprobs), jnp.asarray(reference), given, loss=loss, beta=0.3
    )
    np.testing.assert_allclose(sums.total, total, rtol=1e-5)
    rewards = 0.3 * (logprobs - reference)
    np.testing.assert_allclose(
        sums.metrics["margin"], weight @ (rewards[:, 0] - rewards[:, 1]), rtol=1e-4
    )


def test_the_margin_of_preferred_answers_rises_and_the_reference_stays(
    method: Method, folder: pathlib.Path, batch: PairBatch, tmp_path: pathlib.Path
) -> None:
    learning = prefer_directly(method)
    model = learning.model
    assert isinstance(model, Llama)
    before = np.asarray(answer_logprobs(model, learning.frozen, batch))
    config = llama_jax.RunConfig(steps=8, batch_size=4, learning_rate=1e-2, warmup=0)
    result = llama_jax.run(config, learning, pairs(folder), tmp_path / "run")
    first, *_, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["margin"] == 0
    assert last["margin"] > 0.5
    assert last["loss"] < 0.6 < first["loss"]
    after = answer_logprobs(model, learning.frozen, batch)
    np.testing.assert_array_equal(after, before)
    assert result.path.name == learning.result_name


def test_beta_must_be_positive(method: Method) -> None:
    with pytest.raises(ConfigError, match="beta: must be a positive number, got 0"):
        prefer_directly(method, beta=0.0)
