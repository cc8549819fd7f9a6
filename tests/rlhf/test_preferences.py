"""Preference data of every shape, batches of pairs, and agreement with scores."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from support.models import tiny_tokenizer

from llama_jax.data.files import Corpus, Location, Raw
from llama_jax.errors import DataError
from llama_jax.rlhf.pairs import PairSource
from llama_jax.rlhf.preferences import margin, parse_preference
from llama_jax.rlhf.reward_model import PairScores, agreement
from llama_jax.text.prompt_formats import get_format

HI = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello"}
BAD = {"role": "assistant", "content": "No"}
HH = "\n\nHuman: Hi\n\nAssistant: "

SHAPES: list[dict[str, Any]] = [
    {"chosen": f"{HH}Hello", "rejected": f"{HH}No"},
    {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    {"prompt": [HI], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "Hi", "chosen": [HI, GOOD], "rejected": [HI, BAD]},
    {"messages": [HI], "chosen": GOOD, "rejected": "No"},
    {"chosen": [HI, GOOD], "rejected": [HI, BAD], "rating": None},
    {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello"},
        "rejected": {"from": "gpt", "value": "No"},
    },
]


def parse(value: Any) -> Any:
    data = json.dumps(value).encode()
    return parse_preference(Raw(Location("a.jsonl", "line", 3), data, True, True))


@pytest.mark.parametrize("value", SHAPES)
def test_every_shape_is_a_pair_of_dialogs(value: dict[str, Any]) -> None:
    preference = parse(value)
    assert preference.chosen == [HI, GOOD]
    assert preference.rejected == [HI, BAD]
    assert (preference.rating, preference.safe) == (None, None)


def test_turns_of_hh_rlhf_are_split_where_they_begin() -> None:
    text = "\n\nHuman: a\n\nb\n\nAssistant: c: d\n\nHuman: e\n\nAssistant:"
    value = {"chosen": f"{text} Human: f", "rejected": f"{text}  g"}
    preference = parse(value)
    contents = [message["content"] for message in preference.chosen]
    assert contents == ["a\n\nb", "c: d", "e", "Human: f"]
    assert preference.rejected[-1]["content"] == " g"


def test_ratings_and_safety_labels_are_read() -> None:
    labels = {"rating": "better", "chosen_safe": True, "rejected_safe": False}
    preference = parse(SHAPES[0] | labels)
    assert (preference.rating, preference.safe) == (2, (True, False))
    small = [margin(rating, "small") for rating in range(4)]
    np.testing.assert_allclose(small, [0, 1 / 3, 2 / 3, 1])
    assert [margin(rating, "large") for rating in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([], "not an object"),
        ({"chosen": "a"}, "has no 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "does not begin with a Human's turn"),
        (SHAPES[1] | {"rejected": "Hello"}, "two equal answers"),
        (SHAPES[1] | {"rejected": " "}, "no answer at the end of 'rejected'"),
        (SHAPES[5] | {"chosen": [HI]}, "no answer at the end of 'chosen'"),
        (SHAPES[1] | {"rating": 4}, "has 4 as its 'rating'"),
        (SHAPES[1] | {"rating": True}, "has True as its 'rating'"),
        (SHAPES[1] | {"chosen_safe": True}, "both 'chosen_safe' and"),
        (SHAPES[1] | {"prompt": 3}, "has 3 as its 'prompt'"),
        (SHAPES[4] | {"chosen": {"role": "tool", "content": "x"}}, "'tool' as its"),
    ],
)
def test_other_shapes_are_refused_in_a_sentence(value: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl, line 3: .*{complaint}") as raised:
        parse(value)
    assert "\n" not in str(raised.value)


def source(folder: pathlib.Path, **options: Any) -> PairSource:
    path = folder / "pairs.jsonl"
    if not path.exists():
        answers = ("a", "the tea", "tea", "he", "she")
        records = [
            {"prompt": "the", "chosen": a, "rejected": "no", "rating": n % 4}
            for n, a in enumerate(answers)
        ]
        path.write_text("\n".join(map(json.dumps, records)))
    defaults: dict[str, Any] = {
        "format": get_format("alpaca"),
        "batch_size": 2,
        "length": 400,
        "epochs": 2,
    }
    return PairSource(
        corpus=Corpus([path]), tokenizer=tiny_tokenizer(), **(defaults | options)
    )


def test_batches_have_every_pair_once_an_epoch(tmp_path: pathlib.Path) -> None:
    pairs = source(tmp_path, margins="large")
    batches = list(pairs)
    ratings = [b.rating[b.weight > 0].tolist() for b in batches]
    assert [len(part) for part in ratings] == [2, 2, 2, 2, 2]
    whole = [rating for part in ratings for rating in part]
    assert sorted(whole[:5]) == sorted(whole[5:]) == [0, 0, 1, 2, 3]
    assert whole[:5] != whole[5:] or pairs.seed != 0
    tokenizer = tiny_tokenizer()
    for batch in batches:
        assert batch.margin.tolist() == batch.rating.tolist()
        last = np.take_along_axis(batch.tokens, batch.last[..., None], axis=2)
        assert (last == tokenizer.eos_id).all()
        after = np.arange(batch.tokens.shape[2]) > batch.last[..., None]
        assert not batch.answer[after].any()
        assert batch.answer.any(axis=2).all()
    chosen = batches[0].tokens[0, 0][batches[0].answer[0, 0]]
    assert tokenizer.decode(chosen.tolist()[:-1]).strip() in (
        "a", "the tea", "tea", "he", "she",
    )  # fmt: skip


def test_a_source_continues_from_a_state(tmp_path: pathlib.Path) -> None:
    whole, half = list(source(tmp_path)), source(tmp_path)
    batches = iter(half)
    for _ in range(2):
        next(batches)
    rest = source(tmp_path)
    rest.restore(json.loads(json.dumps(half.state())))
    remaining = list(rest)
    assert len(remaining) == len(whole) - 2
    for ours, theirs in zip(remaining, whole[2:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    other = source(tmp_path, seed=1)
    with pytest.raises(DataError, match="the seed was 0"):
        other.restore(half.state())


def test_each_process_has_its_rows_of_every_batch(tmp_path: pathlib.Path) -> None:
    whole = list(source(tmp_path, batch_size=4))
    parts = [
        list(source(tmp_path, batch_size=4, process_index=i, process_count=2))
        for i in range(2)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        for a, *b in zip(batch, *shares, strict=True):
            np.testing.assert_array_equal(a, np.concatenate(b))


@pytest.mark.wrong_types
def test_pairs_that_do_not_fit_are_counted_or_refused(tmp_path: pathlib.Path) -> None:
    refusing = source(tmp_path, length=8, on_long="refuse")
    with pytest.raises(
        DataError, match=r"pairs.jsonl, line \d: .* tokens, more than 8"
    ):
        list(refusing)
    with pytest.raises(DataError, match="no pair can be learnt from; the first"):
        list(source(tmp_path, length=8))
    path = tmp_path / "unrated.jsonl"
    path.write_text(json.dumps(SHAPES[1]))
    unrated = source(tmp_path, margins="small")
    unrated.corpus = Corpus([path])
    with pytest.raises(DataError, match="line 1: has no rating, which small margins"):
        list(unrated)
    for options in ({"on_long": "truncate"}, {"margins": "huge"}, {"batch_size": 0}):
        with pytest.raises(DataError, match=r"choose|positive"):
            source(tmp_path, **options)


def test_agreement_is_counted_by_rating_and_against_length() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]])
    lengths = np.array([[3, 5], [9, 2], [4, 4], [7, 8]])
    result = agreement(PairScores(scores, lengths, np.array([3, 3, 0, -1])))
    assert (result.pairs, result.accuracy) == (4, 0.625)
    assert result.by_rating == {
        "negligibly better": (1, 0.5),
        "significantly better": (2, 0.5),
    }
    assert result.shorter == 0.625
    expected = np.corrcoef(scores.ravel(), lengths.ravel())[0, 1]
    np.testing.assert_allclose(result.length_correlation, expected)
