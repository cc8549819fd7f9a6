"""Hugging Face's `config.json` from and to a configuration."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.config_fields import (
    default_head_dim,
    number,
    positive_integer,
    refuse_missing,
    refuse_unknown,
)
from llama_jax.errors import ConfigError

_INTEGERS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed_dim",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "max_position_embeddings": "max_seq_len",
}
_OPTIONAL = (
    "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
# Fields of which only the values of a Llama are supported; the first is the default.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# Fields that do not change what the model computes.
_INERT = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range",
    "_name_or_path", "_commit_hash", "pretraining_tp", "attention_dropout", "prefix",
    "max_sequence_length", "tokenizer_class", "attn_implementation", "return_dict",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "num_labels",
    "task_specific_params", "finetuning_task", "unsloth_version", "unsloth_fixed",
    "transformers.js_config",
}  # fmt: skip
_LINEAR = {"factor": "factor"}
_LLAMA3 = _LINEAR | {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}


def config_from_hugging_face(fields: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration in a `config.json`.

    Args:
      fields: content of the file.

    Raises:
      ConfigError: a field is missing, impossible, unknown, or has a value that is not
        supported.
    """
    values = {name: value for name, value in fields.items() if value is not None}
    for name, allowed in _FIXED.items():
        if values.get(name, allowed[0]) not in allowed:
            raise ConfigError(
                f"{name} is {values[name]!r}, but only {allowed[0]!r} is supported; "
                "this is another kind of model"
            )
    known = {*_INTEGERS, *_OPTIONAL, *_FIXED, *_INERT}
    refuse_unknown(
        name
        for name, value in values.items()
        if name not in known and value not in (False, [], {})
    )
    refuse_missing(name for name in _INTEGERS if name not in values)
    sizes = {
        ours: positive_integer(theirs, values[theirs])
        for theirs, ours in _INTEGERS.items()
    }
    heads = sizes["num_heads"]
    head_dim = values.get("head_dim")
    if head_dim is None:
        fields_of_default = ("hidden_size", "num_attention_heads")
        head_dim = default_head_dim(sizes["embed_dim"], heads, *fields_of_default)
    theta, scaling = _rope(values)
    tied = values.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise ConfigError(f"tie_word_embeddings is {tied!r}; it must be a boolean")
    return LlamaConfig(
        **sizes,
        num_kv_heads=positive_integer(
            "num_key_value_heads", values.get("num_key_value_heads", heads)
        ),
        head_dim=positive_integer("head_dim", head_dim),
        rope_theta=theta,
        rope_scaling=scaling,
        # 1e-6 is the default of transformers.
        norm_eps=number("rms_norm_eps", values.get("rms_norm_eps", 1e-6)),
        tied_embeddings=tied,
        head="lm",
    )


def config_to_hugging_face(
    config: LlamaConfig, dtype: str | np.dtype, special_ids: Mapping[str, int]
) -> dict[str, Any]:
    """Return a `config.json` for `transformers`; inverse of `config_from_hugging_face`.

    Args:
      config: of the model.
      dtype: of most of its weights.
      special_ids: ids of the tokens `bos` and `eos`, if the model has a tokenizer.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{f"{name}_token_id": id for name, id in special_ids.items()},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
        **{theirs: getattr(config, ours) for theirs, ours in _INTEGERS.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_fields(config.rope_scaling),
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": np.dtype(dtype).name,
    }


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling; newer files nest both in `rope_parameters`."""
    nested = values.get("rope_parameters", values.get("rope_scaling", {}))
    if not isinstance(nested, dict):
        raise ConfigError(f"rope_scaling is {nested!r}; it must be an object")
    kind = nested.get("rope_type", nested.get("type", "default"))
    theta = number(
        "rope_theta", nested.get("rope_theta", values.get("rope_theta", 1e4))
    )
    if kind == "default":
        return theta, None
    names = _LINEAR if kind == "linear" else _LLAMA3
    if kind not in ("linear", "llama3") or not names.keys() <= nested.keys():
        raise ConfigError(
            f"rope_scaling is {nested!r}; supported are the types default, linear and "
            "llama3, each with all of its fields"
        )
    for name in names:
        number(f"rope_scaling {name}", nested[name])
    fields = {ours: nested[theirs] for theirs, ours in names.items()}
    return theta, RopeScaling(kind=kind, **fields)


def _rope_scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    names = _LINEAR if scaling.kind == "linear" else _LLAMA3
    fields = {theirs: getattr(scaling, ours) for theirs, ours in names.items()}
    return {"rope_type": scaling.kind} | fields
