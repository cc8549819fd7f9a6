"""Serving: tokens per second of an engine, next to `generate` of the same prompts."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.generation.generate import generate
from llama_jax.generation.request import Request, text_request
from llama_jax.generation.sampling import Sampling
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.serve.local_engine import LocalEngine

_BEGINNINGS = ("Once upon a time", "One day, a boy", "The sun was", "Lily had a")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeReport:
    """Throughput of an engine; all rates are of the fastest round.

    Attributes:
      compile_seconds: of all programs of the engine.
      tokens_per_s: of as many clients as lanes, which ask at once.
      generate_tokens_per_s: of `generate` with the same requests in one batch.
      ratio: of these two.
      client_tokens_per_s: of one client, all other lanes empty.
      client_ratio: of that, and the part of one row in `generate_tokens_per_s`.
      alone_tokens_per_s: of `generate` with the request of that client alone.
    """

    compile_seconds: float
    tokens_per_s: float
    generate_tokens_per_s: float
    ratio: float
    client_tokens_per_s: float
    client_ratio: float
    alone_tokens_per_s: float


def measure_serve(
    loaded: Loaded,
    config: EngineConfig,
    *,
    steps: int,
    temperature: float,
    rounds: int = 3,
) -> ServeReport:
    """Measure an engine and `generate`, alternating, with the same requests.

    Args:
      loaded: model, weights and tokenizer.
      config: of the engine.
      steps: tokens of every answer; ends of the text are ignored.
      temperature: 0 is greedy.
      rounds: of which the fastest counts; another is for compilation.
    """
    requests = [
        dataclasses.replace(
            text_request(
                loaded.tokenizer,
                _BEGINNINGS[number % len(_BEGINNINGS)],
                max_new_tokens=steps,
                sampling=Sampling(temperature=temperature, seed=number),
            ),
            stop_ids=(),
        )
        for number in range(config.lanes)
    ]
    engine = LocalEngine(loaded, config)
    try:
        compile_seconds = engine.compile()

        def serve(requests: Sequence[Request]) -> int:
            jobs = [engine.submit(request) for request in requests]
            return sum(len(delta.ids) for job in jobs for delta in job.deltas())

        def generated(requests: Sequence[Request]) -> int:
            return sum(len(c.token_ids) for c in generate(loaded, requests))

        runs = (
            (serve, requests),
            (generated, requests),
            (serve, requests[:1]),
            (generated, requests[:1]),
        )
        rates = [[_rate(*run) for run in runs] for _ in range(rounds + 1)][1:]
    finally:
        engine.close()
    served, batch, client, alone = map(max, zip(*rates, strict=True))
    return ServeReport(
        compile_seconds=compile_seconds,
        tokens_per_s=served,
        generate_tokens_per_s=batch,
        ratio=served / batch,
        client_tokens_per_s=client,
        client_ratio=client / (batch / config.lanes),
        alone_tokens_per_s=alone,
    )


def _rate(
    function: Callable[[Sequence[Request]], int], requests: Sequence[Request]
) -> float:
    """Tokens per second of a function that returns how many it made."""
    begin = time.perf_counter()
    return function(requests) / (time.perf_counter() - begin)
