"""Rejection sampling: the best of K answers, across temperatures and rounds."""

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
from support.models import talking_model

from llama_jax.data.files import Location
from llama_jax.data.line_file import read_lines
from llama_jax.data.prompts import Prompt
from llama_jax.data.records import read_records
from llama_jax.errors import DataError
from llama_jax.generation.batching import batch_bytes
from llama_jax.generation.generate import generate
from llama_jax.generation.request import text_request
from llama_jax.generation.sampling import Sampling
from llama_jax.rlhf.rejection import (
    Work,
    prompt_key,
    read_earlier,
    sample_and_score,
    select,
    write_records,
)
from llama_jax.rlhf.rejection_report import (
    curve_table,
    draw_curves,
    expected_order_statistic,
    reward_curves,
)
from llama_jax.rlhf.rewards import Answer, FunctionReward

LOADED = talking_model()
ONE_PROMPT = batch_bytes(LOADED.language_model, 8, 16)
SETTINGS = {"seed": 0}
TEXTS = ["the sun", "lily"]


def work(number: int, *, hidden: str = "", earlier: Any = ()) -> Work:
    """Three samples of a text at each of two temperatures, after a hidden text."""
    plain = text_request(
        LOADED.tokenizer, TEXTS[number], max_new_tokens=6, num_samples=3
    )
    seen = text_request(LOADED.tokenizer, hidden + TEXTS[number])
    requests = [
        dataclasses.replace(
            plain,
            prompt_ids=seen.prompt_ids,
            sampling=Sampling(temperature=t, top_p=1.0, seed=number),
        )
        for t in (0.5, 2.0)
    ]
    prompt = Prompt(Location("in.jsonl", "line", number + 1), number, TEXTS[number])
    return Work(prompt, [int(id) for id in plain.prompt_ids], requests, earlier)


def length(prompts: list[Any], answers: list[str]) -> list[int]:
    return [len(answer) for answer in answers]


def run(path: pathlib.Path, works: list[Work], reward: Any = length) -> list[Any]:
    sample_and_score(
        LOADED, works, FunctionReward(reward), path, settings=SETTINGS,
        max_batch_bytes=ONE_PROMPT,
    )  # fmt: skip
    return list(read_lines(path))


def test_all_answers_are_scored_and_the_best_is_the_record(
    tmp_path: pathlib.Path,
) -> None:
    works = [work(0), work(1)]
    lines = run(tmp_path / "samples.jsonl", works)
    expected = generate(LOADED, [request for w in works for request in w.requests])
    answers = [answer for line in lines for answer in line["answers"]]
    assert [answer["text"] for answer in answers] == [c.text for c in expected]
    assert [answer["reward"] for answer in answers] == [len(c.text) for c in expected]
    assert [answer["temperature"] for answer in answers] == ([0.5] * 3 + [2.0] * 3) * 2
    selection = select(lines, allow_cut=True)
    write_records(tmp_path / "records.jsonl", selection.records)
    for number, record in enumerate(read_records([tmp_path / "records.jsonl"])):
        texts = [c.text for c in expected[6 * number : 6 * number + 6]]
        best = max(texts, key=len)
        assert record.content == (TEXTS[number], best)
        assert selection.records[number]["rewards"] == [len(text) for text in texts]
        assert selection.records[number]["reward"] == len(best)


def test_a_killed_run_continues_without_sampling_or_scoring_again(
    tmp_path: pathlib.Path,
) -> None:
    works = [work(0), work(1)]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    run(whole, works)
    data = whole.read_bytes()
    part.write_bytes(data[: data.index(b"\n") + 50])
    prompts: list[Any] = []

    def reward(asked: list[Any], answers: list[str]) -> list[int]:
        prompts.extend(asked)
        return length(asked, answers)

    run(part, works, reward)
    assert part.read_bytes() == data
    assert prompts == [TEXTS[1]] * 6


def test_a_hidden_prompt_is_read_while_sampling_and_not_by_the_reward(
    tmp_path: pathlib.Path,
) -> None:
    seen: list[Answer] = []

    class Spy:
        name = "spy"

        def __call__(self, answers: Any) -> np.ndarray:
            seen.extend(answers)
            return np.zeros(len(answers), np.float32)

    own = work(0, hidden="once upon a time ")
    path = tmp_path / "samples.jsonl"
    sample_and_score(LOADED, [own], Spy(), path, settings=SETTINGS)
    [line] = read_lines(path)
    expected = generate(LOADED, own.requests)
    assert [answer["text"] for answer in line["answers"]] == [c.text for c in expected]
    assert {(a.prompt, tuple(a.prompt_ids)) for a in seen} == {
        (TEXTS[0], tuple(own.prompt_ids))
    }
    assert line["prompt"] == TEXTS[0]


def test_the_best_answer_of_an_earlier_round_is_kept_and_scored_again(
    tmp_path: pathlib.Path,
) -> None:
    record = {
        "prompt": TEXTS[0], "completion": "best", "token_ids": [5, 2], "ended": True,
        "temperature": 1.0, "reward": 0.5,
    }  # fmt: skip
    write_records(tmp_path / "records.jsonl", [record])
    earlier = read_earlier(tmp_path)[prompt_key(TEXTS[0])]
    assert earlier.answer == Answer(TEXTS[0], "best", (), (5, 2), ended=True)

    def reward(prompts: list[Any], answers: list[str]) -> list[float]:
        return [9.0 if answer == "best" else 1.0 for answer in answers]

    works = [work(0, earlier=[earlier]), work(1)]
    lines = run(tmp_path / "samples.jsonl", works, reward)
    selection = select(lines, allow_cut=True)
    assert selection.earlier == 1
    assert selection.records[0]["completion"] == "best"
    assert selection.records[0]["reward"] == 9.0
    assert selection.records[0]["rewards"] == [1.0] * 6 + [9.0]
    assert selection.records[0]["source"] == str(tmp_path)
    curves = reward_curves(lines)
    assert curves[0.5].max == curves[2.0].median == (1.0, 1.0, 1.0)  # new answers alone
    with pytest.raises(DataError, match=r"samples\.jsonl, line 1: is not a record of"):
        read_earlier(tmp_path / "samples.jsonl")
    with pytest.raises(DataError, match="cannot be read; name the output of"):
        read_earlier(tmp_path / "nothing")


def line(*answers: tuple[str, float, bool]) -> Any:
    return {
        "prompt": "p",
        "answers": [
            {"text": text, "reward": reward, "ended": ended, "temperature": 1.0,
             "source": None, "token_ids": [1, 2]}
            for text, reward, ended in answers
        ],
    }  # fmt: skip


def test_empty_answers_are_not_selected_and_cut_ones_only_where_allowed() -> None:
    lines = [
        line(("cut", 5, False), ("a", 1, True), ("b", 1, True), (" ", 2, True)),
        line(("c", 1, False)),
    ]
    selection = select(lines)
    assert [record["completion"] for record in selection.records] == ["a"]
    assert (selection.earlier, selection.without_answer) == (0, 1)
    selection = select(lines, allow_cut=True)
    assert [record["completion"] for record in selection.records] == ["cut", "c"]
    assert reward_curves(lines[:1])[1.0].cut == pytest.approx(1 / 4)


@pytest.mark.parametrize("k", range(1, 6))
def test_expected_rewards_are_the_mean_over_all_choices_of_k(k: int) -> None:
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    subsets = [list(choice) for choice in itertools.combinations(range(5), k)]
    for rank in range(1, k + 1):
        expected = np.mean(
            [np.sort(rewards[:, subset], axis=1)[:, rank - 1] for subset in subsets]
        )
        result = expected_order_statistic(rewards, k, rank)
        assert result == pytest.approx(expected, abs=1e-12)
    lines = [line(*(("a", reward, True) for reward in row)) for row in rewards]
    curve = reward_curves(lines)[1.0]
    assert curve.k == (1, 2, 4, 5)
    if k in curve.k:
        medians = [np.median(rewards[:, subset], axis=1) for subset in subsets]
        assert curve.median[curve.k.index(k)] == pytest.approx(np.mean(medians))


def test_curves_are_a_table_and_a_picture(tmp_path: pathlib.Path) -> None:
    curves = reward_curves([line(("a", 1.0, True), ("b", 3.0, True))])
    assert curve_table(curves).splitlines()[2:] == [
        "| 1 | 1 | 2.0000 | 2.0000 |", "| 1 | 2 | 3.0000 | 2.0000 |",
    ]  # fmt: skip
    pytest.importorskip("matplotlib")
    assert draw_curves(tmp_path / "a.png", curves)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
