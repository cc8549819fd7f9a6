"""`FinetuneConfig`: the settings of supervised fine-tuning and of pretraining."""

import dataclasses
from typing import ClassVar, Literal, get_args

from llama_jax.config import LlamaConfig
from llama_jax.data.encode import AUTO, OnLong, check_format
from llama_jax.data.infilling import RATE
from llama_jax.data.records import OnBad
from llama_jax.data.stream import Packing
from llama_jax.errors import ConfigError
from llama_jax.model.extended_context import parse_rope_scaling
from llama_jax.model.lora import Lora
from llama_jax.model.quantize import PROJECTIONS
from llama_jax.runtime import DType, Remat
from llama_jax.train.run_config import RunConfig, row_length
from llama_jax.types import JsonObject
from llama_jax.weights import Kind

MethodName = Literal["full", "lora", "qlora"]

# Llama 2's fine-tuning (arXiv:2307.09288, 3.1): rate 2e-5, two epochs. Pretraining
# (2.2): 3e-4 and 2000 steps of warm-up. Adapters need ten times the rate of weights
# (arXiv:2106.09685; 2305.14314, B: 2e-4 and batches of 16), and no decay, which would
# pull at what they add.
_FULL: dict[str, object] = {}
_SCRATCH: dict[str, object] = {"learning_rate": 3e-4, "epochs": 1}
_ADAPTERS: dict[str, object] = {
    "learning_rate": 2e-4,
    "weight_decay": 0.0,
    "batch_size": 16,
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_targets": PROJECTIONS,
}
_MAX_WARMUP = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Settings of `finetune`: those of any run, and of model, data and method.

    `from_settings` fills in defaults that depend on the method; `for_model` those that
    depend on the model.

    Attributes:
      checkpoint: model to start from; None is the bundled one.
      tokenizer: file or folder; None is the checkpoint's.
      from_scratch: start from random weights of the shape `preset`.
      preset: name or shape of a model.
      max_seq_len: context in tokens, instead of the checkpoint's.
      rope_theta: base of rotary positions, instead of the checkpoint's.
      rope_scaling: scaling of rotary positions, as of `extend_context`.
      mesh: axes and sizes, as in "fsdp=-1".
      dtype: of activations and products.
      param_dtype: of trained leaves and their moments.
      remat: what the backward pass recomputes.
      method: all weights ("full"), adapters, or adapters on quantized weights.
      lora_rank, lora_alpha, lora_targets: see `Lora`.
      quantize: how "qlora" stores weights.
      data: files to learn from.
      format: how records are written; see `Loader`. "auto" is resolved for a run.
      date: the date that chat templates see, as in 2024-07-26; None is the day on which
        the run starts.
      seq_length: tokens per row.
      packing: see `Loader`, as are `on_long`, `on_bad` and `infilling_rate`.
      eval_data: files of held-out records.
      sample_prompt: prompts to complete during training.
      sample_tokens: most tokens of a completion.

    Raises:
      ConfigError: a value is out of range.

    >>> FinetuneConfig.from_settings({"method": "lora"}).learning_rate
    0.0002
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = RunConfig.MAY_CHANGE | {
        "checkpoint", "tokenizer", "mesh", "remat", "data", "eval_data",
        "sample_prompt", "sample_tokens", "date",
    }  # fmt: skip
    """Of model and data the contents are checked, not the paths; so is the date."""

    checkpoint: str | None = None
    tokenizer: str | None = None
    from_scratch: bool = False
    preset: str | None = None
    max_seq_len: int | None = None
    rope_theta: float | None = None
    rope_scaling: str | None = None
    mesh: str | None = None
    dtype: DType | None = None
    param_dtype: DType = "float32"
    remat: Remat = "block"
    method: MethodName = "full"
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    quantize: Kind | None = None
    data: tuple[str, ...] = ()
    format: str = AUTO
    date: str | None = None
    seq_length: int | None = None
    packing: Packing = "pack"
    on_long: OnLong = "drop"
    on_bad: OnBad = "refuse"
    infilling_rate: float = RATE
    eval_data: tuple[str, ...] | None = None
    sample_prompt: tuple[str, ...] | None = None
    sample_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_scaling is not None:
            parse_rope_scaling(self.rope_scaling, original_max_seq_len=1)
        for name, choices in (
            ("method", get_args(MethodName)),
            ("packing", get_args(Packing)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}: must be one of {', '.join(choices)}, got "
                    f"{getattr(self, name)!r}"
                )
        check_format(self.format)

    @classmethod
    def from_settings(cls, settings: JsonObject) -> "FinetuneConfig":
        """Make a configuration; what is absent or None defaults to the papers' values.

        Args:
          settings: fields by name.
        """
        settings = {
            name: value for name, value in settings.items() if value is not None
        }
        method = settings.get("method", "full")
        defaults = _FULL if method == "full" else _ADAPTERS
        if settings.get("from_scratch"):
            defaults = _SCRATCH
        defaults = {"epochs": 2, **defaults}
        if method == "qlora":
            defaults["quantize"] = "nf4"
        if "steps" in settings:
            del defaults["epochs"]
        return cls.from_dict({**defaults, **settings})

    def for_model(self, model: LlamaConfig, dtype: DType) -> "FinetuneConfig":
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
    def original_max_seq_len(self) -> int | None:
        """The context to open the model with; None is its own."""
        scaling = self.rope_scaling
        scales_own = scaling is not None and "original_max_seq_len" not in scaling
        return None if scales_own else self.max_seq_len

    def warmup_steps(self, steps: int) -> int:
        """The steps of warm-up: 3 %; from scratch 10 %, up to the paper's 2000."""
        if self.from_scratch and self.warmup is None:
            return min(_MAX_WARMUP, steps // 10)
        return super().warmup_steps(steps)

    @property
    def lora(self) -> Lora | None:
        """The configuration of the adapters; None if weights are trained."""
        if self.method == "full":
            return None
        assert self.lora_rank is not None
        assert self.lora_alpha is not None
        assert self.lora_targets is not None
        return Lora(
            rank=self.lora_rank, alpha=self.lora_alpha, targets=self.lora_targets
        )
