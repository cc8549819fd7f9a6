"""GGUF files for tests, by our writer and by that of gguf."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from support.foreign import TINY, meta_tensors, ours_from_meta

from llama_jax.checkpoint.lazy_leaf import lazy_leaves
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.gguf import write_gguf
from llama_jax.conversion.gguf_rope import rope_factors
from llama_jax.conversion.source import LazyModel
from llama_jax.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

GQA = TINY.replace(num_kv_heads=2)
LLAMA31 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_seq_len=8192,
)
YARN = RopeScaling(
    kind="yarn",
    factor=4.0,
    original_max_seq_len=16,
    attention_factor=1.25,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=True,
)
# GGUF's names for Meta's; the tensors are equal.
NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "attention_norm": "attn_norm",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def renamed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights under GGUF's names."""
    out = {}
    for name, array in tensors.items():
        parts = name.split(".")
        kind = NAMES.get(parts[-2], parts[-2])
        out[
            f"blk.{parts[1]}.{kind}.weight" if "layers" in name else f"{kind}.weight"
        ] = array
    return out


def make(
    config: LlamaConfig, dtype: Any = np.float32, seed: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return random weights under Meta's names, and under ours."""
    tensors = meta_tensors(config, dtype=dtype, seed=seed)
    if config.tied_embeddings:
        del tensors["output.weight"]
    return tensors, ours_from_meta(config, tensors)


def write(
    path: pathlib.Path,
    config: LlamaConfig,
    *,
    dtype: Any = "float32",
    tokenizer: Tokenizer | None = None,
    weight_dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """Write random weights by our writer, and return them."""
    _, ours = make(config, weight_dtype)
    write_gguf(path, LazyModel(config, lazy_leaves(ours), tokenizer), dtype=dtype)
    return ours


def metadata(config: LlamaConfig) -> dict[str, Any]:
    """Return the metadata that every file needs."""
    return {
        "llama.block_count": config.num_layers,
        "llama.embedding_length": config.embed_dim,
        "llama.feed_forward_length": config.mlp_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.context_length": config.max_seq_len,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
    }


def write_foreign(
    path: pathlib.Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    kinds: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    **options: Any,
) -> pathlib.Path:
    """Write a file by gguf's writer; `kinds` are the types of tensors of raw bytes."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in fields.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def effective(config: LlamaConfig) -> RopeScaling | None:
    """Return the scaling, or None if it changes no frequency of a short head."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return scaling
    return scaling if (rope_factors(config) != 1).any() else None
