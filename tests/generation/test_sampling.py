"""Sampling: filters and penalties against plain versions, frequencies of draws."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import oracle
from support.models import padded
from support.tolerances import LOGPROBS_FLOAT32, SAMPLING_MASS

from llama_jax.errors import PromptError
from llama_jax.generation.sampling import (
    Sampling,
    SamplingRows,
    TokenCounts,
    apply_penalties,
    count_prompt,
    count_token,
    filter_logits,
    sample_token,
    sampling_rows,
    token_logprobs,
)

V = 12
likely = jax.jit(filter_logits)
draw = jax.jit(sample_token)
penalties = jax.jit(apply_penalties)


def rows(*settings: Sampling, **options: Any) -> SamplingRows:
    return sampling_rows(settings, V, **options)


def no_counts(batch: int, vocab: int = V) -> TokenCounts:
    return TokenCounts(
        jnp.zeros((batch, vocab), bool), jnp.zeros((batch, vocab), jnp.int32)
    )


def distinct_logits() -> st.SearchStrategy[np.ndarray]:
    """V logits, no two equal, from a flat to a very peaked distribution."""
    ranks = st.permutations(range(V))
    spread = st.floats(0.05, 1.5)
    return st.builds(
        lambda r, s: np.asarray(r, np.float32) * np.float32(s), ranks, spread
    )


# Filters


def filter_by_sorting(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float
) -> tuple[set[int], float]:
    """Tokens that the filters keep, and the distance of the closest decision."""
    order = np.argsort(-logits)
    probs = np.exp(oracle.log_softmax(logits))[order]
    if top_k:
        order, probs = order[:top_k], probs[:top_k]
    probs = probs / probs.sum()
    before = np.cumsum(probs) - probs
    keep = before <= top_p
    nearest = np.abs(before - top_p)[1:].min(initial=1.0)
    floor = min_p * probs[0]
    keep &= probs >= floor
    nearest = min(nearest, np.abs(probs - floor)[1:].min(initial=1.0))
    return set(order[keep].tolist()), nearest


@given(distinct_logits(), st.floats(0.01, 1.0))
def test_top_p_keeps_tokens_with_at_most_p_before_them(
    logits: np.ndarray, top_p: float
) -> None:
    expected, nearest = filter_by_sorting(logits, 0, top_p, 0.0)
    assume(nearest > SAMPLING_MASS or top_p == 1.0)
    result = likely(logits[None], rows(Sampling(temperature=1, top_p=top_p)))[0]
    assert set(np.flatnonzero(np.isfinite(result)).tolist()) == expected


@given(
    distinct_logits(), st.integers(0, V + 2), st.floats(0.01, 1.0), st.floats(0.0, 1.0)
)
def test_filters_apply_in_order_each_to_what_the_last_one_kept(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float
) -> None:
    expected, nearest = filter_by_sorting(logits, top_k, top_p, min_p)
    assume(nearest > SAMPLING_MASS or (top_p == 1.0 and min_p == 0.0))
    setting = Sampling(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p)
    result = np.asarray(likely(logits[None], rows(setting))[0])
    kept = np.isfinite(result)
    assert set(np.flatnonzero(kept).tolist()) == expected
    np.testing.assert_array_equal(result[kept], logits[kept])  # not changed otherwise


def test_top_k_comes_before_top_p() -> None:
    # 0.4, 0.3, 0.2, 0.1: of the two likeliest the first holds 4/7, so that a p of 0.5
    # stops after it; in the other order it would keep both.
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1] + [1e-9] * 8]))
    both = likely(logits, rows(Sampling(temperature=1, top_k=2, top_p=0.5)))
    alone = likely(logits, rows(Sampling(temperature=1, top_p=0.5)))
    assert np.isfinite(both[0]).sum() == 1
    assert np.isfinite(alone[0]).sum() == 2


def test_equally_likely_tokens_are_kept_or_dropped_together() -> None:
    logits = jnp.asarray([[2.0, 1.0, 1.0, 1.0] + [-9.0] * 8])
    for setting in (Sampling(temperature=1, top_k=2), Sampling(top_p=0.5)):
        kept = np.isfinite(likely(logits, rows(setting))[0])
        assert kept.tolist() == [True] * 4 + [False] * 8


def test_filters_of_zero_and_one_keep_everything() -> None:
    # A token of e^-60 is lost in a float32 sum, and must still be possible.
    logits = jnp.asarray([[0.0, -60.0, *range(10)]])
    off = Sampling(temperature=1, top_p=1.0, top_k=0, min_p=0.0)
    assert np.isfinite(likely(logits, rows(off))[0]).all()


def test_a_min_p_of_one_keeps_the_likeliest() -> None:
    logits = jnp.asarray([[float(token) for token in range(V)]])
    kept = likely(logits, rows(Sampling(top_p=1.0, min_p=1.0)))
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [V - 1]


# Penalties

histories = st.lists(st.integers(0, V - 1), max_size=8)


@given(
    distinct_logits(),
    histories.filter(len),
    histories,
    st.floats(0.5, 2.0),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=3),
)
def test_penalties_equal_plain_python(
    logits: np.ndarray,
    prompt: list[int],
    completion: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    logits = logits - 2  # some below zero
    setting = Sampling(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    counts = count_prompt(padded([prompt], 8), jnp.asarray([len(prompt)]), V)
    for token in completion:
        counts = count_token(counts, jnp.asarray([token]))
    result = penalties(jnp.asarray(logits)[None], counts, rows(setting))[0]
    for token in range(V):
        expected = float(logits[token])
        if token in prompt or token in completion:
            expected = expected / repetition if expected > 0 else expected * repetition
        if token in completion:
            expected -= presence + frequency * completion.count(token)
        expected += bias.get(token, 0.0)
        assert float(result[token]) == pytest.approx(
            expected, rel=LOGPROBS_FLOAT32, abs=LOGPROBS_FLOAT32
        )


def test_padding_is_no_part_of_the_prompt() -> None:
    counts = count_prompt(padded([[3, 4], [5]], 6), jnp.asarray([2, 1]), V)
    assert np.flatnonzero(counts.in_prompt[0]).tolist() == [3, 4]
    assert np.flatnonzero(counts.in_prompt[1]).tolist() == [5]
    assert not counts.in_completion.any()


def test_neutral_penalties_change_no_bit() -> None:
    logits = jax.random.normal(jax.random.key(0), (1, V))
    counts = count_token(no_counts(1), jnp.asarray([3]))
    np.testing.assert_array_equal(penalties(logits, counts, rows(Sampling())), logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_banned_token_is_never_drawn(temperature: float) -> None:
    logits = jnp.zeros((1, V)).at[0, 3].set(50.0).at[0, 4].set(40.0)
    for setting, banned in (
        (Sampling(temperature=temperature, logit_bias={3: -np.inf}), ()),
        (Sampling(temperature=temperature), (3,)),
    ):
        arrays = rows(setting, banned=banned)
        tokens = [
            draw(logits, no_counts(1), arrays, jnp.asarray([s])) for s in range(9)
        ]
        assert {int(token[0]) for token in tokens} == {4}


def test_a_bias_can_make_any_token_the_likeliest() -> None:
    logits = jnp.arange(V, dtype=jnp.float32)[None]
    setting = Sampling(temperature=0, logit_bias={2: 100.0})
    assert int(draw(logits, no_counts(1), rows(setting), jnp.asarray([0]))[0]) == 2


# Drawing


@given(distinct_logits())
def test_temperature_zero_takes_the_likeliest(logits: np.ndarray) -> None:
    setting = Sampling(temperature=0, top_p=0.1, top_k=3, seed=5)
    result = draw(logits[None], no_counts(1), rows(setting), jnp.asarray([3]))
    assert int(result[0]) == int(np.argmax(logits))


@pytest.mark.parametrize("temperature", [1e-3, 1e-7, 1e-20, 1e-37, 1e-44])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = jnp.asarray([[5.0, 30.0, 29.0, *[-40.0] * (V - 3)]])
    setting = Sampling(temperature=temperature)
    result = draw(logits, no_counts(1), rows(setting), jnp.asarray([3]))
    assert int(result[0]) == 1


def test_greedy_and_random_rows_share_a_batch() -> None:
    logits = jnp.tile(jnp.arange(V, dtype=jnp.float32) / 10, (2, 1))
    both = rows(Sampling(temperature=0), Sampling(temperature=1, top_p=1, seed=3))
    alone = rows(Sampling(temperature=1, top_p=1, seed=3))
    drawn = []
    for slot in range(20):
        slots = jnp.asarray([slot, slot])
        greedy, random = draw(logits, no_counts(2), both, slots)
        assert int(greedy) == V - 1
        single = draw(logits[:1], no_counts(1), alone, slots[:1])
        assert int(random) == int(single[0])
        drawn.append(int(random))
    assert len(set(drawn)) > 4


N = 20_000


@pytest.mark.parametrize("varied", ["seed", "sample", "slot"])
def test_draws_follow_the_filtered_softmax(varied: str) -> None:
    logits = np.linspace(0, 3, V, dtype=np.float32)
    setting = Sampling(temperature=0.7, top_k=9, top_p=0.9, min_p=0.05)
    kept, _ = filter_by_sorting(logits / 0.7, 9, 0.9, 0.05)
    scaled = np.where([t in kept for t in range(V)], logits / 0.7, -np.inf)
    expected = np.exp(oracle.log_softmax(scaled))
    assert 4 < len(kept) < V
    number = np.arange(N)
    arrays = jax.tree.map(lambda x: jnp.repeat(x, N, axis=0), rows(setting))
    if varied == "seed":
        arrays = arrays._replace(seed=jnp.asarray(number, jnp.uint32))
    elif varied == "sample":
        arrays = arrays._replace(sample=jnp.asarray(number, jnp.int32))
    slots = jnp.asarray(number if varied == "slot" else np.full(N, 17), jnp.int32)
    tiled = jnp.tile(jnp.asarray(logits), (N, 1))
    tokens = np.asarray(draw(tiled, no_counts(N), arrays, slots))
    result = np.bincount(tokens, minlength=V) / N
    # Five standard errors: one run in a million would fail, and the seeds are fixed.
    assert np.all(
        np.abs(result - expected) <= 5 * np.sqrt(expected * (1 - expected) / N)
    )


def test_draws_depend_on_seed_and_slot_alone() -> None:
    logits = jax.random.normal(jax.random.key(1), (4, V))
    settings = [Sampling(temperature=1, seed=seed) for seed in (7, 8, 7, 9)]
    same = logits.at[2].set(logits[0])
    slots = jnp.asarray([3, 4, 3, 5])
    tokens = draw(same, no_counts(4), rows(*settings), slots)
    assert int(tokens[0]) == int(tokens[2])
    moved = draw(same[::-1], no_counts(4), rows(*settings[::-1]), slots[::-1])
    assert moved.tolist() == tokens.tolist()[::-1]


# Log-probabilities


def test_logprobs_are_of_the_plain_softmax() -> None:
    logits = 5 * jax.random.normal(jax.random.key(2), (2, 3, V))
    tokens = jnp.asarray([[0, 5, 11], [3, 3, 1]])
    result = token_logprobs(logits, tokens, 4)
    expected = oracle.log_softmax(logits)
    chosen = np.take_along_axis(expected, np.asarray(tokens)[..., None], axis=-1)
    exact = {"rtol": LOGPROBS_FLOAT32, "atol": LOGPROBS_FLOAT32}
    np.testing.assert_allclose(result.chosen, chosen[..., 0], **exact)
    order = np.argsort(-expected, axis=-1)[..., :4]
    np.testing.assert_array_equal(result.top_ids, order)
    best = np.take_along_axis(expected, order, axis=-1)
    np.testing.assert_allclose(result.top, best, **exact)


def test_top_logprobs_are_empty_by_default() -> None:
    result = token_logprobs(jnp.zeros((2, V)), jnp.asarray([1, 2]))
    assert result.top.shape == result.top_ids.shape == (2, 0)


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("-inf")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=f"sampling: {name} is .*; it must be "):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    "bias", [{V: 1.0}, {-1: 1.0}, {0: float("nan")}, {0: float("inf")}]
)
def test_a_bias_without_a_meaning_is_refused(bias: dict[int, float]) -> None:
    with pytest.raises(PromptError, match="needs a token id below 12"):
        rows(Sampling(logit_bias=bias))


def test_defaults_are_metas() -> None:
    default = Sampling()
    assert (default.temperature, default.top_p) == (0.6, 0.9)
    neutral = Sampling(
        top_k=0, min_p=0, repetition_penalty=1, presence_penalty=0, frequency_penalty=0
    )
    assert default == neutral
