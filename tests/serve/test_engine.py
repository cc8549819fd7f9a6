"""Each request gets what it gets alone, whatever else is served and lies in memory."""

import collections
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.serving import (
    DENSE,
    PAGED,
    check_nothing_leaks,
    joined,
    poison,
    random_request,
    run_alone,
    served_model,
    submit,
)

from llama_jax.generation.generate import generate
from llama_jax.generation.lanes import advance, release
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.serve.engine import first_token, read_chunk
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.serve.jobs import QueuedJob
from llama_jax.serve.scheduler import Scheduler

GREEDY = Sampling(temperature=0)


def serve_at_random(count: int, config: EngineConfig, loaded: Any, seed: int) -> None:
    """Random arrivals and cancellations; NaN wherever memory is free."""
    rng = random.Random(seed)
    scheduler = Scheduler(loaded, config)
    jobs: list[QueuedJob] = []
    while len(jobs) < count or not scheduler.idle:
        for _ in range(rng.randrange(3)):
            if len(jobs) < count and len(scheduler.queue) < 6:
                jobs.append(submit(scheduler, random_request(rng)))
        if jobs and rng.random() < 0.1:
            rng.choice(jobs[-8:]).cancel()
        poison(scheduler)
        scheduler.step()
    check_nothing_leaks(scheduler)
    reasons = collections.Counter[str]()
    for job in jobs:
        actual = joined(job.poll(), job.request.num_samples)
        expected = run_alone(job.request, config, loaded)
        for sample, alone in zip(actual, expected, strict=True):
            reasons[sample[3]] += 1
            if sample[3] != "cancelled":
                assert sample == alone, job.request
            else:
                assert alone[0][: len(sample[0])] == sample[0]
    assert {"stop", "length", "cancelled"} <= reasons.keys()
    assert reasons["cancelled"] < count // 2
    if config.pages != 0:
        assert scheduler.stats().cached_prompt_tokens > 0


@pytest.mark.parametrize("config", [PAGED, DENSE], ids=["pages", "dense"])
def test_requests_at_random_are_answered_as_alone(config: EngineConfig) -> None:
    serve_at_random(36, config, served_model(), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("config", [PAGED, DENSE], ids=["pages", "dense"])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [("float32", None), ("bfloat16", None), ("float32", "int8")],
)
def test_a_thousand_requests_at_random_are_answered_as_alone(
    config: EngineConfig, dtype: str, cache_dtype: Any
) -> None:
    count = 1000 if cache_dtype is None and dtype == "float32" else 100
    serve_at_random(count, config, served_model(dtype, cache_dtype), seed=1)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go and are cancelled in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(served_model(), PAGED)
        self.jobs: list[tuple[int, QueuedJob]] = []

    @precondition(lambda self: len(self.scheduler.queue) < 8)
    @rule(number=st.integers(0, 7))
    def submit(self, number: int) -> None:
        request = random_request(random.Random(number))
        self.jobs.append((number, submit(self.scheduler, request)))

    @rule()
    def step(self) -> None:
        self.scheduler.step()

    @rule()
    def poison(self) -> None:
        poison(self.scheduler)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.jobs))[1].cancel()

    @invariant()
    def pages_have_one_owner(self) -> None:
        scheduler = self.scheduler
        shared = scheduler.prefixes.shared_pages()
        own = [
            page
            for sample in scheduler.running.values()
            for page in sample.pages.pages[len(sample.pages.chunks) :]
        ]
        pages = [*shared, *own, *scheduler.prefixes.free_pages()]
        assert sorted(pages) == list(range(scheduler.sizes.pages))

    def teardown(self) -> None:
        for _ in range(10_000):
            if self.scheduler.idle:
                break
            self.scheduler.step()
        check_nothing_leaks(self.scheduler)
        for number, job in self.jobs:
            actual = joined(job.poll(), job.request.num_samples)
            for sample, alone in zip(actual, alone_at(number), strict=True):
                assert sample == alone or sample[3] == "cancelled"


ALONE: dict[int, list[Any]] = {}


def alone_at(number: int) -> list[Any]:
    if number not in ALONE:
        request = random_request(random.Random(number))
        ALONE[number] = run_alone(request, PAGED, served_model())
    return ALONE[number]


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_an_engine_gives_the_tokens_of_generate() -> None:
    loaded = served_model()
    rng = random.Random(5)
    for request in [random_request(rng) for _ in range(6)]:
        completions = generate(loaded, [request])
        results = run_alone(request, PAGED, loaded)
        for (ids, text, logprobs, reason), expected in zip(
            results, completions, strict=True
        ):
            assert (ids, text, reason) == (
                expected.token_ids,
                expected.text,
                expected.finish_reason,
            )
            if request.logprobs is not None:
                actual = [each.logprob for each in logprobs]
                np.testing.assert_allclose(actual, expected.logprobs, atol=1e-4)
                assert {len(each.top) for each in logprobs} <= {request.logprobs}


def test_a_prefix_is_read_once_and_an_answer_when_it_is_sent_back() -> None:
    scheduler = Scheduler(served_model(), PAGED)
    prompt = [1, *range(263, 263 + 17)]  # a chunk and two tokens

    def usage(prompt: list[int]) -> tuple[Any, ...]:
        job = submit(scheduler, Request(prompt, 16, GREEDY))
        while not scheduler.idle:
            scheduler.step()
        [(ids, *_)] = joined(job.poll(), 1)
        return (*ids,), job.usage

    answer, first = usage(prompt)
    assert first == (18, 0, 16)
    assert usage(prompt) == (answer, (18, 16, 16))
    turn = [*prompt, *answer, 270]
    assert usage(turn)[1] == (35, 16, 16)  # keys of decoding are not shared
    assert usage(turn)[1] == (35, 32, 16)
    assert scheduler.stats().cached_prompt_tokens == 64


def test_samples_of_a_request_read_its_prompt_together() -> None:
    scheduler = Scheduler(served_model(), PAGED)
    sampling = Sampling(temperature=1.5, seed=3)
    request = Request([1, *range(263, 263 + 32)], 6, sampling, num_samples=3)
    job = submit(scheduler, request)
    while not scheduler.idle:
        scheduler.step()
    samples = joined(job.poll(), 3)
    assert len({ids for ids, *_ in samples}) == 3
    assert scheduler.stats().cached_prompt_tokens == 2 * 32
    assert job.usage == (33, 0, 18)


def test_a_long_prompt_does_not_stall_the_others() -> None:
    scheduler = Scheduler(served_model(), PAGED)
    short = submit(scheduler, Request([1, 263], 9, GREEDY))
    scheduler.step()
    long = submit(scheduler, Request([1, *range(263, 263 + 50)], 2, GREEDY))
    shorter = submit(scheduler, Request([1, 270], 2, GREEDY))
    for _ in range(2):
        short.poll()
        scheduler.step()
        assert short.poll()
    assert shorter.finished
    assert not long.poll()
    assert len(scheduler.running) == 1 + (not short.finished)


def test_requests_wait_until_memory_is_free() -> None:
    scheduler = Scheduler(served_model(), EngineConfig(lanes=3, chunk=16, pages=5))
    jobs = [submit(scheduler, Request([1, n], 30, GREEDY)) for n in (263, 270, 280)]
    scheduler.step()
    assert len(scheduler.running) == 2  # two pages each, and one is left
    while not scheduler.idle:
        scheduler.step()
    assert all(job.usage.generated_tokens == 30 for job in jobs)
    check_nothing_leaks(scheduler)


def test_a_request_compiles_nothing() -> None:
    scheduler = Scheduler(served_model(), PAGED)
    scheduler.compile()
    programs = (read_chunk, first_token, advance, release)
    before = [program._cache_size() for program in programs]
    submit(scheduler, Request([1, *range(263, 263 + 30)], 5, GREEDY))
    while not scheduler.idle:
        scheduler.step()
    assert [program._cache_size() for program in programs] == before


def test_logits_that_are_no_numbers_fail_their_request_alone() -> None:
    loaded = served_model()
    embedding = loaded.params["transformer"]["embedding"].at[300].set(np.nan)
    params = {**loaded.params}
    params["transformer"] = {**params["transformer"], "embedding": embedding}
    scheduler = Scheduler(loaded._replace(params=params), PAGED)
    good = Request([1, 263, 270], 20, Sampling(seed=2, logit_bias={300: -np.inf}))
    jobs = [submit(scheduler, r) for r in (good, Request([1, 300], 9), good, good)]
    while not scheduler.idle:
        scheduler.step()
    with pytest.raises(ValueError, match="logits after this prompt are NaN"):
        list(jobs[1].deltas())
    texts = {joined(jobs[n].poll(), 1)[0][:2] for n in (0, 2, 3)}
    assert len(texts) == 1
    check_nothing_leaks(scheduler)
