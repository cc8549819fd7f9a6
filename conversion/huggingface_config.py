"""Hugging Face's `config.json` from and to a configuration."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.conversion.config_fields import (
    default_head_dim,
    number,
    positive_integer,
    refuse_missing,
    refuse_unknown,
)
from llama_jax.conversion.huggingface_rope import read_rope, rope_fields
from llama_jax.errors import ConfigError
from llama_jax.types import JsonObject

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
# Of transformers, for the first LLaMA folders, which lack the field.
_DEFAULT_MAX_SEQ_LEN = 2048
# Fields of which only the values of a Llama are supported; the first is the default.
_FIXED: dict[str, tuple[object, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
}
# Fields that do not change what the model computes.
_INERT = {
    # where the folder comes from
    "_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map",
    "transformers_version", "transformers.js_config", "unsloth_version",
    "unsloth_fixed", "is_llama_config", "torch_dtype", "dtype", "use_bfloat16",
    "initializer_range",
    # how to run it
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_flash_attn_2_enabled", "use_flash_attention",
    "use_flash_attn", "use_sdpa", "experts_implementation", "pretraining_tp",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states",
    "torchscript", "tf_legacy_loss", "xla_device", "chunk_size_feed_forward",
    "gradient_checkpointing", "is_decoder", "max_sequence_length",
    # dropout, of training
    "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "classifier_dropout", "neftune_noise_alpha",
    "attention_probs_dropout_prob",
    # heads for other tasks
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params",
    # the tokenizer's
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "tokenizer_class", "tokenizer_model_max_length",
    "tokenizer_padding_side", "model_max_length", "prefix",
    # how to sample
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings",
    "max_time", "renormalize_logits", "penalty_alpha", "guidance_scale",
    "cache_implementation",
    "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_ensemble_weight", "assistant_lookbehind", "cache_config",
    "compile_config", "constraints", "continuous_batching_config", "disable_compile",
    "dola_layers", "encoder_repetition_penalty", "force_words_ids", "is_assistant",
    "low_memory", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "output_logits", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "return_legacy_cache", "speculation_type",
    "target_lookbehind", "token_healing", "top_h", "use_mtp", "watermarking_config",
}  # fmt: skip


def config_from_hugging_face(fields: JsonObject) -> LlamaConfig:
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
    values.setdefault("max_position_embeddings", _DEFAULT_MAX_SEQ_LEN)
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
    theta, scaling = read_rope(values, sizes["max_seq_len"])
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
    config: LlamaConfig,
    dtype: str | np.dtype,
    special_ids: Mapping[str, int | list[int]],
) -> dict[str, Any]:
    """Return a `config.json` for `transformers`; inverse of `config_from_hugging_face`.

    Args:
      config: of the model.
      dtype: of most of its weights.
      special_ids: ids of the tokens `bos`, `eos` (one or several) and `pad`, if the
        model has them.
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
        **rope_fields(config),
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": np.dtype(dtype).name,
    }
