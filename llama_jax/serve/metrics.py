"""`/metrics`, in Prometheus' format."""

from collections.abc import Iterator
from typing import Any

from llama_jax.serve.models import Models

_GAUGES = {
    "lanes": "Rows that decode together.",
    "busy_lanes": "Lanes with a sample.",
    "waiting": "Samples in the queue.",
    "pages": "Pages of the cache.",
    "free_pages": "Pages that nothing uses.",
    "cached_pages": "Pages of the prefix cache that no lane uses.",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of admitted samples.",
    "cached_prompt_tokens": "Prompt tokens that were in the prefix cache.",
    "generated_tokens": "Tokens sampled.",
    "finished": "Samples that have ended.",
}
_PREFIX = "llama_jax_"


class Metrics:
    """Numbers of the engines, read when they are asked for, and of responses.

    Args:
      models: that are served.
    """

    CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, models: Models) -> None:
        import prometheus_client

        self._models = models
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(self)
        self._responses = prometheus_client.Counter(
            f"{_PREFIX}responses",
            "Responses by path and status.",
            ("path", "status"),
            registry=self._registry,
        )

    def count(self, path: str, status: int) -> None:
        """Count a response."""
        path = "/v1/models/{name}" if path.startswith("/v1/models/") else path
        self._responses.labels(path, str(status)).inc()

    def collect(self) -> Iterator[Any]:
        """Yield the engines' numbers, for Prometheus' client."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = [(model.served.name, model.engine.stats()) for model in self._models]
        kinds = ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS))
        for kind, table in kinds:
            for name, text in table.items():
                family = kind(f"{_PREFIX}{name}", text, labels=["model"])
                for model, numbers in stats:
                    family.add_metric([model], getattr(numbers, name))
                yield family

    def text(self) -> bytes:
        """Return all numbers."""
        import prometheus_client

        text: bytes = prometheus_client.generate_latest(self._registry)
        return text
