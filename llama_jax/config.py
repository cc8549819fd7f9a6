"""`LlamaConfig`: the facts of a checkpoint, and the published ones by name."""

import dataclasses
import difflib
import math
import re
from typing import Any, Literal, get_args

from llama_jax.errors import ConfigError

RopeScalingKind = Literal["linear", "llama3"]
Head = Literal["lm", "scalar"]
"""What a model computes of each token: logits, or one number."""

_HEADS: dict[Head, str] = {"lm": "a language model", "scalar": "a number per token"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model's rotary wavelengths were stretched for longer contexts.

    Attributes:
      kind: "linear" stretches all of them (Chen et al., arXiv:2306.15595); "llama3"
        the long ones and, gradually, those in the middle (Meta's code of Llama 3.1).
        The fields below are those of "llama3", and None for "linear".
      factor: by how much, at least 1.
      low_freq_factor: a wavelength longer than `original_max_seq_len` divided by this
        is stretched whole.
      high_freq_factor: one shorter than it divided by this is kept.
      original_max_seq_len: the context before the model was extended, in tokens.

    Raises:
      ConfigError: a value is out of range, or not one of this kind's.
    """

    kind: RopeScalingKind
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeScalingKind):
            raise ConfigError(
                f"config: rope_scaling kind is {self.kind!r}; choose from "
                + ", ".join(get_args(RopeScalingKind))
            )
        for field in dataclasses.fields(self)[1:]:
            name, value = field.name, getattr(self, field.name)
            if self.kind == "linear" and name != "factor":
                wanted, fits = "None for kind 'linear'", value is None
            else:
                number = "integer" if name == "original_max_seq_len" else "number"
                wanted, fits = f"a positive {number}", _is_positive(value, number)
            if name == "factor":
                wanted, fits = "a number of at least 1", fits and value >= 1
            if not fits:
                raise ConfigError(
                    f"config: rope_scaling {name} is {value!r}; it must be {wanted}"
                )
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ConfigError(
                f"config: rope_scaling low_freq_factor {low} is not below "
                f"high_freq_factor {high}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields that this kind has by name, ready for JSON."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "RopeScaling":
        """The inverse of `to_dict`; refuses a field that is missing or unknown."""
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names[:2] if name not in fields]:
            raise ConfigError(f"config: rope_scaling lacks {', '.join(missing)}")
        if unknown := sorted(fields.keys() - set(names)):
            raise ConfigError(
                f"config: rope_scaling {', '.join(unknown)} not understood; was this "
                "written by a newer llama_jax?"
            )
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """What a checkpoint *is*; no field has a default, since a wrong one is silent.

    Attributes:
      vocab_size: V, rows of the embedding; may exceed the tokenizer's pieces.
      num_layers: L.
      embed_dim: D, width of the residual stream.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; divides N, and equals it without grouping.
      head_dim: H, even (rotary pairs).
      mlp_dim: F, width between the feed-forward projections.
      max_seq_len: longest sequence the model is meant for, in tokens.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: how they were stretched, None where they were not.
      norm_eps: added to the mean square in RMSNorm.
      tied_embeddings: the output projection is the embedding, transposed.
      head: "lm" for a language model, "scalar" for a reward model or critic, whose
        only weight besides the transformer's is `scalar_head`.

    Raises:
      ConfigError: a value is out of range, or two contradict each other.
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
                wanted, fits = "true or false", isinstance(value, bool)
            elif field.name == "head":
                wanted, fits = " or ".join(map(repr, _HEADS)), value in get_args(Head)
            elif field.name == "rope_scaling":
                wanted = "a RopeScaling or None"
                fits = value is None or isinstance(value, RopeScaling)
            else:
                number = "integer" if field.type is int else "number"
                wanted, fits = f"a positive {number}", _is_positive(value, number)
            if not fits:
                raise ConfigError(
                    f"config: {field.name} is {value!r}; it must be {wanted}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config: num_heads {self.num_heads} is not a multiple of "
                f"num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"config: head_dim {self.head_dim} is odd; rotary positions turn pairs"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.rope_scaling is not None:
            fields["rope_scaling"] = self.rope_scaling.to_dict()
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LlamaConfig":
        """The inverse of `to_dict`; a missing or unknown field is an error.

        `head` may be missing, as in files of the first versions: it is "lm" then.
        """
        fields = {"head": "lm"} | fields
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - fields.keys()):
            raise ConfigError(f"config: missing {', '.join(missing)}")
        if unknown := sorted(fields.keys() - names):
            raise ConfigError(
                f"config: {', '.join(unknown)} not understood; was this written by a "
                "newer llama_jax?"
            )
        scaling = fields["rope_scaling"]
        if isinstance(scaling, dict):
            fields = fields | {"rope_scaling": RopeScaling.from_dict(scaling)}
        return cls(**fields)

    def replace(self, **changes: Any) -> "LlamaConfig":
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)

    def check_head(self, head: Head, what: str) -> None:
        """Raise a `ConfigError` if this is not the head that `what` needs."""
        if self.head != head:
            raise ConfigError(
                f"{what}: needs a model with head {head!r} ({_HEADS[head]}), but the "
                f"head is {self.head!r} ({_HEADS[self.head]}); give another model"
            )


def _is_positive(value: Any, number: str) -> bool:
    kinds = int if number == "integer" else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool)
    return fits and 0 < value < math.inf


_COLUMNS = (
    "num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size",
    "max_seq_len", "rope_theta", "norm_eps",
)  # fmt: skip

# Published architectures. Variants that share their base's row name it; Code Llama's
# Python models of 7B and 13B lack the infilling pieces, hence rows of their own.
_ROWS: dict[str, tuple[int | float, ...] | str] = {
    "llama1-7b":               (32, 4096, 32, 32, 11008, 32000, 2048, 1e4, 1e-6),
    "llama1-13b":              (40, 5120, 40, 40, 13824, 32000, 2048, 1e4, 1e-6),
    "llama1-33b":              (60, 6656, 52, 52, 17920, 32000, 2048, 1e4, 1e-6),
    "llama1-65b":              (80, 8192, 64, 64, 22016, 32000, 2048, 1e4, 1e-5),
    "llama2-7b":               (32, 4096, 32, 32, 11008, 32000, 4096, 1e4, 1e-5),
    "llama2-7b-chat":          "llama2-7b",
    "llama2-13b":              (40, 5120, 40, 40, 13824, 32000, 4096, 1e4, 1e-5),
    "llama2-13b-chat":         "llama2-13b",
    "llama2-70b":              (80, 8192, 64,  8, 28672, 32000, 4096, 1e4, 1e-5),
    "llama2-70b-chat":         "llama2-70b",
    "codellama-7b":            (32, 4096, 32, 32, 11008, 32016, 16384, 1e6, 1e-5),
    "codellama-7b-python":     (32, 4096, 32, 32, 11008, 32000, 16384, 1e6, 1e-5),
    "codellama-7b-instruct":   "codellama-7b",
    "codellama-13b":           (40, 5120, 40, 40, 13824, 32016, 16384, 1e6, 1e-5),
    "codellama-13b-python":    (40, 5120, 40, 40, 13824, 32000, 16384, 1e6, 1e-5),
    "codellama-13b-instruct":  "codellama-13b",
    "codellama-34b":           (48, 8192, 64,  8, 22016, 32000, 16384, 1e6, 1e-5),
    "codellama-34b-python":    "codellama-34b",
    "codellama-34b-instruct":  "codellama-34b",
    "codellama-70b":           (80, 8192, 64,  8, 28672, 32016, 16384, 1e6, 1e-5),
    "codellama-70b-python":    (80, 8192, 64,  8, 28672, 32016, 4096, 1e4, 1e-5),
    "codellama-70b-instruct":  "codellama-70b-python",
}  # fmt: skip


def _published(name: str) -> LlamaConfig:
    row = _ROWS[name]
    if isinstance(row, str):
        return _published(row)
    fields: dict[str, Any] = dict(zip(_COLUMNS, row, strict=True))
    head_dim = fields["embed_dim"] // fields["num_heads"]
    return LlamaConfig(
        head_dim=head_dim, rope_scaling=None, tied_embeddings=False, head="lm", **fields
    )


PRESETS: dict[str, LlamaConfig] = {name: _published(name) for name in _ROWS}
"""Meta's published models by name. A checkpoint's own configuration always wins."""


def preset(name: str) -> LlamaConfig:
    """The published configuration called `name`, or a `ConfigError` that lists them."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        raise ConfigError(
            f"no preset is called {name!r}; "
            + (f"did you mean {close[0]!r}? " if close else "")
            + f"There are: {', '.join(PRESETS)}"
        )
    return PRESETS[name]


EXAMPLE_MODEL = "L12,D768,N12,F2048,V32000"
"""A model written by its sizes, 134 million parameters."""

_LETTERS = {
    "L": "num_layers",
    "D": "embed_dim",
    "N": "num_heads",
    "K": "num_kv_heads",
    "H": "head_dim",
    "F": "mlp_dim",
    "V": "vocab_size",
}


def parse_model(text: str, max_seq_len: int) -> LlamaConfig:
    """The configuration called `text`, or of the shape that it spells.

    Args:
      text: a preset's name, or letters with sizes: `L12,D768,N12,F2048,V32000`; K is N
        and H is D / N where they are not given. With `tied`, the embedding is the
        output head too.
      max_seq_len: of a shape; a preset has its own.

    Raises:
      ConfigError: it is neither, or its sizes contradict each other.
    """
    if text in PRESETS:
        return preset(text)
    if not re.match(r"[A-Z]\d", text):
        return preset(text)  # which knows how to refuse a name
    sizes: dict[str, int] = {}
    parts = text.split(",")
    tied = parts[-1] == "tied"
    for part in parts[: -1 if tied else None]:
        letter, size = part[:1], part[1:]
        if letter not in _LETTERS or not size.isdecimal() or letter in sizes:
            raise ConfigError(
                f"--model {text}: {part!r} is not understood; write each of "
                f"{', '.join(_LETTERS)} once with its size, as in {EXAMPLE_MODEL}, and "
                "`tied` last where the embedding is the output head too"
            )
        sizes[letter] = int(size)
    if missing := [letter for letter in "LDNFV" if letter not in sizes]:
        raise ConfigError(f"--model {text}: lacks {', '.join(missing)}")
    sizes.setdefault("K", sizes["N"])
    sizes.setdefault("H", sizes["D"] // max(sizes["N"], 1))
    return LlamaConfig(
        **{_LETTERS[letter]: size for letter, size in sizes.items()},
        max_seq_len=max_seq_len,
        rope_theta=1e4,
        rope_scaling=None,
        norm_eps=1e-5,
        tied_embeddings=tied,
        head="lm",
    )
