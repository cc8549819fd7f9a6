"""A longer context for a model: `yarn,factor=4`."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, get_args

from llama_jax.config import LlamaConfig, RopeScaling, RopeScalingKind
from llama_jax.errors import ConfigError
from llama_jax.model.rope import default_attention_factor

EXAMPLE_SCALING = "yarn,factor=4"
_OPTIONAL: dict[str, dict[str, float | bool]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
_VALUES: dict[str, tuple[Callable[[str], float | int | bool], str]] = {
    "original_max_seq_len": (int, "an integer"),
    "truncate": ({"true": True, "false": False}.__getitem__, "true or false"),
}


def parse_rope_scaling(text: str, original_max_seq_len: int) -> RopeScaling:
    """Parse a kind of scaling and its fields.

    Args:
      text: such as `yarn,factor=4`; the fields are those of `RopeScaling`. All but
        `factor` have the defaults of the kind's authors.
      original_max_seq_len: default of the field, for kinds that have it.

    Raises:
      ConfigError: `text` is something else, or a value is out of range.

    >>> parse_rope_scaling("dynamic,factor=2", 4096).to_dict()
    {'kind': 'dynamic', 'factor': 2.0, 'original_max_seq_len': 4096}
    """
    kind, *parts = text.split(",")
    if kind not in _OPTIONAL:
        raise _error(text, repr(kind), "kind", kind, get_args(RopeScalingKind))
    fields: dict[str, Any] = {"factor": None, **_OPTIONAL[kind]}
    if kind != "linear":
        fields["original_max_seq_len"] = original_max_seq_len
    if kind == "yarn":
        fields["attention_factor"] = None
    given: set[str] = set()
    for part in parts:
        name, _, value = part.partition("=")
        if name not in fields:
            raise _error(text, repr(part), f"field of {kind}", name, fields)
        if name in given:
            raise ConfigError(f"rope_scaling {text!r}: {name} is given twice")
        given.add(name)
        fields[name] = _value(text, name, value)
    if fields["factor"] is None:
        raise ConfigError(
            f"rope_scaling {text!r}: lacks factor, by which the context grows; write "
            f"it as in {kind},factor=4"
        )
    if kind == "yarn" and fields["attention_factor"] is None:
        fields["attention_factor"] = default_attention_factor(fields["factor"])
    return RopeScaling.from_dict({"kind": kind, **fields})


def extend_context(
    config: LlamaConfig, text: str, max_seq_len: int | None
) -> LlamaConfig:
    """Return the configuration of the same model for a longer context.

    Args:
      config: of the model; a scaling that it has is replaced.
      text: as of `parse_rope_scaling`. `original_max_seq_len` defaults to the context
        that the model had without scaling.
      max_seq_len: the new context; defaults to factor · original context.

    Raises:
      ConfigError: `text` is something else, or a value is out of range.

    >>> import llama_jax
    >>> config = extend_context(llama_jax.preset("llama2-7b"), "yarn,factor=4", None)
    >>> config.max_seq_len, config.rope_scaling.original_max_seq_len
    (16384, 4096)
    """
    original, old = config.max_seq_len, config.rope_scaling
    if old is not None:
        original = old.original_max_seq_len or max(int(original / old.factor), 1)
    scaling = parse_rope_scaling(text, original)
    original = scaling.original_max_seq_len or original
    return config.replace(
        rope_scaling=scaling, max_seq_len=max_seq_len or int(original * scaling.factor)
    )


def _value(text: str, name: str, value: str) -> float | int | bool:
    parse, allowed = _VALUES.get(name, (float, "a number"))
    try:
        return parse(value)
    except (KeyError, ValueError):
        raise ConfigError(
            f"rope_scaling {text!r}: {name} is {value!r}; it must be {allowed}"
        ) from None


def _error(
    text: str, what: str, expected: str, word: str, choices: Iterable[str]
) -> ConfigError:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return ConfigError(
        f"rope_scaling {text!r}: {what} is not a {expected}; "
        + (f"did you mean {close[0]!r}? " if close else "")
        + f"choose from {', '.join(choices)}, as in {EXAMPLE_SCALING}"
    )
