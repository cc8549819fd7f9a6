"""Checks of the fields of foreign configurations; each error names its field."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError

SIZE_LIMIT = 1 << 31
"""No size of a model reaches this; keeps arithmetic on damaged files small."""


def short_repr(value: object) -> str:
    """Return a value for a message, shortened to about 60 characters."""
    text = repr(value[:3] if isinstance(value, (list, np.ndarray)) else value)
    return text if len(text) < 60 else f"{text[:60]}…"


def positive_integer(name: str, value: object) -> int:
    """Return the value of a size.

    Raises:
      ConfigError: it is not an integer in 1 … 2³¹ - 1.
    """
    if type(value) is not int or not 0 < value < SIZE_LIMIT:
        raise ConfigError(
            f"{name} is {short_repr(value)}; it must be a positive integer below 2**31"
        )
    return value


def number(name: str, value: Any) -> float:
    """Return the value of a real number as a float.

    Raises:
      ConfigError: it is neither int nor float.
    """
    if type(value) not in (int, float):
        raise ConfigError(f"{name} is {short_repr(value)}; it must be a number")
    return float(value)


def default_head_dim(
    embed_dim: int, num_heads: int, width_field: str, heads_field: str
) -> int:
    """Return D / N, the head dimension if the configuration has no other.

    Raises:
      ConfigError: D is not a multiple of N.
    """
    if num_heads <= 0 or embed_dim % num_heads:
        raise ConfigError(
            f"{width_field} {embed_dim} is not a multiple of {heads_field} {num_heads}"
        )
    return embed_dim // num_heads


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise a `ConfigError` if there are names of unknown fields."""
    if unknown := sorted(names):
        raise ConfigError(
            f"unknown fields {', '.join(unknown[:3])}: they may change what the model "
            "computes, so they are not ignored; only Llama models are supported"
        )


def refuse_missing(names: Iterable[str]) -> None:
    """Raise a `ConfigError` if there are names of missing fields."""
    if missing := list(names):
        raise ConfigError(
            f"missing fields {', '.join(missing)}; is it the configuration of a "
            "language model?"
        )


def require_values(
    config: LlamaConfig, required: Mapping[str, object], format_name: str
) -> None:
    """Raise a `ConfigError` if a format has no field for what a model needs.

    Args:
      config: of the model to be written.
      required: the only values that the format implies, by field of `LlamaConfig`.
      format_name: for the message.
    """
    fields = config.to_dict()
    for name, value in required.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"the {format_name} format cannot store {name} {fields[name]!r} (it "
                f"implies {value!r}); choose another target format"
            )
