"""Scores: those of one forward, the same in any company, and in little memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle
from support.models import TALKING, forward, talking_model
from support.programs import whole_results
from support.tolerances import LOGPROBS_FLOAT32

from llama_jax.errors import ConfigError, PromptError
from llama_jax.generation.generate import generate
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.generation.scoring import Score, _score_batch, score
from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.params import param_shapes
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, param_shardings

RNG = np.random.default_rng(0)
REQUESTS = [
    Request(RNG.integers(1, 324, size=length).tolist())
    for length in (5, 16, 3, 17, 32, 1, 9, 2, 30, 12, 16, 7)
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: Any) -> Any:
    return talking_model(runtime=Runtime(dtype=request.param))


def assert_same(scores: list[Score], expected: list[Score]) -> None:
    for one, other in zip(scores, expected, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs, strict=True)
        np.testing.assert_array_equal(one.greedy, other.greedy, strict=True)


def test_scores_are_those_of_one_forward() -> None:
    loaded = talking_model()
    for request, result in zip(REQUESTS, score(loaded, REQUESTS), strict=True):
        length = len(request.prompt_ids)
        ids = np.zeros((1, 32), np.int32)
        ids[0, :length] = request.prompt_ids
        logits, _ = forward(loaded.model, loaded.params, jnp.asarray(ids))
        expected = oracle.log_softmax(logits[0, : length - 1])
        assert result.logprobs.shape == result.greedy.shape == (length,)
        assert (result.logprobs[0], result.greedy[0]) == (0, False)
        np.testing.assert_allclose(
            result.logprobs[1:],
            expected[np.arange(length - 1), ids[0, 1:length]],
            rtol=LOGPROBS_FLOAT32,
            atol=LOGPROBS_FLOAT32,
        )
        np.testing.assert_array_equal(
            result.greedy[1:], expected.argmax(-1) == ids[0, 1:length]
        )


def test_a_request_has_the_same_score_alone_and_among_others(loaded: Any) -> None:
    together = score(loaded, REQUESTS)
    assert_same(together, [score(loaded, [request])[0] for request in REQUESTS])
    assert_same(together, score(loaded, REQUESTS[::-1])[::-1])


def test_what_greedy_decoding_writes_is_greedy() -> None:
    loaded = talking_model()
    unnamed = dict.fromkeys(range(320, 324), 0.0)  # never sampled, but likely
    sampling = Sampling(temperature=0, logit_bias=unnamed)
    requests = [Request([1, 263, 270], 12, sampling, logprobs=1)]
    [completion] = generate(loaded, requests)
    ids = (*completion.prompt_ids, *completion.token_ids)
    [result] = score(loaded, [Request(ids)])
    np.testing.assert_allclose(result.logprobs[3:], completion.logprobs, rtol=1e-4)
    top = [pairs[0][0] for pairs in completion.top_logprobs or ()]
    likeliest = [a == b for a, b in zip(completion.token_ids, top, strict=True)]
    assert result.greedy[3:].tolist() == likeliest
    assert any(likeliest)


def test_a_mesh_gives_the_same_scores() -> None:
    alone = talking_model()
    mesh = make_mesh({"data": 2, "tensor": 2, "sequence": 2}, jax.devices()[:8])
    model = Llama(TALKING, Runtime(), mesh)
    params = jax.device_put(alone.params, param_shardings(TALKING, Runtime(), mesh))
    scores = score(alone._replace(model=model, params=params), REQUESTS)
    for result, expected in zip(scores, score(alone, REQUESTS), strict=True):
        np.testing.assert_allclose(
            result.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_array_equal(result.greedy, expected.greedy)


def test_scoring_compiles_once_per_bucket_and_has_no_logits_of_a_batch() -> None:
    config = TALKING.replace(vocab_size=20_000, max_seq_len=1024)
    rows, width = 8, 1024
    tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    model, shapes = Llama(config, Runtime()), param_shapes(config)
    compiled = _score_batch.lower(model, shapes, tokens).compile()
    logits = rows * width * config.vocab_size
    assert not whole_results(compiled.as_text(), {logits})
    assert compiled.memory_analysis().temp_size_in_bytes < logits * 4 * 3 / 4
    small = talking_model()
    score(small, REQUESTS)
    programs = _score_batch._cache_size()
    score(small, REQUESTS[::-1] * 3)
    assert _score_batch._cache_size() == programs


def test_what_cannot_be_scored_is_refused() -> None:
    loaded = talking_model()
    assert score(loaded, []) == []
    with pytest.raises(PromptError, match="request 2: the prompt has 33 tokens"):
        score(loaded, [Request([1]), Request([1] * 33)])
    with pytest.raises(PromptError, match="request 1: a token id is outside 0 … 323"):
        score(loaded, [Request([324])])
    with pytest.raises(PromptError, match="batch_size: must be at least 1, got 0"):
        score(loaded, [Request([1])], batch_size=0)
    model = ScalarModel(TALKING.replace(head="scalar"), Runtime())
    with pytest.raises(ConfigError, match="scalar"):
        score(loaded._replace(model=model), [Request([1])])
