"""`run` without a command: a reward model on pairs of answers, resumed and loaded."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.errors import ConfigError, TrainError
from llama_jax.model.transformer import ScalarModel
from llama_jax.runtime import TRAINING_RULES
from llama_jax.sharding import make_mesh
from llama_jax.train.losses import LossSums
from llama_jax.train.methods import Method, train_weights
from llama_jax.train.metrics import read_metrics
from llama_jax.train.reporter import Quiet
from llama_jax.train.run import BatchSource, RunResult
from llama_jax.train.stopping import Stop

# What a user writes to train a reward model (arXiv:2307.09288, equation 2).


class Pairs(NamedTuple):
    """Two answers to each prompt: tokens [B, T], index of the last one [B], margin."""

    chosen: Any
    rejected: Any
    chosen_last: Any
    rejected_last: Any
    margin: Any


def ranking_loss(model: Any, params: Any, pairs: Pairs) -> LossSums:
    def score(tokens: Any, last: Any) -> Any:
        scalars, _ = llama_jax.apply(model, params, tokens)
        return jnp.take_along_axis(scalars, last[:, None], axis=1)[:, 0]

    difference = score(pairs.chosen, pairs.chosen_last) - score(
        pairs.rejected, pairs.rejected_last
    )
    losses = -jax.nn.log_sigmoid(difference - pairs.margin)
    accuracy = jnp.sum(difference > 0).astype(jnp.float32)
    return LossSums(jnp.sum(losses), jnp.float32(len(losses)), {"accuracy": accuracy})


class PairSource:
    """Pairs in which the chosen answer ends with token 7, the other with 9."""

    def __init__(self, count: int | None = None) -> None:
        self.number, self.count = 0, count

    def __iter__(self) -> Iterator[Pairs]:
        while self.count is None or self.number < self.count:
            self.number += 1
            draw = np.random.default_rng(self.number)
            tokens = draw.integers(10, 50, (4, 6), np.int32)
            last = draw.integers(3, 6, (2, 4), np.int32)
            chosen, rejected = tokens.copy(), tokens.copy()
            chosen[np.arange(4), last[0]], rejected[np.arange(4), last[1]] = 7, 9
            yield Pairs(chosen, rejected, *last, np.full(4, 0.1, np.float32))

    def state(self) -> Mapping[str, Any]:
        return {"number": self.number}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.number = state["number"]


CONFIG = llama_jax.RunConfig(
    steps=12, batch_size=4, learning_rate=1e-2, warmup=0, save_every=5, eval_every=6
)
SCALAR = TALKING.replace(head="scalar")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A language model, from which a reward model starts."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save_params(folder, random_params(TALKING), TALKING, tokenizer=tiny_tokenizer())
    return folder


def reward_method(base: pathlib.Path, **options: Any) -> Method:
    opened = llama_jax.open_model(base)
    runtime = llama_jax.Runtime(rules=TRAINING_RULES)
    return train_weights(SCALAR, runtime, opened=opened, loss=ranking_loss, **options)


@pytest.fixture(scope="module")
def whole(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder and the result of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = llama_jax.run(
        CONFIG,
        reward_method(base),
        PairSource(),
        folder,
        eval_batches=PairSource(2),
        tokenizer=tiny_tokenizer(),
    )
    return folder, result


def losses(folder: pathlib.Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_a_reward_model_learns_and_scores_after_load(whole: Any) -> None:
    folder, result = whole
    assert result == RunResult(
        "finished", 12, folder / "model", [folder / n for n in names(result)]
    )
    assert isinstance(PairSource(), BatchSource)
    assert losses(folder)[-1] < 0.3 * losses(folder)[0]
    loaded = llama_jax.load(folder / "model")
    assert isinstance(loaded.model, ScalarModel)
    pairs = next(iter(PairSource()))
    sums = ranking_loss(loaded.model, loaded.params, jax.tree.map(jnp.asarray, pairs))
    assert float(sums.metrics["accuracy"]) == 4


def names(result: RunResult) -> list[str]:
    return [file.name for file in result.report]


def test_evaluations_have_all_metrics_of_the_loss(whole: Any) -> None:
    records = read_metrics(whole[0] / "metrics.jsonl")
    evaluated = {r["step"]: r for r in records if "eval_loss" in r}
    assert sorted(evaluated) == [6, 12]
    assert evaluated[12]["eval_accuracy"] == 1.0
    assert evaluated[12]["eval_targets"] == 8
    assert all(0 <= record["accuracy"] <= 1 for record in records)
    assert records[0]["eval_loss_before"] > evaluated[12]["eval_loss"]


class StopAfter(Quiet):
    """Requests a stop when it hears of a step."""

    def __init__(self, stop: Stop, step: int) -> None:
        self.stop, self.at = stop, step

    def step(self, record: Any) -> None:
        if record["step"] == self.at:
            self.stop.request()


def test_a_stopped_run_is_resumed_bit_for_bit(
    base: pathlib.Path, whole: Any, tmp_path: pathlib.Path
) -> None:
    stop = Stop()
    method = reward_method(base)
    result = llama_jax.run(
        CONFIG,
        method,
        PairSource(),
        tmp_path / "run",
        stop=stop,
        reporter=StopAfter(stop, 6),
        eval_batches=PairSource(2),
    )
    assert result.status == "stopped"
    assert not result.path.exists()
    more = dataclasses.replace(CONFIG, save_every=3)  # which a resumed run may change
    result = llama_jax.run(
        more,
        method,
        PairSource(),
        tmp_path / "run",
        resume=True,
        eval_batches=PairSource(2),
    )
    assert (result.status, result.step) == ("finished", 12)
    assert losses(tmp_path / "run") == losses(whole[0])
    again = llama_jax.run(more, method, PairSource(), tmp_path / "run", resume=True)
    assert again.status == "complete"


def test_a_run_is_not_resumed_as_another_one(base: pathlib.Path, whole: Any) -> None:
    folder, method = whole[0], reward_method(base)
    with pytest.raises(TrainError, match="is not empty"):
        llama_jax.run(CONFIG, method, PairSource(), folder)
    other = dataclasses.replace(CONFIG, learning_rate=1e-3)
    with pytest.raises(TrainError, match=r"learning_rate: is 0.001, but the run was"):
        llama_jax.run(other, method, PairSource(), folder, resume=True)
    method = dataclasses.replace(method, fingerprint=None)
    with pytest.raises(TrainError, match="was started from another model"):
        llama_jax.run(CONFIG, method, PairSource(), folder, resume=True)
    endless = dataclasses.replace(CONFIG, steps=None)
    with pytest.raises(ConfigError, match="steps: is None"):
        llama_jax.run(endless, method, PairSource(), folder.with_name("new"))


def test_a_run_on_a_mesh_has_the_losses_of_one_device(
    base: pathlib.Path, whole: Any, tmp_path: pathlib.Path
) -> None:
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    config = dataclasses.replace(CONFIG, accumulate=2)
    method = reward_method(base, mesh=mesh)
    llama_jax.run(config, method, PairSource(), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run")[0], losses(whole[0])[0], 1e-5)
    assert losses(tmp_path / "run")[-1] < 0.3 * losses(whole[0])[0]


def test_settings_survive_json() -> None:
    config = dataclasses.replace(CONFIG, wandb="llamas", clip=0.0)
    settings = json.loads(json.dumps(config.to_dict()))
    assert llama_jax.RunConfig.from_dict(settings) == config
    # Of an older or a newer version, or of another stage.
    assert llama_jax.RunConfig.from_dict({**settings, "format": "text"}) == config
    assert llama_jax.RunConfig.from_dict({"tensorboard": None}).batch_size == 64


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size: must be a positive integer, got 0"),
        ({"steps": 1.5}, "steps must be an integer or None, got 1.5"),
        ({"epochs": 2}, "give one"),
        ({"accumulate": 3}, "cannot be cut into 3 equal parts"),
        ({"optimizer": "sgd"}, "optimizer is .sgd.; choose from adamw"),
        ({"final": 2.0}, "final: must be between 0 and 1, got 2.0"),
        ({"learning_rate": 0.0}, "learning_rate: must be positive"),
        ({"clip": -1.0}, "clip: must be 0 or more"),
        ({"warmup": -1}, "warmup: must be 0 or more"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        dataclasses.replace(CONFIG, **changes)
    assert len(str(error.value).splitlines()) == 1
