"""llama2.c's files: `.bin` checkpoints (legacy export) and `tokenizer.bin`."""

import math
import pathlib
import re
import struct

import numpy as np

from llama_jax.checkpoint import naming
from llama_jax.config import LlamaConfig
from llama_jax.conversion.patterns import axes_shape
from llama_jax.conversion.rules import LLAMA2C, pattern_sizes, source_shapes
from llama_jax.conversion.source import Source
from llama_jax.errors import CheckpointError, ConfigError, TokenizerError
from llama_jax.leaves import LazyLeaf

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
    with naming(path):
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
    return Source(path, LLAMA2C, config, context, tensors)


def tokenizer_model(path: pathlib.Path) -> bytes:
    """A llama2.c `tokenizer.bin` as the SentencePiece model it was made from.

    The file has the pieces in the order of their ids with their scores; what it lacks
    is the same for all Llama tokenizers: BPE, byte fallback, a dummy prefix, no
    normalization.

    Raises:
      TokenizerError: the file is damaged or of another kind.
    """
    data = path.read_bytes()
    pieces, offset = [], 4
    longest = int.from_bytes(data[:4], "little")
    while offset + 8 <= len(data):
        score, size = struct.unpack_from("<fi", data, offset)
        text = data[offset + 8 : offset + 8 + size]
        if not 0 < size <= longest or len(text) < size or not math.isfinite(score):
            break
        pieces.append((text, score))
        offset += 8 + size
    # The special pieces lie between newlines there.
    special = [text.strip(b"\n") for text, _ in pieces[:3]]
    if offset != len(data) or special != [b"<unk>", b"<s>", b"</s>"]:
        raise TokenizerError(
            f"{path}: is not a llama2.c tokenizer, or damaged at byte {offset}; "
            "download it again"
        )
    return b"".join(
        [
            _field(1, _piece(special[0], 0.0, _UNKNOWN)),
            *(_field(1, _piece(text, 0.0, _CONTROL)) for text in special[1:]),
            *(_field(1, _piece(*piece)) for piece in pieces[3:]),
            _field(2, _trainer_spec(len(pieces))),
            _field(3, _NORMALIZER_SPEC),
        ]
    )


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
        norm_eps=_EPS,
        tied_embeddings=vocab_size > 0,
    )


def _count_numbers(config: LlamaConfig) -> int:
    """How many numbers a file of this configuration holds."""
    sizes = pattern_sizes(config)
    total = sum(math.prod(axes_shape(axes, sizes)) for _, axes in LLAMA2C.dropped)
    for rule in LLAMA2C.rules:
        if rule.target == "lm_head" and config.tied_embeddings:
            continue
        shape = axes_shape(rule.pattern.split(" -> ")[0], sizes)
        total += math.prod(shape) * (config.num_layers if "{l}" in rule.target else 1)
    return total


def _tensor(path: pathlib.Path, shape: tuple[int, ...], offset: int) -> LazyLeaf:
    def read() -> np.ndarray:
        return np.asarray(np.memmap(path, "<f4", "r", offset, shape))

    return LazyLeaf(shape, np.dtype(np.float32), read)


# SentencePiece's ModelProto, written by hand: field numbers and types as in its
# sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def _piece(text: bytes, score: float, kind: int = _NORMAL) -> bytes:
    """SentencePiece: 1 piece, 2 score, 3 type."""
    if kind == _NORMAL and re.fullmatch(rb"<0x[0-9A-F]{2}>", text):
        kind = _BYTE
    text = text.replace(b" ", "▁".encode())
    return _field(1, text) + b"\x15" + struct.pack("<f", score) + _number(3, kind)


def _trainer_spec(pieces: int) -> bytes:
    """3 model_type (2: BPE), 4 vocab_size, 35 byte_fallback, 40-43 special ids."""
    ids = _number(40, 0) + _number(41, 1) + _number(42, 2) + _number(43, -1)
    return _number(3, 2) + _number(4, pieces) + _number(35, 1) + ids


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


# 1 name, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces.
_NORMALIZER_SPEC = (
    _field(1, b"identity") + _number(3, 1) + _number(4, 0) + _number(5, 1)
)
