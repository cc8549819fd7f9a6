"""llama2.c's `.bin` checkpoints (the legacy export)."""

import math
import pathlib
import struct

import numpy as np

from llama_jax.checkpoint.json_files import config_errors_in
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress, raw_bytes
from llama_jax.config import LlamaConfig
from llama_jax.conversion.axis_patterns import axes_shape
from llama_jax.conversion.source import Export, Source, counted
from llama_jax.conversion.tensor_mapping import export, pattern_sizes, source_shapes
from llama_jax.conversion.tensor_tables import LLAMA2C
from llama_jax.conversion.tokenizer_files import find_tokenizer
from llama_jax.errors import CheckpointError, ConfigError

_HEADER = struct.Struct("<7i")
_VERSIONED = 0x616B3432  # the magic number of the later export formats
# Kind after kind, each for all layers; the last only where embeddings are not tied.
_ORDER = (
    "token_embedding", "rms_att.{l}", "wq.{l}", "wk.{l}", "wv.{l}", "wo.{l}",
    "rms_ffn.{l}", "w1.{l}", "w2.{l}", "w3.{l}", "rms_final",
    "freq_cis_real", "freq_cis_imag", "wcls",
)  # fmt: skip
# run.c has both numbers in its code; the file holds neither.
_THETA, _EPS = 1e4, 1e-5


def read_llama2c(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open a `.bin` checkpoint; no weights are read.

    Args:
      path: the file.
      max_seq_len: longest sequence, in place of the file's own.

    Raises:
      CheckpointError: it is damaged or of another kind.
      ConfigError: its header describes no model.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if head[:4] in (b"PK\x03\x04", b"GGUF"):
        raise CheckpointError(
            f"{path}: is not a llama2.c checkpoint but a "
            + ("PyTorch" if head[:2] == b"PK" else "GGUF")
            + " file; give the folder that it lies in, or a file of llama2.c"
        )
    if len(head) < _HEADER.size:
        raise CheckpointError(f"{path}: is too short; download it again")
    header = _HEADER.unpack(head)
    if header[0] == _VERSIONED:
        raise CheckpointError(
            f"{path}: was exported with version {header[1]} of llama2.c's format; "
            "export it again with --version 0"
        )
    with config_errors_in(path):
        config = _config_from_header(header)
        sizes = pattern_sizes(config)
        # Before anything is listed, since a damaged header may claim 2³¹ layers.
        numbers = _count_numbers(config)
        if size != _HEADER.size + 4 * numbers:
            raise CheckpointError(
                f"{path}: has {size:,} bytes, but its header describes a model of "
                f"{_HEADER.size + 4 * numbers:,}; it is incomplete or damaged, or no "
                "llama2.c checkpoint"
            )
        shapes = source_shapes(LLAMA2C, config)
        shapes |= {name: axes_shape(axes, sizes) for name, axes in LLAMA2C.dropped}
        tensors, offset = {}, _HEADER.size
        for kind in _ORDER:
            for layer in range(config.num_layers if "{l}" in kind else 1):
                if shape := shapes.get(name := kind.format(l=layer)):
                    tensors[name] = _tensor(path, shape, offset)
                    offset += tensors[name].nbytes
        context = "from the file's header"
        if max_seq_len is not None:
            # The tables that are dropped keep the length that the file gives them.
            tensors = {n: t for n, t in tensors.items() if not n.startswith("freq_")}
            config = config.replace(max_seq_len=max_seq_len)
            context = "as given"
    return Source(
        path=path,
        form=LLAMA2C,
        config=config,
        context=context,
        tensors=tensors,
        find_tokenizer=lambda: find_tokenizer(path),
    )


def is_llama2c(path: pathlib.Path) -> bool:
    """Whether this is a file that may be one of llama2.c's."""
    return path.is_file() and path.suffix == ".bin"


def check_config(config: LlamaConfig) -> None:
    """Raise a `ConfigError` if the format cannot say what a model is."""
    fixed = {
        "rope_theta": _THETA,
        "norm_eps": _EPS,
        "rope_scaling": None,
        "head_dim": config.embed_dim // config.num_heads,
    }
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"llama2.c's format cannot say that {name} is "
                f"{getattr(config, name)!r}: its programs take it to be {value!r}"
            )


def write_llama2c(
    path: pathlib.Path, model: Export, *, progress: Progress | None = None
) -> None:
    """Write a `.bin` in float32, one tensor in memory at a time.

    Raises:
      ConfigError: the format cannot say what the model is.
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
    tensors = export(LLAMA2C, model.leaves, config)
    done = counted(progress, tensors)
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
                    done(name)


def _frequencies(config: LlamaConfig) -> dict[str, np.ndarray]:
    """The rotary tables that run.c skips; its exporter's differ in the last bit."""
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
    if heads <= 0 or dim % heads:
        raise ConfigError(f"dim {dim} is not a multiple of n_heads {heads}")
    return LlamaConfig(
        vocab_size=abs(vocab_size),
        num_layers=layers,
        embed_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim // heads,
        mlp_dim=mlp_dim,
        max_seq_len=seq_len,
        rope_theta=_THETA,
        rope_scaling=None,
        norm_eps=_EPS,
        tied_embeddings=vocab_size > 0,
        head="lm",
    )


def _count_numbers(config: LlamaConfig) -> int:
    """How many numbers a file of this configuration holds."""
    sizes = pattern_sizes(config)
    total = sum(math.prod(axes_shape(axes, sizes)) for _, axes in LLAMA2C.dropped)
    for rule in LLAMA2C.rules:
        if rule.target == "lm_head" and config.tied_embeddings:
            continue
        shape = axes_shape(rule.pattern.split(" -> ")[0], sizes)
        total += math.prod(shape) * (config.num_layers if "{l}" in rule.source else 1)
    return total


def _tensor(path: pathlib.Path, shape: tuple[int, ...], offset: int) -> LazyLeaf:
    def read() -> np.ndarray:
        return np.asarray(np.memmap(path, "<f4", "r", offset, shape))

    return LazyLeaf(shape, np.dtype(np.float32), read)
