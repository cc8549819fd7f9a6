"""`EngineConfig`: what decides the shapes of a serving engine's programs."""

import dataclasses

from llama_jax.arguments import checked
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError


@checked(ConfigError)
@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine.

    Lanes, chunk, context, pages or none, and max_logprobs decide the programs, and so
    the last bits of an answer; nothing else does, the load least of all.

    Attributes:
      lanes: rows that decode together.
      chunk: C, tokens of a prompt that are read at once, and slots of a page; at least
        16.
      context: most tokens of a prompt and its answer; defaults to the model's.
      pages: pages of the cache; defaults to enough for all lanes. 0 gives every lane
        dense slots of its own, and no prefix is reused; a mesh needs that.
      max_logprobs: most likeliest tokens that a request may ask for.
      max_stop_ids: most stop ids of a request.
      steps: decoding steps of a device call.
      max_waiting: most samples in the queue.

    >>> EngineConfig(lanes=64).chunk
    64
    """

    lanes: int = 8
    chunk: int = 64
    context: int | None = None
    pages: int | None = None
    max_logprobs: int = 5
    max_stop_ids: int = 8
    steps: int = 8
    max_waiting: int = 256

    def __post_init__(self) -> None:
        for name, least in (
            ("lanes", 1),
            ("chunk", 16),
            ("context", 2),
            ("pages", 0),
            ("max_logprobs", 0),
            ("max_stop_ids", 1),
            ("steps", 1),
            ("max_waiting", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(
                    f"engine: {name} must be at least {least}, got {value}"
                )

    def resolve(self, model: LlamaConfig) -> "Sizes":
        """Compute the sizes that depend on the model.

        Raises:
          ConfigError: the context is longer than the model's, or the pages are too few
            for one request.
        """
        context = self.context or model.max_seq_len
        if context > model.max_seq_len:
            raise ConfigError(
                f"engine: context is {context}, but the model's is {model.max_seq_len}"
            )
        per_lane = -(-context // self.chunk)
        pages = self.lanes * per_lane if self.pages is None else self.pages
        if 0 < pages < per_lane:
            raise ConfigError(
                f"engine: {pages} pages of {self.chunk} slots are too few for a "
                f"context of {context}; use at least {per_lane}"
            )
        return Sizes(context, per_lane, pages)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of an engine for a model.

    Attributes:
      context: most tokens of a prompt and its answer.
      pages_per_lane: M; a lane has `M · C` slots.
      pages: of the cache; 0 if it is dense.
    """

    context: int
    pages_per_lane: int
    pages: int
