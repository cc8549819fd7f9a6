"""Generation: pieces equal the whole, rows ignore their neighbours, limits hold."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.models import forward, talking_model
from support.tolerances import LOGPROBS_FLOAT32

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import CheckpointError, ConfigError, PromptError
from llama_jax.generation.batching import bucket
from llama_jax.generation.completion import chat_completion, text_completion
from llama_jax.generation.generate import Completion, generate, stream
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.params import flatten, unflatten
from llama_jax.runtime import Runtime
from llama_jax.text.prompt_formats import UNSAFE_ANSWER
from llama_jax.text.tokenizer import StreamDecoder

GREEDY = Sampling(temperature=0)
RANDOM = Sampling(temperature=0.8, top_p=0.95, seed=3)
# All of one bucket of rows, prompt length and slots (the whole context of 32), so that
# little is compiled.
PROMPTS = [[1, 263, 270, 300], [1, 281], [1, 299, 310, 262, 265, 290], [1, 261, 304]]
NEW = 24


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return talking_model()


def requests(prompts: Any = PROMPTS, **settings: Any) -> list[Request]:
    """Requests that sample at random and report log-probabilities, by default."""
    defaults: Any = {"sampling": RANDOM, "max_new_tokens": NEW, "logprobs": 3}
    return [Request(ids, **(defaults | settings)) for ids in prompts]


def run(loaded: Loaded, **settings: Any) -> list[Completion]:
    return generate(loaded, requests(**settings))


def with_sampling(made: list[Request], samplings: list[Sampling]) -> list[Request]:
    return [
        dataclasses.replace(request, sampling=sampling)
        for request, sampling in zip(made, samplings, strict=True)
    ]


@pytest.fixture(scope="module")
def sampled(loaded: Loaded) -> list[Completion]:
    return run(loaded)


@pytest.fixture(scope="module")
def greedy(loaded: Loaded) -> list[Completion]:
    return run(loaded, sampling=GREEDY)


def test_completions_have_the_length_and_the_text_of_their_tokens(
    loaded: Loaded, sampled: list[Completion]
) -> None:
    assert [completion.prompt_ids for completion in sampled] == list(
        map(tuple, PROMPTS)
    )
    for completion in sampled:
        assert len(completion.token_ids) == NEW
        assert completion.finish_reason == "length"
        assert completion.text == loaded.tokenizer.decode(completion.token_ids)
    assert len({completion.token_ids for completion in sampled}) == len(PROMPTS)


@pytest.mark.parametrize("chunk", [1, 5, 8, 31])
def test_streamed_pieces_equal_the_whole(
    loaded: Loaded, sampled: list[Completion], chunk: int
) -> None:
    deltas: list[list[Any]] = [[] for _ in PROMPTS]
    for delta in stream(loaded, requests(), chunk=chunk):
        deltas[delta.completion].append(delta)
    for parts, whole in zip(deltas, sampled, strict=True):
        assert "".join(part.text for part in parts) == whole.text
        assert sum((part.token_ids for part in parts), ()) == whole.token_ids
        assert sum((part.logprobs for part in parts), ()) == whole.logprobs
        assert sum((part.top_logprobs for part in parts), ()) == whole.top_logprobs
        reasons = [part.finish_reason for part in parts]
        assert reasons == [None] * (len(parts) - 1) + ["length"]
        assert len(parts) > 1 + (NEW - 1) // (chunk + 1)


def test_logprobs_equal_those_of_one_forward(
    loaded: Loaded, sampled: list[Completion]
) -> None:
    model, params, _ = loaded
    for whole in sampled:
        assert whole.logprobs is not None
        assert whole.top_logprobs is not None
        row = jnp.asarray([[*whole.prompt_ids, *whole.token_ids, *[0] * 6]])[:, :32]
        logits, _ = forward(model, params, row)
        expected = oracle.log_softmax(logits[0])[len(whole.prompt_ids) - 1 :]
        for step, token in enumerate(whole.token_ids):
            near = {"abs": LOGPROBS_FLOAT32, "rel": LOGPROBS_FLOAT32}
            assert whole.logprobs[step] == pytest.approx(expected[step, token], **near)
            top = whole.top_logprobs[step]
            assert [logprob for _, logprob in top] == pytest.approx(
                sorted(expected[step], reverse=True)[:3], **near
            )
            for id, logprob in top:
                assert logprob == pytest.approx(expected[step, id], **near)


def test_the_greedy_token_is_the_first_of_the_likeliest(
    greedy: list[Completion],
) -> None:
    # The four ids without a text are banned from being drawn, not from being likely.
    unnamed = range(320, 324)
    for whole in greedy:
        assert whole.logprobs is not None
        assert whole.top_logprobs is not None
        for token, logprob, top in zip(
            whole.token_ids, whole.logprobs, whole.top_logprobs, strict=True
        ):
            assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
            named = [pair for pair in top if pair[0] not in unnamed]
            assert named[0] == (token, logprob)
    assert not any(token in unnamed for c in greedy for token in c.token_ids)


def test_logprobs_are_none_by_default(loaded: Loaded, greedy: list[Completion]) -> None:
    plain = run(loaded, sampling=GREEDY, logprobs=None)
    assert [c.token_ids for c in plain] == [c.token_ids for c in greedy]
    assert all(c.logprobs is None and c.top_logprobs is None for c in plain)


# Neighbours and seeds


def test_neighbours_change_no_bit_of_a_completion(
    loaded: Loaded, sampled: list[Completion]
) -> None:
    others = [[1, 305], PROMPTS[2], [1, 290, 280, 270, 264, 266, 269], [1, 300, 300]]
    samplings = [
        GREEDY,
        RANDOM,
        Sampling(temperature=2.0, top_p=1.0, seed=99, frequency_penalty=1.0),
        Sampling(top_k=2, repetition_penalty=1.5),
    ]
    mixed = generate(loaded, with_sampling(requests(others), samplings))
    assert mixed[1] == sampled[2]
    assert mixed[0] != sampled[0]


def test_each_request_has_its_own_sampling(
    loaded: Loaded, sampled: list[Completion], greedy: list[Completion]
) -> None:
    samplings = [GREEDY, RANDOM, GREEDY, RANDOM]
    mixed = generate(loaded, with_sampling(requests(), samplings))
    assert mixed == [greedy[0], sampled[1], greedy[2], sampled[3]]


def test_samples_of_a_prompt_differ_and_the_first_equals_a_single_one(
    loaded: Loaded, sampled: list[Completion]
) -> None:
    several = run(loaded, prompts=PROMPTS[:2], num_samples=2)
    assert [c.prompt_ids for c in several] == [
        tuple(PROMPTS[row]) for row in (0, 0, 1, 1)
    ]
    assert [several[0], several[2]] == sampled[:2]
    assert several[0].token_ids != several[1].token_ids
    assert several[2].token_ids != several[3].token_ids


def test_another_seed_draws_other_tokens(
    loaded: Loaded, sampled: list[Completion]
) -> None:
    other = run(loaded, sampling=Sampling(temperature=0.8, top_p=0.95, seed=4))
    pairs = zip(other, sampled, strict=True)
    assert all(one.token_ids != two.token_ids for one, two in pairs)


# Ends


def test_a_stop_id_ends_a_row_and_is_not_part_of_it(
    loaded: Loaded, sampled: list[Completion]
) -> None:
    ends = {sampled[0].token_ids[0], sampled[1].token_ids[9]}
    for result, whole in zip(run(loaded, stop_ids=[*ends]), sampled, strict=True):
        at = [i for i, token in enumerate(whole.token_ids) if token in ends]
        end = at[0] if at else NEW
        assert result.token_ids == whole.token_ids[:end]
        assert result.text == loaded.tokenizer.decode(whole.token_ids[:end])
        assert result.finish_reason == ("stop" if at else "length")
        assert whole.logprobs is not None
        assert result.logprobs == whole.logprobs[:end]


def test_text_requests_stop_at_the_end_of_sequence_and_plain_ones_do_not(
    loaded: Loaded,
) -> None:
    eos = loaded.tokenizer.eos_id
    always = Sampling(temperature=0, logit_bias={eos: 1e4})
    [ended] = text_completion(loaded, ["a day"], sampling=always)
    assert (ended.text, ended.token_ids, ended.finish_reason) == ("", (), "stop")
    for completion in run(loaded, sampling=always):
        assert completion.token_ids == (eos,) * NEW


def test_each_request_has_its_own_settings(
    loaded: Loaded, sampled: list[Completion]
) -> None:
    """Stop ids, stop strings, limit, samples, log-probabilities and echo."""
    mixed = [
        Request(PROMPTS[0], 5, RANDOM, logprobs=1, echo=True),
        Request(PROMPTS[1], NEW, RANDOM, stop_ids=[sampled[1].token_ids[3]]),
        Request(PROMPTS[2], NEW, RANDOM, stop=[sampled[2].text[4:6]], num_samples=2),
    ]
    echoed, by_id, by_text, second = generate(loaded, mixed)
    assert echoed.token_ids == (*PROMPTS[0], *sampled[0].token_ids[:5])
    assert [len(top) for top in echoed.top_logprobs or ()] == [0, *[1] * 8]
    end = sampled[1].token_ids.index(sampled[1].token_ids[3])
    assert by_id.token_ids == sampled[1].token_ids[:end]
    assert by_id.logprobs is None
    assert by_text.text == sampled[2].text.partition(sampled[2].text[4:6])[0]
    assert second.prompt_ids == tuple(PROMPTS[2])
    assert second.token_ids[:2] != by_text.token_ids[:2]


@settings(max_examples=25)
@given(st.data())
def test_a_stop_string_ends_the_text_wherever_it_falls(
    loaded: Loaded, sampled: list[Completion], data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(PROMPTS) - 1))
    text = sampled[number].text
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin + 1, min(len(text), begin + 6)))
    stop = text[begin:end]
    chunk = data.draw(st.integers(1, 8))
    stopped = generate(loaded, requests(stop=[stop]), chunk=chunk)
    for result, whole in zip(stopped, sampled, strict=True):
        assert result.text == whole.text.partition(stop)[0]
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        if result.finish_reason == "stop":
            # No token follows the one that completed the stop string. (One that ends
            # in an unfinished last character is only seen at the end.)
            decoder = StreamDecoder(loaded.tokenizer)
            assert stop not in decoder.push(result.token_ids[:-1])
            assert stop in whole.text
        else:
            assert len(result.token_ids) == NEW
    assert stop not in stopped[number].text


def test_a_completion_ends_with_the_context(loaded: Loaded) -> None:
    prompts = [list(range(100, 112)), list(range(100, 116)), [1, 270], [1]]
    results = run(loaded, prompts=prompts, max_new_tokens=None)
    assert [len(c.token_ids) for c in results] == [20, 16, 30, 31]
    assert {c.finish_reason for c in results} == {"length"}


# Echo


def test_echo_puts_the_prompt_before_the_completion(
    loaded: Loaded, greedy: list[Completion]
) -> None:
    model, params, tokenizer = loaded
    echoed = run(loaded, sampling=GREEDY, echo=True)
    for result, whole in zip(echoed, greedy, strict=True):
        assert result.prompt_ids == whole.prompt_ids
        assert result.token_ids == whole.prompt_ids + whole.token_ids
        assert result.text == tokenizer.decode(result.token_ids)
        assert result.logprobs is not None
        assert result.top_logprobs is not None
        assert whole.logprobs is not None
        length = len(whole.prompt_ids)
        assert result.logprobs[0] == 0
        assert result.top_logprobs[0] == ()
        near = {"abs": LOGPROBS_FLOAT32, "rel": LOGPROBS_FLOAT32}
        assert result.logprobs[length:] == pytest.approx(whole.logprobs, **near)
        row = jnp.asarray([[*result.token_ids, *[0] * 6]])[:, :32]
        expected = oracle.log_softmax(forward(model, params, row)[0][0])
        for at in range(1, length):
            token = result.token_ids[at]
            assert result.logprobs[at] == pytest.approx(expected[at - 1, token], **near)
            best = int(np.argmax(expected[at - 1]))
            assert result.top_logprobs[at][0][0] == best


def test_a_stop_string_in_the_prompt_stops_nothing(
    loaded: Loaded, sampled: list[Completion]
) -> None:
    prompt = loaded.tokenizer.decode(PROMPTS[0])
    stop = [prompt, loaded.tokenizer.decode(PROMPTS[3])]
    assert not any(text in whole.text for text in stop for whole in sampled)
    results = run(loaded, stop=stop, echo=True, logprobs=None)
    assert all(c.finish_reason == "length" for c in results)


# Texts and dialogs


def test_text_completion_completes_the_tokens_of_the_texts(loaded: Loaded) -> None:
    texts = ["she was", "the sun", "a day", "hello"]
    tokenizer = loaded.tokenizer
    settings: Any = {"sampling": GREEDY, "max_new_tokens": 20}
    ends = (tokenizer.eos_id, tokenizer.bos_id)
    expected = [
        Request(tokenizer.encode(text, bos=True, eos=False), stop_ids=ends, **settings)
        for text in texts
    ]
    completions = text_completion(loaded, texts, **settings)
    assert completions == generate(loaded, expected)


def test_an_unsafe_dialog_gets_a_fixed_answer(loaded: Loaded) -> None:
    safe = [{"role": "user", "content": "hi"}]
    unsafe = [{"role": "user", "content": "a [INST] b"}]
    answers = chat_completion(
        loaded,
        [unsafe, safe],  # type: ignore[list-item]
        num_samples=2,
        max_new_tokens=1,
        sampling=GREEDY,
    )
    assert [c.text for c in answers[:2]] == [UNSAFE_ANSWER] * 2
    assert [c.finish_reason for c in answers[:2]] == ["unsafe"] * 2
    assert [c.finish_reason for c in answers[2:]] == ["length"] * 2


# Errors


@pytest.mark.parametrize(
    ("ids", "settings", "reason"),
    [
        ([1] * 32, {}, "request 2: the prompt has 32 tokens, .* context holds 32"),
        ([1, 324], {}, "request 2: a token id is outside 0 … 323"),
        ([1, -1], {}, "request 2: a token id is outside 0 … 323"),
        ([1], {"logprobs": 325}, "request 2: logprobs must be at most 324, got 325"),
        ([1], {"sampling": Sampling(logit_bias={400: 1.0})}, "token id below 324"),
    ],
)
def test_a_request_that_the_model_cannot_run_is_refused(
    loaded: Loaded, ids: list[int], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        generate(loaded, [Request([1, 2]), Request(ids, **settings)])


def test_stacked_layers_are_refused() -> None:
    stacked = talking_model(runtime=Runtime(layer_layout="stacked"))
    with pytest.raises(ConfigError, match="layer_layout='unrolled'"):
        generate(stacked, [Request([1, 2])])


def test_no_requests_have_no_completions(loaded: Loaded) -> None:
    assert generate(loaded, []) == []


# Buckets


@pytest.mark.parametrize(
    ("size", "limit", "smallest", "expected"),
    [
        (1, 64, 16, 16),
        (17, 64, 16, 32),
        (32, 64, 16, 32),
        (40, 50, 16, 50),
        (3, 9, 1, 4),
    ],
)
def test_buckets_are_powers_of_two_within_their_limits(
    size: int, limit: int, smallest: int, expected: int
) -> None:
    assert bucket(size, limit, smallest) == expected


def with_weight(loaded: Loaded, path: str, value: float) -> Loaded:
    """A model with another value of one number."""
    flat = flatten(loaded.params)
    flat[path] = flat[path].at[-1, -1].set(value)
    return loaded._replace(params=unflatten(flat))


def test_a_weight_that_is_not_a_number_is_named(loaded: Loaded) -> None:
    name = "transformer/layers/1/mlp/down_proj"
    for value in (np.nan, np.inf):
        with pytest.raises(CheckpointError, match=f"^{name}: has numbers that are NaN"):
            run(with_weight(loaded, name, value))
    broken = with_weight(loaded, name, np.nan)
    with pytest.raises(CheckpointError, match=f"^{name}: has numbers that are NaN"):
        list(stream(broken, requests(logprobs=None), chunk=2))
    # The embedding of an id that no prompt has is not a reason to stop.
    assert run(with_weight(loaded, "transformer/embedding", np.nan)) is not None


def test_logits_that_overflow_are_an_error_without_a_name(loaded: Loaded) -> None:
    flat = flatten(loaded.params)
    flat["lm_head"] = flat["lm_head"] * 1e38
    large = loaded._replace(params=unflatten(flat))
    with pytest.raises(CheckpointError, match="although all weights are finite; some"):
        run(large)
