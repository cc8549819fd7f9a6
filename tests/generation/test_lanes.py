"""Lanes as a server uses them: requests come and go, and do not see each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TALKING, talking_model

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import ConfigError
from llama_jax.generation.batching import start_inputs
from llama_jax.generation.decode import decode_step, extend, prefill
from llama_jax.generation.generate import generate
from llama_jax.generation.lanes import (
    Lanes,
    advance,
    begin,
    empty_lanes,
    insert,
    release,
    start,
)
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.model.cache import init_cache, init_paged_cache
from llama_jax.model.pages import NO_PAGE
from llama_jax.runtime import Runtime

LANES, SLOTS, STEPS = 4, 32, 3
REQUESTS = [
    Request([1, 263, 270, 300], 20, Sampling(temperature=0.8, seed=3), logprobs=2),
    Request([1, 281], 9, Sampling(temperature=0), stop_ids=range(300, 307)),
    Request(
        [1, *range(290, 308)],
        12,
        Sampling(temperature=1.5, seed=9, repetition_penalty=1.3),
    ),
]
ARRIVALS = {0: 0, 1: 1, 2: 3}
"""The round in which each request arrives."""


PAGE = 8


either_cache = pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])


@pytest.fixture(scope="module", params=[None, "int8"], ids=["dense", "int8"])
def loaded(request: Any) -> Loaded:
    return talking_model(
        TALKING.replace(num_layers=1), Runtime(cache_dtype=request.param)
    )


def new_lanes(loaded: Loaded, *, paged: bool = False) -> Lanes:
    config, dtype = loaded.model.config, loaded.model.runtime.slot_dtype
    cache = init_cache(config, LANES, SLOTS, dtype)
    if paged:
        rows, pages = SLOTS // PAGE, LANES * SLOTS // PAGE
        cache = init_paged_cache(
            config,
            LANES,
            num_pages=pages,
            page_size=PAGE,
            pages_per_row=rows,
            dtype=dtype,
        )
    return empty_lanes(cache, config.vocab_size)


def serve(
    loaded: Loaded, arrivals: dict[int, int], *, paged: bool = False
) -> dict[int, list[Any]]:
    """Tokens and log-probabilities of requests that arrive at different times."""
    model, params, tokenizer = loaded.language_model, loaded.params, loaded.tokenizer
    lanes = new_lanes(loaded, paged=paged)
    free = list(range(LANES * SLOTS // PAGE))
    waiting, running, results = dict(arrivals), dict[int, int](), dict[int, list[Any]]()

    def collect(row: int, number: int, emitted: Any) -> None:
        for step, token in enumerate(emitted.tokens[row].tolist()):
            if token >= 0:
                scores = [part[row, step].tolist() for part in emitted.logprobs]
                results[number].append((token, scores))

    for now in range(100):
        for number in [n for n, arrival in waiting.items() if arrival == now]:
            del waiting[number]
            lane, results[number] = number + 1, []
            inputs = start_inputs([REQUESTS[number]], model.config, tokenizer)
            slots = inputs.tokens.shape[1]  # a bucket of its own, before it is inserted
            prefix, emitted, _ = start(model, params, *inputs, num_slots=slots, top=2)
            pages = jnp.asarray([free.pop() for _ in range(SLOTS // PAGE)])
            lanes = insert(lanes, lane, prefix, pages if paged else None)
            running[lane] = number
            collect(0, number, emitted)
        lanes, emitted = advance(model, params, lanes, STEPS, top=2)
        for lane, number in running.items():
            collect(lane, number, emitted)
        running = {lane: n for lane, n in running.items() if not lanes.done[lane]}
        if not waiting and not running:
            return results
    raise AssertionError("the lanes never end")


@either_cache
def test_each_request_gets_what_it_gets_alone(loaded: Loaded, paged: bool) -> None:
    together = serve(loaded, ARRIVALS, paged=paged)
    assert [len(together[n]) for n in (0, 2)] == [20, 12]
    for number in ARRIVALS:
        alone = serve(loaded, {number: 0}, paged=paged)
        assert alone[number] == together[number]


@either_cache
def test_lanes_emit_the_tokens_of_generate(loaded: Loaded, paged: bool) -> None:
    together = serve(loaded, ARRIVALS, paged=paged)
    completions = generate(loaded, REQUESTS)
    for number, completion in enumerate(completions):
        tokens = [token for token, _ in together[number]]
        count = len(completion.token_ids)
        assert tuple(tokens[:count]) == completion.token_ids
        assert tokens[count:] == (
            []
            if completion.finish_reason == "length"
            else [t for t in tokens[count:] if t in REQUESTS[number].stop_ids]
        )


def test_a_lane_is_used_again_without_a_trace(loaded: Loaded) -> None:
    """What an earlier request left in a lane changes no bit of the next."""
    model, params, tokenizer = loaded.language_model, loaded.params, loaded.tokenizer

    def run(lanes: Lanes, number: int) -> tuple[Lanes, Any]:
        inputs = start_inputs([REQUESTS[number]], model.config, tokenizer)
        prefix, _, _ = start(model, params, *inputs, num_slots=32)
        return advance(model, params, insert(lanes, 0, prefix), 19)

    used, _ = run(new_lanes(loaded), 2)
    _, expected = run(new_lanes(loaded), 0)
    _, emitted = run(used, 0)
    for part, other in zip(*map(jax.tree.leaves, (emitted, expected)), strict=True):
        np.testing.assert_array_equal(part[0], other[0])


@pytest.mark.parametrize("cuts", [[4, 8, 12], [1, 2, 13], [11]])
def test_a_prompt_read_in_chunks_is_the_prompt_read_at_once(
    loaded: Loaded, cuts: list[int]
) -> None:
    model, params = loaded.language_model, loaded.params
    prompt = [1, *range(263, 276)]
    ids = jnp.asarray([prompt], jnp.int32)
    width, config = 16, model.config
    expected, whole = prefill(model, params, ids, jnp.asarray([len(prompt)]), SLOTS)
    cache = init_cache(config, 1, SLOTS, model.runtime.slot_dtype)
    logits = None
    for first, last in zip([0, *cuts], [*cuts, len(prompt)], strict=True):
        chunk = np.zeros((1, width), np.int32)
        chunk[0, : last - first] = prompt[first:last]
        at = jnp.asarray([[last - first - 1]])
        lengths = jnp.asarray([last - first])
        logits, cache = extend(model, params, cache, jnp.asarray(chunk), lengths, at)
    assert logits is not None
    assert cache.length.tolist() == whole.length.tolist() == [len(prompt)]
    tolerance = 1e-5 if model.runtime.cache_dtype is None else 0.2
    np.testing.assert_allclose(logits[:, 0], expected, rtol=tolerance, atol=tolerance)
    inputs = start_inputs([REQUESTS[0]], config, loaded.tokenizer)
    lanes, emitted = begin(cache, logits[:, 0], ids, lengths, *inputs[2:])
    assert emitted.tokens.shape == (1, 1)
    assert lanes.remaining.tolist() == [19]


def test_a_draft_is_verified_with_the_logits_of_single_steps(loaded: Loaded) -> None:
    model, params = loaded.language_model, loaded.params
    ids = jnp.asarray([[1, 263, 270], [1, 281, 0]], jnp.int32)
    lengths = jnp.asarray([3, 2])
    draft = jnp.asarray([[301, 302, 303], [304, 305, 306]], jnp.int32)
    _, cache = prefill(model, params, ids, lengths, SLOTS)
    logits, after = extend(model, params, cache, draft, jnp.asarray([3, 0]))
    assert after.length.tolist() == [6, 2]
    _, cache = prefill(model, params, ids, lengths, SLOTS)
    for step in range(3):
        single, cache = decode_step(model, params, cache, draft[:, step])
        np.testing.assert_allclose(logits[:, step], single, rtol=1e-4, atol=1e-4)


def test_a_released_lane_stops_and_gives_its_pages_back(loaded: Loaded) -> None:
    model, params = loaded.language_model, loaded.params
    lanes = new_lanes(loaded, paged=True)
    for lane, number in enumerate((0, 2)):
        inputs = start_inputs([REQUESTS[number]], model.config, loaded.tokenizer)
        prefix, _, _ = start(model, params, *inputs, num_slots=32)
        lanes = insert(lanes, lane, prefix, jnp.arange(4) + 4 * lane)
    lanes = release(lanes, jnp.asarray([True, False, False, False]))
    assert (lanes.cache.page_table[0] == NO_PAGE).all()
    pages = [layer.k for layer in lanes.cache.layers]
    before = [np.asarray(jax.tree.leaves(part)[0][:4]) for part in pages]
    lanes, emitted = advance(model, params, lanes, STEPS)
    assert (emitted.tokens[0] == -1).all()
    assert (emitted.tokens[1, :STEPS] >= 0).all()
    after = [jax.tree.leaves(layer.k)[0][:4] for layer in lanes.cache.layers]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_prefix_that_does_not_fit_a_lane_is_refused(loaded: Loaded) -> None:
    request = Request([1, 2], 3, stop_ids=range(9))
    model = loaded.language_model
    inputs = start_inputs([request], model.config, loaded.tokenizer)
    prefix, _, _ = start(model, loaded.params, *inputs, num_slots=16)
    with pytest.raises(ConfigError, match="but a lane holds 8"):
        insert(new_lanes(loaded), 0, prefix)


def test_lanes_without_requests_do_nothing(loaded: Loaded) -> None:
    lanes, emitted = advance(
        loaded.language_model, loaded.params, new_lanes(loaded), STEPS
    )
    assert (emitted.tokens == -1).all()
    assert lanes.cache.length.tolist() == [0] * LANES
    assert TALKING.vocab_size == lanes.counts.in_prompt.shape[1]
