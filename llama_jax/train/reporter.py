"""What a run reports while it goes on; commands print it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypedDict, runtime_checkable

from llama_jax.train.metrics import Record


class Sample(TypedDict):
    """A prompt and its completion."""

    prompt: str
    text: str


class RunStart(NamedTuple):
    """Facts at the start of a run.

    Attributes:
      num_trained: trained numbers, of weights or adapters.
      trains_adapters: whether they are those of adapters.
      first_step: steps done before, if the run is resumed.
      total_steps: of the run.
    """

    num_trained: int
    trains_adapters: bool
    first_step: int
    total_steps: int


@runtime_checkable
class Reporter(Protocol):
    """Receives the events of a run, in this order."""

    def start(self, facts: RunStart) -> None:
        """The run starts, or resumes."""

    def initial_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Held-out data was evaluated before the first step."""

    def step(self, record: Record) -> None:
        """A step is done; its record may have an evaluation."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The model completed prompts after a step."""

    def close(self) -> None:
        """No step follows."""


class Quiet:
    """A reporter that does nothing."""

    def start(self, facts: RunStart) -> None:
        """Do nothing."""

    def initial_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def step(self, record: Record) -> None:
        """Do nothing."""

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
