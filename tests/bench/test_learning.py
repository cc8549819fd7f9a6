"""The measurements of learning: folds, baselines, equal samples, points on disk."""

import csv
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
from support.commands import run_command
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.bench import policy_learning, preference_learning
from llama_jax.bench.__main__ import main
from llama_jax.bench.bag_of_words import fit_and_score
from llama_jax.bench.preference_learning import Pair
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.loading import Opened
from llama_jax.rlhf.preferences import Margins
from llama_jax.types import Params

LENGTH = 48  # the tiny tokenizer spells most words


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("base") / "model"
    config = TALKING.replace(max_seq_len=64)
    save_params(folder, random_params(config), config, tokenizer=tiny_tokenizer())
    return llama_jax.open_model(folder)


def test_a_bag_of_words_learns_the_words_that_are_preferred() -> None:
    draw = np.random.default_rng(0)
    words = draw.choice(list("abcdef"), (60, 4))
    pairs = [(" ".join([*row, "good"]), " ".join([*row, "bad"])) for row in words]
    held_out = [("good", "bad"), ("Bad", "Good"), ("good", "good"), ("never", "seen")]
    margins = fit_and_score(pairs, held_out)
    assert margins[0] == -margins[1] > 0.5
    assert margins[2] == margins[3] == 0


def test_planted_pairs_have_their_ratings_and_may_be_swapped(opened: Opened) -> None:
    def gaps(swapped: float) -> np.ndarray:
        pairs = preference_learning.planted_pairs(
            opened, count=40, length=LENGTH, seed=0, swapped=swapped
        )
        cheerful = set(preference_learning._WORDS[0])
        counts = [
            [sum(w in cheerful for w in text.split()) for text in pair.answers]
            for pair in pairs
        ]
        ratings = np.array([pair.preference.rating for pair in pairs])
        return np.subtract(*np.array(counts).T) / (ratings + 1)

    np.testing.assert_array_equal(gaps(0.0), 1)
    assert set(gaps(0.5)) == {-1, 1}


def test_each_fold_is_scored_by_a_model_that_has_not_seen_it(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = preference_learning.planted_pairs(opened, count=96, length=LENGTH, seed=0)
    trained: list[set[int]] = []
    scored: list[set[int]] = []

    class Trainer(preference_learning._Trainer):
        def __call__(
            self, pairs: Sequence[Pair], length: int, epochs: int, margins: Margins
        ) -> tuple[Params, float]:
            trained.append({id(pair) for pair in pairs})
            return super().__call__(pairs, length, epochs, margins)

    def scores(opened: Opened, params: Params, pairs: Sequence[Pair]) -> np.ndarray:
        scored.append({id(pair) for pair in pairs})
        return original(opened, params, pairs)

    original = preference_learning._scores
    monkeypatch.setattr(preference_learning, "_Trainer", Trainer)
    monkeypatch.setattr(preference_learning, "_scores", scores)
    result = preference_learning.measure_reward_model(
        opened, pairs, length=LENGTH, folds=2, epochs=3, learning_rate=1e-2
    )
    everything = {id(pair) for pair in pairs}
    first, second = scored
    assert trained == [second, first]
    assert first | second == everything
    assert not first & second
    assert (result.pairs, len(result.by_quartile)) == (96, 4)
    assert result.bag_of_words == pytest.approx(np.mean(result.bag_by_quartile))
    assert result.accuracy == pytest.approx(np.mean(result.by_quartile))
    assert result.accuracy > 0.7


def test_dpo_raises_the_margin_of_held_out_pairs(opened: Opened) -> None:
    pairs = preference_learning.planted_pairs(opened, count=96, length=LENGTH, seed=0)
    result = preference_learning.measure_dpo(
        opened, pairs, length=LENGTH, learning_rate=1e-2
    )
    assert result.pairs == 24
    assert result.margin > 3 * result.error > 0
    assert result.accuracy > 0.7


def test_the_end_of_a_long_dialog_remains(
    opened: Opened, tmp_path: pathlib.Path
) -> None:
    record = {"prompt": "the tea " * 20, "chosen": "he he he", "rejected": "she"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
    (pair,) = preference_learning.read_pairs(
        tmp_path / "pairs.jsonl", opened, length=24
    )
    assert min(pair.lengths) > 24
    for side, dialog in enumerate(pair.dialogs):
        assert len(dialog.ids) == 24
        text = opened.tokenizer.decode(dialog.ids[dialog.prompt_length :])
        assert text.strip() == pair.answers[side]


def test_methods_start_from_the_same_answers_and_have_equal_samples(
    opened: Opened, tmp_path: pathlib.Path
) -> None:
    curves = policy_learning.measure_curves(opened, seeds=1, iterations=2)
    assert [curve.method for curve in curves] == ["rejection", "gae", "rloo", "grpo"]
    for curve in curves:
        assert [point.samples for point in curve.points] == [0, 32]
        first, second = curve.points
        assert first == curves[0].points[0]
        assert abs(first.kl) < 1e-6 < second.kl
    policy_learning.write_points(tmp_path / "points.csv", curves)
    with (tmp_path / "points.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert float(rows[0]["reward"]) == pytest.approx(curves[0].points[0].reward, 1e-3)
    pytest.importorskip("matplotlib")
    assert policy_learning.draw_points(tmp_path / "points.png", curves)
    assert (tmp_path / "points.png").stat().st_size > 1000


def test_reward_models_need_data(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_command(main, capsys, "rlhf")
    assert status == 2
    assert "--data: the part reward needs a file of preferences" in err
