"""The scaling of rotary positions in GGUF files."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.config_fields import number, positive_integer, short_repr
from llama_jax.conversion.gguf_header import (
    FLOAT32,
    STRING,
    UINT32,
    Header,
    MetadataValue,
)
from llama_jax.errors import ConfigError
from llama_jax.model.rope import default_attention_factor, rope_frequencies

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with the divisor of each rotary frequency, of Llama 3.1 and later."""

_PREFIX = "llama.rope.scaling."
_TYPE, _FACTOR = f"{_PREFIX}type", f"{_PREFIX}factor"
_OLD_FACTOR = "llama.rope.scale_linear"
_ORIGINAL = f"{_PREFIX}original_context_length"
# Multiplies queries and keys, in addition to what YaRN does by default.
_ATTENTION = f"{_PREFIX}attn_factor"
_YARN: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""What llama.cpp computes for every Llama."""

FIXED_SCALING: dict[str, tuple[object, ...]] = {
    f"{_PREFIX}yarn_ext_factor": (1.0, -1.0),
    f"{_PREFIX}yarn_attn_factor": (1.0,),
    f"{_PREFIX}yarn_beta_fast": (32.0,),
    f"{_PREFIX}yarn_beta_slow": (1.0,),
}
"""Keys of which only llama.cpp's defaults are supported."""

SCALING_KEYS = (
    _TYPE, _FACTOR, _OLD_FACTOR, _ORIGINAL, _ATTENTION, f"{_PREFIX}finetuned",
    *FIXED_SCALING,
)  # fmt: skip
"""All keys of scaled rotary positions that are read or change nothing."""

# Files contain a factor per frequency instead of the four numbers of Llama 3's scaling.
_LLAMA3_SCALINGS = tuple(
    RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_seq_len=8192,
    )
    for factor in (8.0, 32.0)
)


def read_rope_scaling(
    header: Header, tensors: Mapping[str, LazyLeaf], config: LlamaConfig
) -> RopeScaling | None:
    """Return the scaling in a file's metadata, or in its tensor of factors.

    Args:
      header: of the file.
      tensors: of the file.
      config: of the model, without scaling.

    Raises:
      ConfigError: the scaling is of another kind, or a value is impossible.
    """

    def value(key: str, default: Any) -> Any:
        return header.value(key) if key in header.entries else default

    kind = value(_TYPE, "linear")  # as llama.cpp
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{_TYPE} is {short_repr(kind)}; supported are the types none, linear and "
            "yarn, and Llama 3's factors"
        )
    factor = number(_OLD_FACTOR, value(_OLD_FACTOR, 0.0))
    factor = number(_FACTOR, value(_FACTOR, factor)) or 1.0
    attention = number(_ATTENTION, value(_ATTENTION, 1.0))
    if kind != "yarn" and attention != 1:
        raise ConfigError(
            f"{_ATTENTION} is {attention}, but only 1.0 is supported with {_TYPE} "
            f"{kind!r}; this is another kind of model"
        )
    scaling = None
    if kind == "yarn":
        attention_factor = attention * default_attention_factor(factor)
        if attention != 1:  # as exact as the file's float32
            attention_factor = float(f"{attention_factor:.7g}")
        scaling = RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_seq_len=positive_integer(
                _ORIGINAL, value(_ORIGINAL, config.max_seq_len)
            ),
            attention_factor=attention_factor,
            **_YARN,
        )
    elif kind == "linear" and factor != 1:
        scaling = RopeScaling(kind="linear", factor=factor)
    factors = None
    if ROPE_FACTORS in tensors:
        factors = _read_rope_factors(tensors[ROPE_FACTORS], config.head_dim)
    if factors is None:
        return scaling
    for published in _LLAMA3_SCALINGS:
        expected = rope_factors(config.replace(rope_scaling=published))
        if scaling is None and np.allclose(factors, expected, rtol=1e-5, atol=0):
            return published
    raise ConfigError(
        f"{ROPE_FACTORS} are not the factors of a published Llama 3 (8 or 32 times "
        "8192 tokens); convert the model's Hugging Face folder, which contains the "
        "scaling"
    )


def _read_rope_factors(tensor: LazyLeaf, head_dim: int) -> np.ndarray | None:
    """Return the factors of the frequencies, or None if all are 1."""
    if tensor.shape != (head_dim // 2,):
        raise ConfigError(
            f"{ROPE_FACTORS} has the shape {list(tensor.shape)} instead of "
            f"{[head_dim // 2]}; this is another kind of model"
        )
    factors = tensor.read().astype(np.float32)
    return None if (factors == 1).all() else factors


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """Return the divisor of each rotary frequency, `[H / 2]` float32."""
    unscaled = config.replace(rope_scaling=None)
    return rope_frequencies(unscaled) / rope_frequencies(config)


def rope_scaling_metadata(config: LlamaConfig) -> dict[str, MetadataValue]:
    """Return the metadata of a scaling; that of Llama 3 is a tensor instead.

    Raises:
      ConfigError: llama.cpp has no field for it.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":
        return {}
    if scaling.kind == "dynamic":
        raise ConfigError(
            "the GGUF format cannot store rope_scaling 'dynamic'; choose another "
            "target format"
        )
    metadata = {
        _TYPE: MetadataValue(STRING, scaling.kind),
        _FACTOR: MetadataValue(FLOAT32, scaling.factor),
    }
    if scaling.kind == "linear":
        return metadata
    for name, only in _YARN.items():
        if getattr(scaling, name) != only:
            raise ConfigError(
                f"the GGUF format cannot store rope_scaling {name} "
                f"{getattr(scaling, name)!r} (it implies {only!r}); choose another "
                "target format"
            )
    assert scaling.original_max_seq_len is not None
    assert scaling.attention_factor is not None
    attention = scaling.attention_factor / default_attention_factor(scaling.factor)
    metadata[_ORIGINAL] = MetadataValue(UINT32, scaling.original_max_seq_len)
    if attention != 1:
        metadata[_ATTENTION] = MetadataValue(FLOAT32, attention)
    return metadata
