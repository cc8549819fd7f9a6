"""Settings of the stages that learn from preferences: reward models, DPO and IPO."""

import dataclasses
import math
from typing import ClassVar, TypeVar, get_args

from llama_jax.config import LlamaConfig
from llama_jax.data.encode import OnLong
from llama_jax.data.records import OnBad
from llama_jax.errors import ConfigError
from llama_jax.model.lora import Lora
from llama_jax.model.quantize import PROJECTIONS
from llama_jax.rlhf.direct_preference import DirectLoss
from llama_jax.rlhf.preferences import Margins, check_margins
from llama_jax.runtime import DType, Remat
from llama_jax.train.run_config import RunConfig, row_length
from llama_jax.types import JsonObject

_Config = TypeVar("_Config", bound="PreferenceConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig(RunConfig):
    """Settings of a run that learns from preferences.

    A row of a batch is a pair. `from_settings` fills in defaults that depend on what is
    trained, `for_model` those that depend on the model.

    Attributes:
      checkpoint: model to start from; None is the bundled one.
      tokenizer: file or folder; None is the checkpoint's.
      max_seq_len: context in tokens, instead of the checkpoint's.
      mesh: axes and sizes, as in "fsdp=-1".
      dtype: of activations and products.
      param_dtype: of trained leaves and their moments.
      remat: what the backward pass recomputes.
      lora_rank: train adapters of this rank; None trains all weights.
      lora_alpha, lora_targets: see `Lora`.
      data: files of preferences.
      format: prompt format of the dialogs; None is the checkpoint's.
      date: the date that chat templates see, as in 2024-07-26; None is the day on which
        the run starts.
      seq_length: most tokens of a dialog.
      margins: by rating, see `preferences.margin`.
      on_long: "drop" or "refuse" pairs that do not fit.
      on_bad: what to do with a record that is no pair of dialogs.
      eval_data: files of held-out preferences.

    Raises:
      ConfigError: a value is out of range.
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = RunConfig.MAY_CHANGE | {
        "checkpoint", "tokenizer", "mesh", "remat", "data", "eval_data", "date",
    }  # fmt: skip
    """Of model and data the contents are checked, not the paths; so is the date."""

    ADAPTER_RATE: ClassVar[float]
    """The learning rate of adapters; that of weights is the field's default."""

    checkpoint: str | None = None
    tokenizer: str | None = None
    max_seq_len: int | None = None
    mesh: str | None = None
    dtype: DType | None = None
    param_dtype: DType = "float32"
    remat: Remat = "block"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    data: tuple[str, ...] = ()
    format: str | None = None
    date: str | None = None
    seq_length: int | None = None
    margins: Margins = "none"
    on_long: OnLong = "drop"
    on_bad: OnBad = "refuse"
    eval_data: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margins(self.margins)

    @classmethod
    def from_settings(cls: type[_Config], settings: JsonObject) -> _Config:
        """Make a configuration; what is absent or None has its default.

        Args:
          settings: fields by name.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        defaults: dict[str, object] = {} if "steps" in given else {"epochs": 1}
        if rank := given.get("lora_rank"):
            # Rate and decay as in `finetune`: ten times that of weights, and none.
            defaults |= {
                "learning_rate": cls.ADAPTER_RATE,
                "weight_decay": 0.0,
                "lora_alpha": 2.0 * rank,
                "lora_targets": PROJECTIONS,
            }
        return cls.from_dict(defaults | given)

    def for_model(self: _Config, model: LlamaConfig, dtype: DType) -> _Config:
        """Fill in what depends on the model and the devices.

        Args:
          model: the model.
          dtype: the default `dtype` on these devices.

        Raises:
          ConfigError: rows are longer than the model's context.
        """
        length = row_length(self.seq_length, model)
        return dataclasses.replace(self, seq_length=length, dtype=self.dtype or dtype)

    @property
    def lora(self) -> Lora | None:
        """The configuration of the adapters; None if weights are trained."""
        if self.lora_rank is None:
            return None
        assert self.lora_alpha is not None
        assert self.lora_targets is not None
        return Lora(
            rank=self.lora_rank, alpha=self.lora_alpha, targets=self.lora_targets
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(PreferenceConfig):
    """Settings of a reward model's run.

    Defaults are the Llama 2 paper's (arXiv:2307.09288, section 3.2.2): one epoch,
    batches of 512 pairs, rate 1e-5 with a cosine schedule to a tenth, and 3 % of the
    steps, at least 5, as warm-up.

    Attributes:
      safety_weight: λ of the safety loss, see `reward_model.reward_loss`.

    >>> config = RewardConfig.from_settings({})
    >>> config.epochs, config.batch_size, config.warmup_steps(100)
    (1, 512, 5)
    """

    ADAPTER_RATE: ClassVar[float] = 1e-4

    batch_size: int = 512
    learning_rate: float = 1e-5
    safety_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safety_weight < math.inf:
            raise ConfigError(
                f"safety_weight: must be 0 or more, got {self.safety_weight!r}"
            )

    def warmup_steps(self, steps: int) -> int:
        """The steps of warm-up: 3 %, at least 5."""
        warmup = super().warmup_steps(steps)
        return warmup if self.warmup is not None else min(max(warmup, 5), steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectConfig(PreferenceConfig):
    """Settings of a run of DPO or IPO: rate 1e-6, batches of 64 pairs, one epoch.

    Attributes:
      loss: "dpo" or "ipo".
      beta: how strongly the policy stays at its reference.

    >>> DirectConfig.from_settings({"lora_rank": 8}).learning_rate
    1e-05
    """

    ADAPTER_RATE: ClassVar[float] = 1e-5

    learning_rate: float = 1e-6
    loss: DirectLoss = "dpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in get_args(DirectLoss):
            raise ConfigError(
                f"loss: must be one of {', '.join(get_args(DirectLoss))}, got "
                f"{self.loss!r}"
            )
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta: must be positive, got {self.beta!r}")
