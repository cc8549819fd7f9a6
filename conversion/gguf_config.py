"""The metadata of GGUF files from and to a configuration."""

from collections.abc import Mapping
from typing import Any

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.config import LlamaConfig
from llama_jax.conversion.config_fields import (
    default_head_dim,
    number,
    positive_integer,
    refuse_missing,
    refuse_unknown,
    short_repr,
)
from llama_jax.conversion.gguf_header import FLOAT32, UINT32, Header, MetadataValue
from llama_jax.conversion.gguf_rope import (
    FIXED_SCALING,
    SCALING_KEYS,
    read_rope_scaling,
    rope_scaling_metadata,
)
from llama_jax.errors import ConfigError

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_INTEGERS = {
    "llama.block_count": "num_layers",
    "llama.embedding_length": "embed_dim",
    "llama.feed_forward_length": "mlp_dim",
    "llama.attention.head_count": "num_heads",
    "llama.context_length": "max_seq_len",
}
_EPS, _THETA = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"
_KV_HEADS, _VOCAB_SIZE = "llama.attention.head_count_kv", "llama.vocab_size"
_HEAD_DIMS = (
    "llama.attention.key_length", "llama.attention.value_length",
    "llama.rope.dimension_count",
)  # fmt: skip
# Keys of which only the values of a Llama are supported; the first is the default.
_FIXED: dict[str, tuple[object, ...]] = {
    "general.type": ("model",),
    "split.count": (0, 1),
    "llama.expert_count": (0,),
    "llama.attention.causal": (True,),
    # 0 is none
    "llama.logit_scale": (1.0, 0.0),
    "llama.embedding_scale": (1.0, 0.0),
    "llama.residual_scale": (1.0, 0.0),
    **FIXED_SCALING,
}
# Keys that do not change what the model computes.
_INERT = {
    "llama.tensor_data_layout", "llama.pooling_type",
    # of experts, which there are none of
    "llama.expert_used_count", "llama.expert_feed_forward_length",
    "llama.expert_gating_func", "llama.expert_weights_norm",
}  # fmt: skip
_KNOWN = {
    *_INTEGERS, *_HEAD_DIMS, *_FIXED, *_INERT, _EPS, _THETA, _KV_HEADS, _VOCAB_SIZE,
    *SCALING_KEYS,
}  # fmt: skip


def check_keys(header: Header) -> None:
    """Refuse other architectures, and settings that are not known.

    Raises:
      ConfigError: the file is not that of a supported model.
    """
    architecture = header.value("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"general.architecture is {short_repr(architecture)}, but only 'llama' is "
            "supported; this is another kind of model"
        )
    for key, allowed in _FIXED.items():
        value = header.value(key) if key in header.entries else allowed[0]
        if not isinstance(value, (str, bool, int, float)) or value not in allowed:
            hint = "this is another kind of model"
            if key == "split.count":
                hint = "join the parts with llama.cpp's `llama-gguf-split --merge`"
            raise ConfigError(
                f"{key} is {short_repr(value)}, but only {allowed[0]!r} is supported; "
                f"{hint}"
            )
    refuse_unknown(
        key
        for key in header.entries
        if key.startswith("llama.") and key not in _KNOWN and _is_set(header, key)
    )


def _is_set(header: Header, key: str) -> bool:
    """Return whether a value is anything but a zero."""
    entry = header.entries[key]
    is_number = entry.length is None and entry.end - entry.start <= 8
    return not is_number or bool(header.value(key))


def config_from_metadata(
    header: Header, tensors: Mapping[str, LazyLeaf]
) -> LlamaConfig:
    """Return the configuration in a file's metadata and the shapes of its tensors.

    Args:
      header: of the file.
      tensors: of the file.

    Raises:
      ConfigError: a value is missing, impossible or not supported.
    """

    def value(key: str, default: Any = None) -> Any:
        return header.value(key) if key in header.entries else default

    refuse_missing(key for key in (*_INTEGERS, _EPS) if key not in header.entries)
    if _EMBEDDING not in tensors or len(tensors[_EMBEDDING].shape) != 2:
        raise ConfigError(f"has no matrix {_EMBEDDING}; is it a language model?")
    sizes = {ours: positive_integer(key, value(key)) for key, ours in _INTEGERS.items()}
    heads = sizes["num_heads"]
    vocab_size = tensors[_EMBEDDING].shape[0]
    if positive_integer(_VOCAB_SIZE, value(_VOCAB_SIZE, vocab_size)) != vocab_size:
        raise ConfigError(
            f"{_VOCAB_SIZE} is {value(_VOCAB_SIZE)}, but {_EMBEDDING} has {vocab_size} "
            "rows; download the file again"
        )
    head_dim = value(_HEAD_DIMS[0])
    if head_dim is None:
        fields_of_default = ("embedding_length", "head_count")
        head_dim = default_head_dim(sizes["embed_dim"], heads, *fields_of_default)
    head_dim = positive_integer(_HEAD_DIMS[0], head_dim)
    for key in _HEAD_DIMS[1:]:
        if (length := positive_integer(key, value(key, head_dim))) != head_dim:
            raise ConfigError(
                f"{key} is {length}, but only {head_dim}, the length of a key, is "
                "supported; this is another kind of model"
            )
    config = LlamaConfig(
        vocab_size=vocab_size,
        num_kv_heads=positive_integer(_KV_HEADS, value(_KV_HEADS, heads)),
        head_dim=head_dim,
        rope_theta=number(_THETA, value(_THETA, 1e4)),
        rope_scaling=None,
        norm_eps=number(_EPS, value(_EPS)),
        tied_embeddings=_HEAD not in tensors,
        head="lm",
        **sizes,
    )
    return config.replace(rope_scaling=read_rope_scaling(header, tensors, config))


def metadata_from_config(config: LlamaConfig) -> dict[str, MetadataValue]:
    """Return the metadata of a configuration, in the order of llama.cpp's converter."""
    integers = {key: getattr(config, ours) for key, ours in _INTEGERS.items()}
    integers |= dict.fromkeys(_HEAD_DIMS, config.head_dim)
    integers |= {_KV_HEADS: config.num_kv_heads, _VOCAB_SIZE: config.vocab_size}
    metadata = {key: MetadataValue(UINT32, value) for key, value in integers.items()}
    metadata[_EPS] = MetadataValue(FLOAT32, config.norm_eps)
    metadata[_THETA] = MetadataValue(FLOAT32, config.rope_theta)
    return metadata | rope_scaling_metadata(config)
