"""Model configurations: the facts of a checkpoint."""

import dataclasses
import math
from typing import Any, Literal, get_args, no_type_check

from llama_jax.errors import ConfigError

RopeScalingKind = Literal["linear", "dynamic", "yarn", "llama3"]
Head = Literal["lm", "scalar"]
"""What a model computes for each token: logits or a scalar."""

_HEADS: dict[Head, str] = {"lm": "logits", "scalar": "a number per token"}


_SCALING_FIELDS: dict[RopeScalingKind, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_seq_len"),
    "yarn": (
        "factor", "original_max_seq_len", "attention_factor", "beta_fast", "beta_slow",
        "truncate",
    ),
    "llama3": (
        "factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor",
    ),
}  # fmt: skip


@no_type_check  # at run time: it checks its own fields, which come from JSON files
@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the RoPE wavelengths for a longer context.

    Fields that do not belong to `kind` are None.

    Attributes:
      kind: "linear" scales all wavelengths (position interpolation, Chen et al.,
        arXiv:2306.15595). "dynamic" raises the base so that it fits `max_seq_len` of
        the model ("NTK-aware"). "yarn" scales long wavelengths, interpolates for medium
        ones and scales the logits of attention (Peng et al., arXiv:2309.00071).
        "llama3" scales long wavelengths and interpolates for medium ones (Meta's
        Llama 3.1 code).
      factor: by which wavelengths are multiplied, at least 1.
      original_max_seq_len: context of the model before scaling, in tokens; not of
        "linear".
      attention_factor: of "yarn": by which queries and keys are multiplied.
      beta_fast: of "yarn": wavelengths that turn at least so often in the original
        context do not change.
      beta_slow: of "yarn": wavelengths that turn at most so often are multiplied by
        `factor`.
      truncate: of "yarn": whether the two limits are rounded to whole pairs.
      low_freq_factor: of "llama3": wavelengths above
        `original_max_seq_len / low_freq_factor` are multiplied by `factor`.
      high_freq_factor: of "llama3": wavelengths below
        `original_max_seq_len / high_freq_factor` do not change.

    Raises:
      ConfigError: a value is out of range, or does not belong to `kind`.

    >>> from llama_jax import RopeScaling
    >>> RopeScaling(kind="linear", factor=4.0).to_dict()
    {'kind': 'linear', 'factor': 4.0}
    """

    kind: RopeScalingKind
    factor: float
    original_max_seq_len: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in get_args(RopeScalingKind):
            raise ConfigError(
                f"config: rope_scaling kind is {self.kind!r}; choose from "
                + ", ".join(get_args(RopeScalingKind))
            )
        for field in dataclasses.fields(self)[1:]:
            name, value = field.name, getattr(self, field.name)
            if name not in _SCALING_FIELDS[self.kind]:
                allowed, valid = f"None for kind {self.kind!r}", value is None
            elif name == "truncate":
                allowed, valid = "true or false", isinstance(value, bool)
            else:
                integer = name == "original_max_seq_len"
                allowed, valid = _check_positive(value, integer=integer)
            if name == "factor":
                allowed, valid = "a number of at least 1", valid and value >= 1
            if not valid:
                raise ConfigError(
                    f"config: rope_scaling {name} is {value!r}; it must be {allowed}"
                )
        for low, high in (
            ("low_freq_factor", "high_freq_factor"),
            ("beta_slow", "beta_fast"),
        ):
            small, large = getattr(self, low), getattr(self, high)
            if small is not None and small >= large:
                raise ConfigError(
                    f"config: rope_scaling {low} {small} is not below {high} {large}; "
                    "it must be smaller"
                )

    def to_dict(self) -> dict[str, object]:
        """The fields that are not None, for JSON."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "RopeScaling":
        """The inverse of `to_dict`; a missing or unknown field is an error."""
        _check_names("config: rope_scaling", fields)
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names[:2] if name not in fields]:
            raise ConfigError(
                f"config: rope_scaling lacks {', '.join(missing)}; add it"
            )
        if unknown := sorted(fields.keys() - set(names)):
            raise ConfigError(
                f"config: rope_scaling has unknown fields {', '.join(unknown)}; was "
                "this written by a newer llama_jax?"
            )
        return cls(**fields)


@no_type_check  # at run time: it checks its own fields, which come from JSON files
@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The facts of a checkpoint.

    No field has a default: a wrong default would give wrong numbers without an error.

    Attributes:
      vocab_size: V, rows of the embedding; may exceed the tokenizer's vocabulary.
      num_layers: L.
      embed_dim: D, width of the residual stream.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; a divisor of N (N itself without grouping).
      head_dim: H, width of a head; even, since RoPE rotates pairs.
      mlp_dim: F, hidden width of the feed-forward layers.
      max_seq_len: context length, in tokens.
      rope_theta: base of the RoPE wavelengths.
      rope_scaling: how the wavelengths are scaled, or None.
      norm_eps: added to the mean square in RMSNorm.
      tied_embeddings: the output projection is the transposed embedding.
      head: "lm" for a language model with logits; "scalar" for a reward model or
        critic with one number per token, which has no output projection.

    Raises:
      ConfigError: a value is out of range, or two values contradict each other.

    >>> import llama_jax
    >>> config = llama_jax.preset("llama2-7b")
    >>> config.num_layers, config.embed_dim, config.head
    (32, 4096, 'lm')
    >>> config.replace(max_seq_len=8192).max_seq_len
    8192
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_seq_len: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tied_embeddings: bool
    head: Head

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                allowed, valid = "true or false", isinstance(value, bool)
            elif field.name == "head":
                allowed = " or ".join(map(repr, _HEADS))
                valid = isinstance(value, str) and value in _HEADS
            elif field.name == "rope_scaling":
                allowed = "a RopeScaling or None"
                valid = value is None or isinstance(value, RopeScaling)
            else:
                allowed, valid = _check_positive(value, integer=field.type is int)
            if not valid:
                raise ConfigError(
                    f"config: {field.name} is {value!r}; it must be {allowed}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config: num_heads {self.num_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}; it must be"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"config: head_dim {self.head_dim} is odd; it must be even, since RoPE "
                "rotates pairs"
            )
        kind = None if self.rope_scaling is None else self.rope_scaling.kind
        if kind == "dynamic" and self.head_dim == 2:
            raise ConfigError(
                "config: head_dim is 2, for which rope_scaling kind 'dynamic' is not "
                "defined; it must be at least 4"
            )
        if kind in ("dynamic", "yarn") and self.rope_theta <= 1:
            raise ConfigError(
                f"config: rope_theta is {self.rope_theta!r}; it must be above 1 with "
                f"rope_scaling kind {kind!r}"
            )

    def to_dict(self) -> dict[str, object]:
        """The fields by name, for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.rope_scaling is not None:
            fields["rope_scaling"] = self.rope_scaling.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LlamaConfig":
        """The inverse of `to_dict`; a missing or unknown field is an error.

        Except `head`, which the first versions did not write: it defaults to "lm".
        """
        fields = {"head": "lm"} | _check_names("config", fields)
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - fields.keys()):
            raise ConfigError(f"config: missing {', '.join(missing)}; add it")
        if unknown := sorted(fields.keys() - names):
            raise ConfigError(
                f"config: has unknown fields {', '.join(unknown)}; was this written "
                "by a newer llama_jax?"
            )
        scaling = fields["rope_scaling"]
        if isinstance(scaling, dict):
            fields = fields | {"rope_scaling": RopeScaling.from_dict(scaling)}
        return cls(**fields)

    def replace(self, **changes: Any) -> "LlamaConfig":
        """A copy with some fields changed and checked."""
        return dataclasses.replace(self, **changes)

    def check_head(self, head: Head, what: str) -> None:
        """Raise a `ConfigError` if this is not the head that `what` needs."""
        if self.head != head:
            raise ConfigError(
                f"{what}: needs a model with head {head!r} ({_HEADS[head]}), but the "
                f"head is {self.head!r} ({_HEADS[self.head]}); use another checkpoint"
            )


def _check_positive(value: Any, *, integer: bool) -> tuple[str, bool]:
    """What a field may be, in words, and whether the value is that."""
    kinds = int if integer else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    allowed = "a positive integer" if integer else "a positive number"
    return allowed, number and 0 < value < math.inf


def _check_names(what: str, fields: object) -> dict[str, Any]:
    """The fields; raises a `ConfigError` if they are no dict by name."""
    if not isinstance(fields, dict) or not all(
        isinstance(name, str) for name in fields
    ):
        raise ConfigError(
            f"{what}: is {fields!r:.60}; it must be a dict of fields by name"
        )
    return fields
