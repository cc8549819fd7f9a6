"""`LlamaConfig`: the facts of a checkpoint, and the published ones by name."""

import dataclasses
import difflib
from typing import Any

from llama_jax.errors import ConfigError


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
      norm_eps: added to the mean square in RMSNorm.
      tied_embeddings: the output projection is the embedding, transposed.

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
    norm_eps: float
    tied_embeddings: bool

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = (int, float) if field.type is float else int
            if field.type is bool:
                wanted, fits = "true or false", isinstance(value, bool)
            else:
                wanted = f"a positive {'integer' if field.type is int else 'number'}"
                fits = isinstance(value, number) and not isinstance(value, bool)
                fits = fits and 0 < value < float("inf")
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
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LlamaConfig":
        """The inverse of `to_dict`; refuses a field that is missing or unknown."""
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(names - fields.keys()):
            raise ConfigError(f"config: missing {', '.join(missing)}")
        if unknown := sorted(fields.keys() - names):
            raise ConfigError(
                f"config: {', '.join(unknown)} not understood; was this written by a "
                "newer llama_jax?"
            )
        return cls(**fields)

    def replace(self, **changes: Any) -> "LlamaConfig":
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)


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
    return LlamaConfig(head_dim=head_dim, tied_embeddings=False, **fields)


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
