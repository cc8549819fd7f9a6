"""Prompts of a policy: batches of their numbers, in a new order each epoch."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.data.order import shuffled
from llama_jax.errors import ConfigError
from llama_jax.types import Array, JsonObject


class PromptBatch(NamedTuple):
    """Numbers of the prompts of an iteration."""

    numbers: np.ndarray | Array


@dataclasses.dataclass
class PromptSource:
    """Endless batches of prompts, each once an epoch; see `train.run.BatchSource`.

    Attributes:
      count: number of prompts.
      batch_size: prompts of a batch.
      seed: of the order of each epoch.
    """

    count: int
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Start at the first prompt."""
        self._position = 0

    def __iter__(self) -> Iterator[PromptBatch]:
        """Batches from the current position."""
        while True:
            numbers = range(self._position, self._position + self.batch_size)
            self._position = numbers.stop
            yield PromptBatch(np.array([self._prompt(n) for n in numbers], np.int32))

    def state(self) -> dict[str, int]:
        """The position after the last batch."""
        return {"position": self._position, "count": self.count}

    def restore(self, state: JsonObject) -> None:
        """Go to a position.

        Raises:
          ConfigError: the number of prompts has changed.
        """
        if state["count"] != self.count:
            raise ConfigError(
                f"prompts: there were {state['count']} when the run was saved and are "
                f"{self.count} now; resume with the same prompts"
            )
        self._position = state["position"]

    def _prompt(self, number: int) -> int:
        epoch, index = divmod(number, self.count)
        return int(shuffled(index, index + 1, self.count, key=(self.seed, epoch))[0])
