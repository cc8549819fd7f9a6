"""Batches: any number of requests in groups that fit memory, in any order."""

import jax
import pytest
from support.models import TALKING, talking_model

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.generation import batching
from llama_jax.generation.batching import (
    MAX_ROWS,
    batch_bytes,
    cut_batches,
    free_bytes,
    slots_needed,
    start_inputs,
)
from llama_jax.generation.generate import generate, stream
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.model.cache import init_cache
from llama_jax.model.transformer import Llama
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh

MODEL = Llama(TALKING.replace(max_seq_len=256), Runtime())


def lengths_of(groups: list[list[int]], requests: list[Request]) -> list[list[int]]:
    return [[len(requests[i].prompt_ids) for i in group] for group in groups]


def test_ten_thousand_requests_are_cut_into_batches_that_fit() -> None:
    requests = [Request([1] * (1 + i % 90), 10) for i in range(10_000)]
    budget = 8 << 20
    groups = cut_batches(requests, MODEL, max_bytes=budget)
    assert sorted(i for group in groups for i in group) == list(range(10_000))
    for group in groups:
        slots = max(slots_needed(requests[i], MODEL.config) for i in group)
        assert batch_bytes(MODEL, len(group), slots) <= budget
    longest = [max(row) for row in lengths_of(groups, requests)]
    assert longest == sorted(longest, reverse=True)
    assert len(groups[0]) < len(groups[-2])  # shorter rows, more of them
    assert groups == cut_batches(requests, MODEL, max_bytes=budget)


def test_a_batch_has_no_more_rows_than_are_worthwhile() -> None:
    requests = [Request([1], 4)] * 600
    groups = cut_batches(requests, MODEL, max_bytes=1 << 50)
    assert [len(group) for group in groups] == [MAX_ROWS, MAX_ROWS, 600 - 2 * MAX_ROWS]


def test_a_request_that_fits_nowhere_runs_alone() -> None:
    assert cut_batches([Request([1])] * 2, MODEL, max_bytes=1) == [[0], [1]]
    assert cut_batches([], MODEL, max_bytes=1) == []


def test_the_bytes_of_a_batch_contain_its_cache_and_the_prompts_logits() -> None:
    cache = init_cache(MODEL.config, 4, 64, "float32")
    least = sum(part.nbytes for part in jax.tree.leaves(cache.layers))
    total = batch_bytes(MODEL, 4, 64)
    assert least < total < 10 * least
    scored = batch_bytes(MODEL, 4, 64, score_prompt=True)
    assert scored - total >= 4 * 64 * TALKING.vocab_size * 4


def test_a_mesh_holds_a_part_of_the_batch_on_each_device() -> None:
    mesh = make_mesh({"data": 2, "tensor": 2}, devices=jax.devices()[:4])
    assert batch_bytes(MODEL.copy(mesh=mesh), 4, 64) < batch_bytes(MODEL, 4, 64)
    assert 0 < free_bytes(mesh) <= free_bytes(None)


def test_free_memory_of_an_unknown_system_is_half_of_all_or_a_guess(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert free_bytes(None) > 1 << 20
    monkeypatch.setattr(batching.pathlib.Path, "read_text", lambda *_: "")
    assert free_bytes(None) > 1 << 20
    monkeypatch.delattr(batching.os, "sysconf")
    assert free_bytes(None) == 3 << 30


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return talking_model(TALKING.replace(num_layers=1))


def mixed_requests() -> list[Request]:
    return [
        Request(
            [1, *range(40, 40 + i)], 3 + i % 4, Sampling(seed=i), num_samples=1 + i % 2
        )
        for i in range(7)
    ]


def test_completions_come_in_the_order_of_the_requests(loaded: Loaded) -> None:
    requests = mixed_requests()
    expected = [
        (tuple(request.prompt_ids), request.max_new_tokens)
        for request in requests
        for _ in range(request.num_samples)
    ]
    budget = batch_bytes(loaded.language_model, 4, 16)
    completions = generate(loaded, requests, max_batch_bytes=budget)
    result = [(c.prompt_ids, len(c.token_ids)) for c in completions]
    assert result == expected
    whole = generate(loaded, requests)
    assert [c.text for c in completions] == [c.text for c in whole]


def test_streams_of_several_batches_number_completions_by_request(
    loaded: Loaded,
) -> None:
    requests = mixed_requests()
    budget = batch_bytes(loaded.language_model, 4, 16)
    texts = [""] * sum(request.num_samples for request in requests)
    for delta in stream(loaded, requests, max_batch_bytes=budget):
        texts[delta.completion] += delta.text
    assert texts == [c.text for c in generate(loaded, requests)]


def test_rows_that_fill_a_batch_have_nothing_to_sample(loaded: Loaded) -> None:
    inputs = start_inputs([Request([1, 2], 3)] * 3, TALKING, loaded.tokenizer)
    assert inputs.tokens.shape == (4, 16)
    assert inputs.limits.tolist() == [3, 3, 3, 0]
    assert inputs.stop_ids.shape == (4, 8)
    assert (inputs.stop_ids == -1).all()
