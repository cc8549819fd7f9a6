"""Rotary positions in Hugging Face's `config.json`."""

from collections.abc import Mapping
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.config_fields import number
from llama_jax.errors import ConfigError
from llama_jax.model.rope import default_attention_factor
from llama_jax.types import JsonObject

_ORIGINAL = "original_max_position_embeddings"
# Fields by kind, and those of YaRN that have defaults.
_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
_YARN_OPTIONAL = (
    _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate",
)  # fmt: skip
_ANY_KIND = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def read_rope(values: JsonObject, max_seq_len: int) -> tuple[float, RopeScaling | None]:
    """Return theta and the scaling in the fields of a `config.json`.

    Args:
      values: fields that are not None.
      max_seq_len: `max_position_embeddings`.

    Raises:
      ConfigError: the scaling is of an unknown kind, or a field of it is missing,
        unknown or impossible.
    """
    name, fields = _nested(values)
    kind = fields.get("rope_type", fields.get("type", "default"))
    theta = fields.get("rope_theta", values.get("rope_theta", 1e4))
    theta = number("rope_theta", theta)
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ConfigError(
            f"{name} is of the type {kind!r}; supported are {', '.join(_FIELDS)}"
        )
    if fields.get("partial_rotary_factor", 1.0) != 1:
        raise ConfigError(
            f"{name} partial_rotary_factor is {fields['partial_rotary_factor']!r}, but "
            "only 1.0 is supported; this is another kind of model"
        )
    if missing := [key for key in _FIELDS[kind] if key not in fields]:
        raise ConfigError(
            f"{name} of the type {kind!r} lacks {', '.join(missing)}; add it"
        )
    known = {*_ANY_KIND, *_FIELDS[kind], *(_YARN_OPTIONAL if kind == "yarn" else ())}
    if unknown := sorted(fields.keys() - known):
        raise ConfigError(
            f"{name} of the type {kind!r} has unknown fields {', '.join(unknown)}; "
            "remove them if they change nothing"
        )
    numbers = {
        key: number(f"{name} {key}", value)
        for key, value in fields.items()
        if key not in (*_ANY_KIND, _ORIGINAL, "truncate")
    }
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=numbers["factor"])
    if kind == "dynamic":  # for transformers, the context is always the original one
        return theta, RopeScaling(
            kind="dynamic", factor=numbers["factor"], original_max_seq_len=max_seq_len
        )
    if kind == "yarn":
        original = fields.get(_ORIGINAL) or max_seq_len
        return theta, _read_yarn(numbers, original, fields.get("truncate", True))
    scaling = {"kind": "llama3", "original_max_seq_len": fields[_ORIGINAL], **numbers}
    return theta, RopeScaling.from_dict(scaling)


def rope_fields(config: LlamaConfig) -> dict[str, object]:
    """Return the fields of a `config.json`; the inverse of `read_rope`.

    Raises:
      ConfigError: the model is used with a longer context than its "dynamic" scaling
        began with, for which there is no field.
    """
    scaling = config.rope_scaling
    fields: dict[str, object] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if scaling is None:
        return fields
    renamed = scaling.to_dict() | {"rope_type": scaling.kind}
    del renamed["kind"]
    if original := renamed.pop("original_max_seq_len", None):
        renamed[_ORIGINAL] = original
    if scaling.kind == "dynamic":
        del renamed[_ORIGINAL]  # max_position_embeddings
        if config.max_seq_len != original:
            raise ConfigError(
                f"the Hugging Face format has one field for max_seq_len "
                f"{config.max_seq_len} and the original context {original} of "
                f"rope_scaling 'dynamic'; convert with --max-seq-len {original}, and "
                "raise it where the model is used"
            )
    return fields | {"rope_scaling": renamed}


def _nested(values: JsonObject) -> tuple[str, dict[str, Any]]:
    """Return the object that describes the scaling, without nulls, and its name."""
    both = {
        name: values[name]
        for name in ("rope_scaling", "rope_parameters")
        if values.get(name)
    }
    for name, fields in both.items():
        if not isinstance(fields, dict):
            raise ConfigError(f"{name} is {fields!r}; it must be an object")
    if len(both) == 2 and both["rope_scaling"] != both["rope_parameters"]:
        raise ConfigError(
            "rope_scaling and rope_parameters are different; remove one of them"
        )
    for name, fields in both.items():
        if fields.get("truncate", True) is None:  # false, which is not the default
            fields = fields | {"truncate": False}
        return name, {key: value for key, value in fields.items() if value is not None}
    return "rope_scaling", {}


def _read_yarn(
    numbers: Mapping[str, float], original: Any, truncate: Any
) -> RopeScaling:
    """Return the scaling of YaRN, with the defaults of `transformers`."""
    factor = numbers["factor"]
    mscale, all_dim = numbers.get("mscale"), numbers.get("mscale_all_dim")
    attention = default_attention_factor(factor)
    if mscale and all_dim:
        attention = default_attention_factor(factor, mscale)
        attention /= default_attention_factor(factor, all_dim)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_seq_len=original,
        attention_factor=numbers.get("attention_factor", attention),
        beta_fast=numbers.get("beta_fast") or 32.0,
        beta_slow=numbers.get("beta_slow") or 1.0,
        truncate=truncate,
    )
