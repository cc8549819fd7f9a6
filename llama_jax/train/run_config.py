"""`RunConfig`: settings of a run, and which of them a resumed run may change."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax.arguments import checked
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError, TrainError
from llama_jax.runtime import DType
from llama_jax.train.optimizer import (
    OptimizerName,
    ScheduleName,
    make_optimizer,
    make_schedule,
)
from llama_jax.types import JsonObject

_Config = TypeVar("_Config", bound="RunConfig")
_MAX_DEFAULT_LENGTH = 4096


@checked(ConfigError)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of a training run, whatever is trained.

    Defaults are Llama 2's of supervised fine-tuning (arXiv:2307.09288, 3.1): rate 2e-5
    with a cosine schedule, weight decay 0.1, batches of 64.

    Attributes:
      batch_size: rows of a step, on all devices.
      steps: total steps; None if `epochs` decides.
      epochs: passes over the data; None if `steps` decides.
      accumulate: parts of a batch that are processed one after another.
      optimizer: see `make_optimizer`.
      learning_rate: peak rate.
      schedule: see `make_schedule`.
      final: rate at the end of the schedule, as a fraction of the peak.
      warmup: steps of linear warm-up; None is 3 % of all steps.
      weight_decay: of all weights but norms.
      clip: maximum of the global gradient norm; 0 has no limit.
      seed: of data order and initial weights.
      max_skipped: steps with a loss or gradient that is not finite, after which the
        run ends.
      save_every: steps between checkpoints.
      eval_every: steps between evaluations.
      sample_every: steps between samples.
      keep: latest checkpoints to keep, besides the best.
      save_dtype: dtype of the saved model; None is that of the trained weights.
      tensorboard: also write TensorBoard event files.
      wandb: project at Weights & Biases; None logs nothing there.

    Raises:
      ConfigError: a value is out of range.

    >>> config = RunConfig(steps=1000, batch_size=8)
    >>> config.learning_rate, config.warmup_steps(1000)
    (2e-05, 30)
    >>> RunConfig.from_dict(config.to_dict()) == config
    True
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        (
            "accumulate", "max_skipped", "save_every", "eval_every", "sample_every",
            "keep", "save_dtype", "tensorboard", "wandb",
        )
    )  # fmt: skip
    """Fields that a resumed run may change; any other would make it another run."""

    batch_size: int = 64
    steps: int | None = None
    epochs: int | None = None
    accumulate: int = 1
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 2e-5
    schedule: ScheduleName = "cosine"
    final: float = 0.1
    warmup: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    max_skipped: int = 10
    save_every: int = 100
    eval_every: int = 100
    sample_every: int = 100
    keep: int = 2
    save_dtype: DType | None = None
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "batch_size", "steps", "epochs", "accumulate", "save_every", "eval_every",
            "sample_every", "keep",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}: must be a positive integer, got {value!r}")
        for name in ("warmup", "max_skipped"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ConfigError(f"{name}: must be 0 or more, got {value!r}")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name}: must be 0 or more, got {getattr(self, name)!r}"
                )
        for name, choices in (
            ("optimizer", get_args(OptimizerName)),
            ("schedule", get_args(ScheduleName)),
            ("save_dtype", (*get_args(DType), None)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}: must be one of {', '.join(map(str, choices))}, got "
                    f"{getattr(self, name)!r}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                f"learning_rate: must be positive, got {self.learning_rate!r}"
            )
        if not 0 <= self.final <= 1:
            raise ConfigError(f"final: must be between 0 and 1, got {self.final!r}")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"steps: {self.steps} and epochs: {self.epochs} both say how long the "
                "run is; give one"
            )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate: batch_size {self.batch_size} cannot be cut into "
                f"{self.accumulate} equal parts; choose a divisor"
            )

    def warmup_steps(self, steps: int) -> int:
        """The steps of warm-up in a run of `steps`."""
        return steps * 3 // 100 if self.warmup is None else self.warmup

    def make_optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of a run of `steps`."""
        return make_optimizer(
            self._schedule(steps),
            name=self.optimizer,
            weight_decay=self.weight_decay,
            clip=self.clip or None,
        )

    def learning_rates(self, steps: int) -> np.ndarray:
        """The rate of each update in a run of `steps`, on the host: float32 [steps]."""
        # One by one on the device, each would wait for the step that runs there.
        return np.asarray(jax.vmap(self._schedule(steps))(jnp.arange(steps)))

    def _schedule(self, steps: int) -> optax.Schedule:
        return make_schedule(
            self.schedule,
            self.learning_rate,
            steps=steps,
            warmup=self.warmup_steps(steps),
            final=self.final,
        )

    def to_dict(self) -> dict[str, object]:
        """The fields by name, for JSON."""
        return {
            field.name: _json(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls: type[_Config], settings: JsonObject) -> _Config:
        """The inverse of `to_dict`; null is a default, and other keys are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
            if name in names and value is not None
        }
        return cls(**fields)

    @classmethod
    def resumed(
        cls, saved: JsonObject, changes: Mapping[str, object]
    ) -> dict[str, object]:
        """The settings of a resumed run: those saved, with changes.

        Args:
          saved: settings of the run, from its run.json; empty if there is none.
          changes: settings to change; None keeps what was saved.

        Raises:
          TrainError: a change that would make it another run.
        """
        settings = dict(saved)
        for field in dataclasses.fields(cls):
            value = _json(changes.get(field.name))
            if value is None:
                continue
            if field.name in saved:
                cls._check_change(field.name, value, saved[field.name])
            settings[field.name] = value
        return settings

    def check_resumes(self, saved: JsonObject) -> None:
        """Raise a `TrainError` if the run with these saved settings is another one."""
        before = type(self).from_dict(saved)
        for field in dataclasses.fields(self):
            name = field.name
            self._check_change(name, getattr(self, name), getattr(before, name))

    @classmethod
    def _check_change(cls, name: str, value: object, before: object) -> None:
        if value != before and name not in cls.MAY_CHANGE:
            raise TrainError(
                f"{name}: is {_text(value)}, but the run was started with "
                f"{_text(before)}; resume without changing it, or start a new run in "
                "another folder"
            )


def _json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "nothing" if value is None else str(value)


def row_length(seq_length: int | None, model: LlamaConfig) -> int:
    """The tokens of a row: 4,096 by default, or the model's context if it is shorter.

    Args:
      seq_length: as given; None is the default.
      model: its context counts.

    Raises:
      ConfigError: rows are longer than the model's context.
    """
    length = seq_length or min(_MAX_DEFAULT_LENGTH, model.max_seq_len)
    if length > model.max_seq_len:
        raise ConfigError(
            f"seq_length: {length} is more than the model's context of "
            f"{model.max_seq_len}; lower it, or raise max_seq_len (and rope_theta, or "
            "with rope_scaling)"
        )
    return length
