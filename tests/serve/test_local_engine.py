"""The engine from other threads: jobs, limits, draining, the end."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.serving import PAGED, joined, run_alone, served_model

from llama_jax.errors import (
    ConfigError,
    PromptError,
    PromptTooLong,
    QueueFull,
    ServeError,
)
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.generation.scoring import score
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.serve.fair_queue import FairQueue
from llama_jax.serve.jobs import Engine, Job
from llama_jax.serve.local_engine import LocalEngine

ENDLESS = Request([1, 263], sampling=Sampling(temperature=1.5))


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(served_model(), PAGED)
    yield engine
    engine.close()


def test_many_threads_get_their_answers(engine: LocalEngine) -> None:
    assert isinstance(engine, Engine)
    request = Request([1, 270, 281], 12, Sampling(seed=7), num_samples=2, logprobs=1)
    expected = run_alone(request, PAGED, served_model())
    results: list[Any] = []

    def ask() -> None:
        job = engine.submit(request)
        assert isinstance(job, Job)
        results.append(joined([*job.deltas()], 2))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    scores = engine.score([request] * 3)
    for thread in threads:
        thread.join()
    assert results == [expected] * 5
    [alone] = score(served_model(), [request])
    for each in scores:
        np.testing.assert_array_equal(each.logprobs, alone.logprobs)
    assert engine.drain(60)
    assert engine.stats().finished == 10


def test_a_listener_hears_of_deltas_and_of_the_end(engine: LocalEngine) -> None:
    job, heard = engine.submit(Request([1, 263], 9)), threading.Event()
    job.add_listener(heard.set)
    ids: list[int] = []
    while not job.finished:
        assert heard.wait(60)
        heard.clear()
        ids += [id for delta in job.poll() for id in delta.ids]
    ids += [id for delta in job.poll() for id in delta.ids]
    assert len(ids) == job.usage.generated_tokens == 9


def test_a_cancelled_job_ends_and_frees_its_lane(engine: LocalEngine) -> None:
    jobs = [engine.submit(ENDLESS) for _ in range(5)]  # more than lanes
    for job in jobs:
        job.cancel()
    for job in jobs:
        assert [*job.deltas()][-1].finish_reason in ("cancelled", "length")
    assert engine.drain(60)
    assert engine.stats().busy_lanes == 0


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request([1] * 56), PromptTooLong, "56 tokens, but the context holds 56"),
        (Request([1], logprobs=3), PromptError, "logprobs: at most 2 here, got 3"),
        (Request([1], stop_ids=range(9)), PromptError, "stop_ids: at most 8"),
        (Request([1], echo=True), PromptError, "echo: an engine does not repeat"),
        (Request([400]), PromptError, "a token id is outside"),
        (
            Request([1], sampling=Sampling(logit_bias={400: 1.0})),
            PromptError,
            "logit_bias: the model has no token 400",
        ),
    ],
)
def test_a_request_that_cannot_run_is_refused(
    engine: LocalEngine, request_: Request, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.submit(request_)


def test_a_full_queue_refuses_a_request_and_loses_none() -> None:
    config = EngineConfig(lanes=3, chunk=16, pages=9, max_logprobs=2, max_waiting=4)
    engine = LocalEngine(served_model(), config)
    jobs: list[Job] = []
    request = Request([1, 263], 40, num_samples=2)

    def ask(times: int) -> None:
        for _ in range(times):
            jobs.append(engine.submit(request))

    with pytest.raises(QueueFull, match="of at most 4, and the request adds 2"):
        ask(20)
    assert engine.drain(60)
    assert all(job.usage.generated_tokens == 80 for job in jobs)
    with pytest.raises(ServeError, match="the engine is draining"):
        engine.submit(ENDLESS)
    engine.close()


def test_closing_ends_all_jobs(engine: LocalEngine) -> None:
    jobs = [engine.submit(ENDLESS) for _ in range(6)]
    engine.close()
    for job in jobs:
        assert [*job.deltas()][-1].finish_reason in ("cancelled", "length")
    for call in (lambda: engine.submit(ENDLESS), lambda: engine.score([ENDLESS])):
        with pytest.raises(ServeError, match="the engine is closed"):
            call()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_fails_its_jobs(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._scheduler, "step", fail)
    job = engine.submit(ENDLESS)
    with pytest.raises(ServeError, match="the engine has stopped: out of memory"):
        list(job.deltas())
    assert engine.drain(60)


def test_configurations_that_fit_no_model_are_refused() -> None:
    for config, message in (
        (EngineConfig(pages=2, chunk=16), "too few for a context of 56"),
        (EngineConfig(context=57), "context is 57, but the model's is 56"),
    ):
        with pytest.raises(ConfigError, match=message):
            LocalEngine(served_model(), config)
    with pytest.raises(ConfigError, match="chunk must be at least 16, got 8"):
        EngineConfig(chunk=8)


def test_clients_take_turns() -> None:
    queue: FairQueue[int] = FairQueue(9)
    queue.put([1, 2, 3], "a")
    queue.put([4], "b")
    assert queue.head() == 1
    queue.put([5], "c")
    assert queue.remove(lambda item: item == 3) == [3]
    assert [queue.pop() for _ in range(len(queue))] == [1, 4, 5, 2]
    assert queue.head() is None
