"""llama2.c's `.bin` checkpoints (version 0, the legacy export)."""

import math
import pathlib
import struct

import numpy as np

from llama_jax.checkpoint.json_files import config_errors_in
from llama_jax.checkpoint.lazy_leaf import Progress, raw_bytes
from llama_jax.config import LlamaConfig
from llama_jax.conversion.axis_patterns import axes_shape
from llama_jax.conversion.config_fields import default_head_dim, require_values
from llama_jax.conversion.lazy_arrays import mapped_leaf
from llama_jax.conversion.source import (
    LazyModel,
    Source,
    override_max_seq_len,
    tensor_progress,
)
from llama_jax.conversion.tensor_mapping import (
    pattern_sizes,
    source_shapes,
    tensors_from_leaves,
)
from llama_jax.conversion.tensor_tables import LLAMA2C
from llama_jax.conversion.tokenizer_files import find_tokenizer
from llama_jax.errors import CheckpointError
from llama_jax.file_kinds import check_file

_HEADER = struct.Struct("<7i")
_VERSIONED = 0x616B3432  # the magic number of the later export formats
# Kind by kind, each for all layers; the last only if embeddings are not tied.
_ORDER = (
    "token_embedding", "rms_att.{l}", "wq.{l}", "wk.{l}", "wv.{l}", "wo.{l}",
    "rms_ffn.{l}", "w1.{l}", "w2.{l}", "w3.{l}", "rms_final",
    "freq_cis_real", "freq_cis_imag", "wcls",
)  # fmt: skip
# Constants of run.c; the file contains neither.
_THETA, _EPS = 1e4, 1e-5


def read_llama2c(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open a `.bin` checkpoint without reading weights.

    Args:
      path: the file.
      max_seq_len: replaces the file's own.

    Raises:
      CheckpointError: the file is damaged or of another kind.
      ConfigError: its header does not describe a model.
    """
    check_file(path, "llama2.c")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise CheckpointError(f"{path}: is too short; download it again")
    header = _HEADER.unpack(head)
    if header[0] == _VERSIONED:
        raise CheckpointError(
            f"{path}: has version {header[1]} of llama2.c's format, not 0; "
            "export it again with --version 0"
        )
    with config_errors_in(path):
        config = _config_from_header(header)
        sizes = pattern_sizes(config)
        # Before tensors are listed: a damaged header may claim 2³¹ layers.
        expected_size = _HEADER.size + 4 * _count_numbers(config)
        if size != expected_size:
            raise CheckpointError(
                f"{path}: has {size:,} bytes, but its header describes a model of "
                f"{expected_size:,}; it is incomplete or damaged, or not a llama2.c "
                "checkpoint; download it again"
            )
        shapes = source_shapes(LLAMA2C, config)
        shapes |= {name: axes_shape(axes, sizes) for name, axes in LLAMA2C.dropped}
        tensors, offset = {}, _HEADER.size
        for kind in _ORDER:
            for layer in range(config.num_layers if "{l}" in kind else 1):
                if shape := shapes.get(name := kind.format(l=layer)):
                    tensors[name] = mapped_leaf(path, np.dtype("<f4"), shape, offset)
                    offset += tensors[name].nbytes
        if max_seq_len is not None:  # the rotary tables keep the file's length
            tensors = {n: t for n, t in tensors.items() if not n.startswith("freq_")}
        config, origin = override_max_seq_len(
            config, max_seq_len, "from the file's header"
        )
    return Source(
        path=path,
        format=LLAMA2C,
        config=config,
        max_seq_len_origin=origin,
        tensors=tensors,
        find_tokenizer=lambda: find_tokenizer(path),
    )


def is_llama2c(path: pathlib.Path) -> bool:
    """Return whether a path is a file that may be a llama2.c checkpoint."""
    return path.is_file() and path.suffix == ".bin"


def check_config(config: LlamaConfig) -> None:
    """Raise a `ConfigError` if the format has no field for what a model needs."""
    required = {
        "rope_theta": _THETA,
        "norm_eps": _EPS,
        "rope_scaling": None,
        "head_dim": config.embed_dim // config.num_heads,
    }
    require_values(config, required, "llama2.c")


def write_llama2c(
    path: pathlib.Path, model: LazyModel, *, progress: Progress | None = None
) -> None:
    """Write a `.bin` checkpoint in float32, one tensor at a time.

    Args:
      path: of the file.
      model: to write.
      progress: called with the bytes of the model that are written.

    Raises:
      ConfigError: the format has no field for what the model needs.
    """
    config = model.config
    check_config(config)
    sign = 1 if config.tied_embeddings else -1
    header = _HEADER.pack(
        config.embed_dim,
        config.mlp_dim,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        sign * config.vocab_size,
        config.max_seq_len,
    )
    tensors = tensors_from_leaves(LLAMA2C, model.leaves, config)
    written = tensor_progress(progress, tensors)
    with path.open("wb") as file:
        file.write(header)
        for kind in _ORDER:
            if kind.startswith("freq_"):
                file.write(_frequencies(config)[kind].tobytes())
                continue
            for layer in range(config.num_layers if "{l}" in kind else 1):
                if tensor := tensors.get(name := kind.format(l=layer)):
                    array = tensor.read().astype("<f4", copy=False)
                    file.write(raw_bytes(array))
                    written(name)


def _frequencies(config: LlamaConfig) -> dict[str, np.ndarray]:
    """Return the rotary tables, which run.c skips.

    Those of its exporter differ in the last bit.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32)
    power = _THETA ** (exponent / np.float32(config.head_dim)).astype(np.float64)
    frequency = np.float32(1) / power.astype(np.float32)
    angles = np.outer(np.arange(config.max_seq_len, dtype=np.float32), frequency)
    exact = angles.astype(np.float64)
    return {
        "freq_cis_real": np.cos(exact).astype("<f4"),
        "freq_cis_imag": np.sin(exact).astype("<f4"),
    }


def _config_from_header(header: tuple[int, ...]) -> LlamaConfig:
    dim, mlp_dim, layers, heads, kv_heads, vocab_size, seq_len = header
    return LlamaConfig(
        vocab_size=abs(vocab_size),
        num_layers=layers,
        embed_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=default_head_dim(dim, heads, "dim", "n_heads"),
        mlp_dim=mlp_dim,
        max_seq_len=seq_len,
        rope_theta=_THETA,
        rope_scaling=None,
        norm_eps=_EPS,
        tied_embeddings=vocab_size > 0,
        head="lm",
    )


def _count_numbers(config: LlamaConfig) -> int:
    """Return how many numbers a file with this configuration contains."""
    sizes = pattern_sizes(config)
    total = sum(math.prod(axes_shape(axes, sizes)) for _, axes in LLAMA2C.dropped)
    for rule in LLAMA2C.rules:
        if rule.row == "lm_head" and config.tied_embeddings:
            continue
        shape = axes_shape(rule.pattern.split(" -> ")[0], sizes)
        total += math.prod(shape) * (
            config.num_layers if "{l}" in rule.foreign_name else 1
        )
    return total
