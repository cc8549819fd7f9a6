"""GGUF: llama.cpp's files, one for the weights, the configuration and the tokenizer."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from llama_jax.checkpoint.json_files import config_errors_in
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress, raw_bytes
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.gguf_header import (
    CHUNK,
    FLOAT32,
    FLOATS,
    Q8_0,
    Q8_BLOCK,
    Q8_BYTES,
    STRING,
    UINT32,
    Header,
    Layout,
    Value,
    lazy_tensors,
    need_gguf,
    pack_header,
    padding,
    read_header,
    shown,
)
from llama_jax.conversion.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from llama_jax.conversion.source import Export, Source, counted
from llama_jax.conversion.tensor_mapping import export
from llama_jax.conversion.tensor_tables import GGUF
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.model.rope import scale_frequencies

GGUFKind = Literal["float32", "float16", "bfloat16", "q8_0"]
"""In what the matrices of a file are written."""

_KINDS: dict[GGUFKind, tuple[int, int]] = {
    "float32": (0, 0),
    "float16": (1, 1),
    "bfloat16": (30, 32),
    "q8_0": (Q8_0, 7),
}
"""The numbers that ggml has for such tensors, and llama.cpp for such files."""

_QUANTIZATION_VERSION = 2
_EMBEDDING, _HEAD, _FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_MOST = 1 << 31  # no integer of a configuration is larger

_INTEGERS = {
    "llama.block_count": "num_layers",
    "llama.embedding_length": "embed_dim",
    "llama.feed_forward_length": "mlp_dim",
    "llama.attention.head_count": "num_heads",
    "llama.context_length": "max_seq_len",
}
_EPS, _THETA = "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"
_KV_HEADS, _VOCABULARY = "llama.attention.head_count_kv", "llama.vocab_size"
_HEAD_DIMS = (
    "llama.attention.key_length", "llama.attention.value_length",
    "llama.rope.dimension_count",
)  # fmt: skip
_SCALING = "llama.rope.scaling."
_SCALING_KIND, _SCALING_FACTOR = f"{_SCALING}type", f"{_SCALING}factor"
_OLD_FACTOR = "llama.rope.scale_linear"
# Known, but only with the value that a Llama has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "split.count": (0, 1),
    "llama.expert_count": (0,),
    "llama.attention.causal": (True,),
    f"{_SCALING}attn_factor": (1.0,),
}
# What says nothing about the numbers that the model computes.
_INERT = {
    "llama.tensor_data_layout", "llama.expert_used_count",
    f"{_SCALING}original_context_length", f"{_SCALING}finetuned",
}  # fmt: skip
_KNOWN = {
    *_INTEGERS, *_HEAD_DIMS, *_FIXED, *_INERT, _EPS, _THETA, _KV_HEADS, _VOCABULARY,
    _SCALING_KIND, _SCALING_FACTOR, _OLD_FACTOR,
}  # fmt: skip

# llama.cpp's files have a factor per frequency in place of Llama 3's four numbers.
_LLAMA3 = tuple(
    RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_seq_len=8192,
    )
    for factor in (8.0, 32.0)
)


def is_gguf(path: pathlib.Path) -> bool:
    """Whether this is a file that may be one of llama.cpp's."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open a `.gguf` file; no weights are read.

    Float tensors are as they are in the file, quantized ones become float32.

    Args:
      path: the file.
      max_seq_len: longest sequence, in place of the file's own.

    Raises:
      CheckpointError: it is damaged, or quantized in a way that is not known.
      ConfigError: it is no Llama, or its configuration is not understood.
    """
    path = pathlib.Path(path)
    header = read_header(path)
    with config_errors_in(path):
        _check_keys(header)
    tensors = lazy_tensors(header)
    with config_errors_in(path):
        config = _config(header, tensors)
        context = "from the file's metadata"
        if max_seq_len is not None:
            config, context = config.replace(max_seq_len=max_seq_len), "as given"
    return Source(
        path=path,
        form=GGUF,
        config=config,
        context=context,
        tensors=tensors,
        find_tokenizer=lambda: (read_tokenizer(header), path),
    )


def _check_keys(header: Header) -> None:
    """Refuse other models, and settings that nobody here knows."""
    architecture = header.value("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"general.architecture is {shown(architecture)}, but only 'llama' is "
            "supported; this is another kind of model"
        )
    for key, allowed in _FIXED.items():
        value = header.value(key) if key in header.entries else allowed[0]
        if not isinstance(value, (str, bool, int, float)) or value not in allowed:
            hint = "this is another kind of model"
            if key == "split.count":
                hint = "join the parts with llama.cpp's `llama-gguf-split --merge`"
            raise ConfigError(
                f"{key} is {shown(value)}, but only {allowed[0]!r} is supported; {hint}"
            )
    unknown = []
    for key, entry in header.entries.items():
        if key.startswith("llama.") and key not in _KNOWN:
            unset = entry.length is None and entry.end - entry.start <= 8
            if not (unset and not header.value(key)):
                unknown.append(key)
    if unknown:
        raise ConfigError(
            f"{', '.join(sorted(unknown)[:3])} not understood; it may change what the "
            "model computes, so that it is not ignored"
        )


def _config(header: Header, tensors: Mapping[str, LazyLeaf]) -> LlamaConfig:
    """The configuration in a file's metadata and the shapes of its tensors."""
    if missing := [key for key in (*_INTEGERS, _EPS) if key not in header.entries]:
        raise ConfigError(f"lacks {', '.join(missing)}; is it a language model?")
    if _EMBEDDING not in tensors or len(tensors[_EMBEDDING].shape) != 2:
        raise ConfigError(f"lacks the matrix {_EMBEDDING}; is it a language model?")
    sizes = {ours: _integer(header, key) for key, ours in _INTEGERS.items()}
    heads, width = sizes["num_heads"], sizes["embed_dim"]
    vocab_size = tensors[_EMBEDDING].shape[0]
    if _integer(header, _VOCABULARY, vocab_size) != vocab_size:
        raise ConfigError(
            f"{_VOCABULARY} is not {vocab_size}, the rows of {_EMBEDDING}; do the two "
            "belong together?"
        )
    if _HEAD_DIMS[0] not in header.entries and width % heads:
        raise ConfigError(
            f"embedding_length {width} is not a multiple of head_count {heads}, and "
            f"there is no {_HEAD_DIMS[0]}"
        )
    head_dim = _integer(header, _HEAD_DIMS[0], width // heads)
    for key in _HEAD_DIMS[1:]:
        if (found := _integer(header, key, head_dim)) != head_dim:
            raise ConfigError(
                f"{key} is {found}, but only {head_dim}, the length of a key, is "
                "supported; this is another kind of model"
            )
    theta = _number(header, _THETA, 1e4)
    return LlamaConfig(
        vocab_size=vocab_size,
        num_kv_heads=_integer(header, _KV_HEADS, heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_scaling(header, tensors, head_dim, theta),
        norm_eps=_number(header, _EPS),
        tied_embeddings=_HEAD not in tensors,
        head="lm",
        **sizes,
    )


def _integer(header: Header, key: str, absent: int | None = None) -> int:
    value = header.value(key) if key in header.entries else absent
    if type(value) is not int or not 0 < value < _MOST:
        raise ConfigError(f"{key} is {shown(value)}, which no model has")
    return value


def _number(header: Header, key: str, absent: float | None = None) -> float:
    value = header.value(key) if key in header.entries else absent
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"{key} is {shown(value)}, which is not a number")
    return float(value)


def _scaling(
    header: Header, tensors: Mapping[str, LazyLeaf], head_dim: int, theta: float
) -> RopeScaling | None:
    """How the rotary wavelengths were stretched."""
    kind = header.value(_SCALING_KIND)
    if kind not in (None, "none", "linear"):  # llama.cpp takes an absent one as linear
        raise ConfigError(
            f"{_SCALING_KIND} is {shown(kind)}; the kinds none and linear, and "
            "Llama 3's, are supported"
        )
    factor = _number(header, _SCALING_FACTOR, _number(header, _OLD_FACTOR, 0.0))
    linear = kind != "none" and factor not in (0, 1)
    found = _factors(tensors[_FACTORS], head_dim) if _FACTORS in tensors else None
    if found is None:
        return RopeScaling(kind="linear", factor=factor) if linear else None
    for scaling in _LLAMA3:
        known = rope_factors(scaling, head_dim, theta)
        if not linear and np.allclose(found, known, rtol=1e-5, atol=0):
            return scaling
    raise ConfigError(
        f"{_FACTORS} are not the factors of a published Llama 3 (8 or 32 times 8192 "
        "tokens); take the model's Hugging Face folder, which says what they are"
    )


def _factors(tensor: LazyLeaf, head_dim: int) -> np.ndarray | None:
    """The factors of the frequencies, None where all are 1."""
    if tensor.shape != (head_dim // 2,):
        raise ConfigError(
            f"{_FACTORS} has the shape {list(tensor.shape)} instead of "
            f"{[head_dim // 2]}; this is another kind of model"
        )
    factors = tensor.read().astype(np.float32)
    return None if (factors == 1).all() else factors


def rope_factors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """What each of the `head_dim / 2` frequencies is divided by, float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / np.float32(theta) ** exponent
    return frequency / scale_frequencies(frequency, scaling)


def write_gguf(
    path: pathlib.Path,
    model: Export,
    *,
    kind: GGUFKind,
    progress: Progress | None = None,
) -> None:
    """Write a file that llama.cpp loads, one tensor in memory at a time.

    Norms are always float32, and matrices whose rows cannot be cut into blocks are
    float16 in place of `q8_0`.

    Args:
      path: of the file.
      model: what to write; without a tokenizer, the file has none either.
      kind: of the matrices.
      progress: told of the bytes (of the model's own weights) that are written.

    Raises:
      CheckpointError: a weight does not fit into float16, or gguf is not installed.
      ConfigError: the kind is unknown, or the tokenizer is no SentencePiece model.
    """
    if kind not in _KINDS:
        choices = ", ".join(_KINDS)
        raise ConfigError(f"GGUF's kind {kind!r} is unknown; choose from {choices}")
    if kind == "q8_0":
        need_gguf(path, "is to be quantized")
    metadata = _metadata(path, model, kind)
    tensors = dict(export(GGUF, model.leaves, model.config))
    done = counted(progress, tensors)
    config = model.config
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        factors = rope_factors(config.rope_scaling, config.head_dim, config.rope_theta)
        leaf = LazyLeaf(factors.shape, factors.dtype, lambda: factors)
        tensors = {_FACTORS: leaf} | tensors
    types = {name: _type(leaf.shape, kind) for name, leaf in tensors.items()}
    layouts = {
        name: Layout(leaf.shape, types[name], _nbytes(leaf.shape, types[name]))
        for name, leaf in tensors.items()
    }
    with path.open("wb") as file:
        file.write(pack_header(metadata, layouts))
        for name, leaf in tensors.items():
            array = leaf.read()
            rows = array.reshape(-1, array.shape[-1])
            step = max(1, CHUNK // rows.shape[1])
            for start in range(0, rows.shape[0], step):
                part = _encoded(rows[start : start + step], types[name], name)
                file.write(raw_bytes(part))
            file.write(padding(layouts[name].nbytes))
            del array, rows, part
            if name != _FACTORS:
                done(name)


def _type(shape: tuple[int, ...], kind: GGUFKind) -> int:
    """The number of the type in which a tensor is written."""
    if len(shape) == 1:
        kind = "float32"
    elif kind == "q8_0" and shape[-1] % Q8_BLOCK:
        kind = "float16"
    return _KINDS[kind][0]


def _nbytes(shape: tuple[int, ...], number: int) -> int:
    size = math.prod(shape)
    if number == Q8_0:
        return size // Q8_BLOCK * Q8_BYTES
    return size * FLOATS[number].itemsize


def _encoded(rows: np.ndarray, number: int, name: str) -> np.ndarray:
    """Some rows of a matrix in a type of the file."""
    if number == Q8_0:
        from gguf import GGMLQuantizationType, quants

        numbers = np.ascontiguousarray(rows, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            found = quants.quantize(numbers, GGMLQuantizationType.Q8_0)
        scales = found.reshape(-1, Q8_BYTES)[:, :2].copy().view("<f2")
        fits = bool(np.isfinite(scales).all())
    else:
        with np.errstate(over="ignore"):  # looked for below
            found = np.ascontiguousarray(rows, FLOATS[number])
        narrowed = found.dtype == np.float16 and rows.dtype != np.float16
        fits = not narrowed or bool(np.isfinite(found).all())
    if not fits:
        raise CheckpointError(
            f"the model: {name} does not fit into float16, whose largest number is "
            "65504; write bfloat16 or float32"
        )
    return found


def _metadata(path: pathlib.Path, model: Export, kind: GGUFKind) -> dict[str, Value]:
    """What llama.cpp wants to know, in the order in which its own converter says it."""
    config = model.config
    integers = {key: getattr(config, ours) for key, ours in _INTEGERS.items()}
    integers |= dict.fromkeys(_HEAD_DIMS, config.head_dim)
    integers |= {_KV_HEADS: config.num_kv_heads, _VOCABULARY: config.vocab_size}
    found = {
        "general.architecture": Value(STRING, "llama"),
        "general.type": Value(STRING, "model"),
        # The path may be that of a file which is renamed when it is complete.
        "general.name": Value(STRING, path.name.partition(".gguf")[0] or "llama"),
        "general.file_type": Value(UINT32, _KINDS[kind][1]),
        "general.quantization_version": Value(UINT32, _QUANTIZATION_VERSION),
    }
    found |= {key: Value(UINT32, value) for key, value in integers.items()}
    found[_EPS] = Value(FLOAT32, config.norm_eps)
    found[_THETA] = Value(FLOAT32, config.rope_theta)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        found[_SCALING_KIND] = Value(STRING, "linear")
        found[_SCALING_FACTOR] = Value(FLOAT32, scaling.factor)
    return found | tokenizer_metadata(model.tokenizer, config.vocab_size)
