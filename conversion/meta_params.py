"""Meta's `params.json` from and to a configuration."""

import dataclasses
import math

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.config_fields import (
    SIZE_LIMIT,
    default_head_dim,
    number,
    positive_integer,
    refuse_missing,
    refuse_unknown,
    require_values,
)
from llama_jax.errors import ConfigError
from llama_jax.model.presets import PRESETS
from llama_jax.types import JsonObject

_INTEGERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "vocab_size")
_NUMBERS = ("norm_eps", "ffn_dim_multiplier", "rope_theta")
_OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier", "rope_theta", "vocab_size")
_SCALED = "use_scaled_rope"
# Numbers in Meta's code, not in the file: Llama 3.1 and 3.3. Llama 3.2's models of 1B
# and 3B, by width and layers, have their own factor.
_LLAMA31 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_seq_len=8192,
)
_LLAMA32_SIZES, _LLAMA32_FACTOR = ((2048, 16), (3072, 28)), 32.0
_IDENTIFYING = (
    "num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size",
    "rope_theta",
)  # fmt: skip


def config_from_params(
    fields: JsonObject, vocab_size: int, max_seq_len: int
) -> LlamaConfig:
    """Return the configuration in a `params.json`.

    Args:
      fields: content of the file.
      vocab_size: rows of the embedding; the file's own is often -1.
      max_seq_len: never in the file.

    Raises:
      ConfigError: a field is missing, unknown or impossible.
    """
    known = (*_INTEGERS, *_NUMBERS)
    refuse_unknown(fields.keys() - {*known, _SCALED})
    values = {name: value for name, value in fields.items() if value is not None}
    refuse_missing(n for n in known if n not in values and n not in _OPTIONAL)
    if values.get("vocab_size") == -1:
        del values["vocab_size"]
    scaled = values.pop(_SCALED, False)
    if type(scaled) is not bool:
        raise ConfigError(f"{_SCALED} is {scaled!r}; it must be true or false")
    for name, value in values.items():
        if name in _INTEGERS:
            positive_integer(name, value)
        elif not 0 < number(name, value) < SIZE_LIMIT:
            raise ConfigError(f"{name} is {value!r}; it must be in 0 … 2**31")
    dim, heads = values["dim"], values["n_heads"]
    if values.get("vocab_size", vocab_size) != vocab_size:
        raise ConfigError(
            f"vocab_size is {values['vocab_size']}, but the embedding has {vocab_size} "
            "rows; download params.json and the weights from the same model"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        num_layers=values["n_layers"],
        embed_dim=dim,
        num_heads=heads,
        num_kv_heads=values.get("n_kv_heads", heads),
        head_dim=default_head_dim(dim, heads, "dim", "n_heads"),
        mlp_dim=_mlp_dim(dim, values["multiple_of"], values.get("ffn_dim_multiplier")),
        max_seq_len=max_seq_len,
        rope_theta=float(values.get("rope_theta", 1e4)),
        rope_scaling=_published_scaling(dim, values["n_layers"]) if scaled else None,
        norm_eps=float(values["norm_eps"]),
        tied_embeddings=False,
        head="lm",
    )


def params_from_config(config: LlamaConfig) -> dict[str, float]:
    """Return a `params.json`; the inverse of `config_from_params`.

    Raises:
      ConfigError: the model needs what the format has no field for.
    """
    head_dim = config.embed_dim // config.num_heads
    scaling = _published_scaling(config.embed_dim, config.num_layers)
    scaled = config.rope_scaling == scaling
    require_values(
        config,
        {"rope_scaling": scaling if scaled else None, "head_dim": head_dim},
        "Meta",
    )
    fields: dict[str, float] = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size,
        **({_SCALED: True} if scaled else {}),
    }
    # As published if that gives the right width, else any pair that does.
    width = int(2 * 4 * config.embed_dim / 3)
    pairs = [(256, None), (4096, 1.3), (256, 1.0), (config.mlp_dim, None)]
    pairs.append((config.mlp_dim, config.mlp_dim / width))
    for multiple_of, multiplier in pairs:
        if _mlp_dim(config.embed_dim, multiple_of, multiplier) == config.mlp_dim:
            fields["multiple_of"] = multiple_of
            if multiplier is not None:
                fields["ffn_dim_multiplier"] = multiplier
            break
    return fields


def _published_scaling(dim: int, layers: int) -> RopeScaling:
    """Return the scaling that `use_scaled_rope` means for a model of these sizes."""
    if (dim, layers) in _LLAMA32_SIZES:
        return dataclasses.replace(_LLAMA31, factor=_LLAMA32_FACTOR)
    return _LLAMA31


def _mlp_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Round 8/3 D, scaled, up to a multiple, in the arithmetic of Meta's code."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def published_max_seq_len(config: LlamaConfig, where: object) -> tuple[int, str]:
    """Return the `max_seq_len` of the published model of these sizes, and its origin.

    LLaMA 1 and Llama 2 of 7B and 13B differ only in epsilon, which decides between
    presets that are otherwise equal.

    Args:
      config: of the checkpoint; its `max_seq_len` is ignored.
      where: path of the checkpoint, for messages.

    Raises:
      ConfigError: no published model has these sizes.
    """
    presets = {
        name: preset
        for name, preset in PRESETS.items()
        if all(getattr(preset, f) == getattr(config, f) for f in _IDENTIFYING)
    }
    same_eps = {n: p for n, p in presets.items() if p.norm_eps == config.norm_eps}
    for name, preset in (same_eps or presets).items():
        return preset.max_seq_len, f"as published for {name}"
    raise ConfigError(
        f"{where}: does not contain the maximum sequence length, and no published "
        "model has these sizes; set it with --max-seq-len (max_seq_len=)"
    )


def check_ranks(config: LlamaConfig, ranks: int) -> None:
    """Raise a `ConfigError` if a model cannot be split over so many ranks."""
    for name in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "embed_dim"):
        size = getattr(config, name)
        if not 1 <= ranks <= 100 or size % ranks:
            raise ConfigError(
                f"ranks is {ranks}, which does not divide {name} {size}; choose a "
                "divisor of at most 100"
            )
