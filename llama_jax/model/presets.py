"""Published models by name, and models given by their sizes."""

import re
from typing import Any

from llama_jax.arguments import checked
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError, did_you_mean

_COLUMNS = (
    "num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size",
    "max_seq_len", "rope_theta", "norm_eps",
)  # fmt: skip

# Published architectures; a name in place of a row refers to that row. Code Llama's
# Python models of 7B and 13B have their own rows: they lack the infilling pieces.
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
"""Configurations of Meta's published models by name.

A checkpoint has its own configuration, which may differ.

>>> import llama_jax
>>> llama_jax.PRESETS["llama2-70b"].num_kv_heads
8
"""


@checked(ConfigError)
def preset(name: str) -> LlamaConfig:
    """Return the configuration of a published model.

    Args:
      name: a key of `PRESETS`.

    Raises:
      ConfigError: there is no such preset; the message lists all.

    >>> import llama_jax
    >>> llama_jax.preset("codellama-7b").rope_theta
    1000000.0
    """
    if name not in PRESETS:
        raise ConfigError(
            f"preset: {name!r} is not one of {', '.join(PRESETS)}"
            f"{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]


EXAMPLE_MODEL = "L12,D768,N12,F2048,V32000"
"""A model given by its sizes (134 million parameters)."""

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
    """Parse the name of a preset or the sizes of a model.

    Args:
      text: a preset, or letters with sizes such as `L12,D768,N12,F2048,V32000`. K
        defaults to N, H to D / N. A final `tied` ties the embeddings.
      max_seq_len: context length if `text` gives sizes.

    Raises:
      ConfigError: `text` is neither, or its sizes contradict each other.
    """
    if text in PRESETS or not re.match(r"[A-Z]\d", text):
        return preset(text)
    sizes: dict[str, int] = {}
    parts = text.split(",")
    tied = parts[-1] == "tied"
    for part in parts[: -1 if tied else None]:
        letter, size = part[:1], part[1:]
        if letter not in _LETTERS or not size.isdecimal() or letter in sizes:
            raise ConfigError(
                f"model {text}: {part!r} is not a letter and its size; write each of "
                f"{', '.join(_LETTERS)} at most once, as in {EXAMPLE_MODEL}, and "
                "`tied` last for tied embeddings"
            )
        sizes[letter] = int(size)
    if missing := [letter for letter in "LDNFV" if letter not in sizes]:
        raise ConfigError(
            f"model {text}: lacks {', '.join(missing)}; write them as in "
            f"{EXAMPLE_MODEL}"
        )
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
