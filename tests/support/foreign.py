"""Foreign checkpoints for tests, and the weights that they must convert to.

Independent of `llama_jax.conversion`: the mapping is written out again, index by index,
so that the two can disagree.
"""

import json
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.text.tokenizer import Tokenizer

TINY = LlamaConfig(
    vocab_size=272,
    num_layers=2,
    embed_dim=32,
    num_heads=8,
    num_kv_heads=8,
    head_dim=4,
    mlp_dim=96,
    max_seq_len=64,
    rope_theta=1e4,
    rope_scaling=None,
    norm_eps=1e-5,
    tied_embeddings=False,
    head="lm",
)
_WIDE = TINY.replace(embed_dim=64, head_dim=8)
_YARN = RopeScaling(
    kind="yarn",
    factor=4.0,
    original_max_seq_len=32,
    attention_factor=1.2,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=True,
)
_LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_seq_len=32,
)
EVERY_KIND = {
    "multi-head": _WIDE,
    "grouped and tied": _WIDE.replace(num_kv_heads=2, tied_embeddings=True),
    "wide heads": _WIDE.replace(head_dim=12),
    "llama 3": _WIDE.replace(rope_theta=5e5, rope_scaling=_LLAMA3, num_kv_heads=4),
    "linear": _WIDE.replace(rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "yarn": _WIDE.replace(rope_scaling=_YARN, head_dim=16, max_seq_len=128),
}
"""Every kind of model that other programs support too."""
every_kind = pytest.mark.parametrize("config", EVERY_KIND.values(), ids=EVERY_KIND)
STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float64): "DoubleStorage",
}
ROWS_SPLIT = ("wq", "wk", "wv", "w1", "w3", "output")
COLUMNS_SPLIT = ("wo", "w2", "tok_embeddings")


def meta_tensors(
    config: LlamaConfig, *, seed: int = 0, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Return random weights under Meta's names, not split."""
    rng = np.random.default_rng(seed)
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    NH = config.num_heads * config.head_dim
    KH = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (V, D)}
    for layer in range(config.num_layers):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (NH, D),
            f"layers.{layer}.attention.wk.weight": (KH, D),
            f"layers.{layer}.attention.wv.weight": (KH, D),
            f"layers.{layer}.attention.wo.weight": (D, NH),
            f"layers.{layer}.feed_forward.w1.weight": (F, D),
            f"layers.{layer}.feed_forward.w2.weight": (D, F),
            f"layers.{layer}.feed_forward.w3.weight": (F, D),
            f"layers.{layer}.attention_norm.weight": (D,),
            f"layers.{layer}.ffn_norm.weight": (D,),
        }
    shapes |= {"norm.weight": (D,), "output.weight": (V, D)}
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in shapes.items()
    }


def ours_from_meta(
    config: LlamaConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the weights of `meta_tensors` under our paths."""
    ours = {
        "transformer/embedding": tensors["tok_embeddings.weight"],
        "transformer/final_norm/scale": tensors["norm.weight"],
    }
    if "output.weight" in tensors:
        ours["lm_head"] = tensors["output.weight"].T
    for layer in range(config.num_layers):
        old, new = f"layers.{layer}.", f"transformer/layers/{layer}/"
        for heads, name, path in (
            (config.num_heads, "wq", "q_proj"),
            (config.num_kv_heads, "wk", "k_proj"),
        ):
            weight = tensors[f"{old}attention.{name}.weight"]
            half_split = np.empty((weight.shape[1], weight.shape[0]), weight.dtype)
            H = config.head_dim
            for head in range(heads):
                for pair in range(H // 2):
                    for side in range(2):
                        row = weight[head * H + 2 * pair + side]
                        half_split[:, head * H + side * (H // 2) + pair] = row
            ours[f"{new}attention/{path}"] = half_split
        for name, path in (
            ("attention.wv", "attention/v_proj"),
            ("attention.wo", "attention/o_proj"),
            ("feed_forward.w1", "mlp/gate_proj"),
            ("feed_forward.w3", "mlp/up_proj"),
            ("feed_forward.w2", "mlp/down_proj"),
        ):
            ours[new + path] = tensors[f"{old}{name}.weight"].T
        ours[f"{new}attention_norm/scale"] = tensors[f"{old}attention_norm.weight"]
        ours[f"{new}mlp_norm/scale"] = tensors[f"{old}ffn_norm.weight"]
    return ours


def meta_params(config: LlamaConfig, **changes: Any) -> dict[str, Any]:
    """Return a `params.json`; F must be at least 8/3 D, as in Meta's rule."""
    assert config.mlp_dim >= 8 * config.embed_dim // 3
    params = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "multiple_of": config.mlp_dim,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": -1,
    }
    return params | changes


def write_meta(
    folder: pathlib.Path,
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    ranks: int = 1,
    embedding_axis: int = 1,
    params: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Write a folder of Meta's, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        part = {}
        for name, array in tensors.items():
            kind = name.split(".")[-2]
            axis = 0 if kind in ROWS_SPLIT else 1 if kind in COLUMNS_SPLIT else None
            if kind == "tok_embeddings":
                axis = embedding_axis
            part[name] = (
                array if axis is None else np.split(array, ranks, axis=axis)[rank]
            )
        write_pth(folder / f"consolidated.{rank:02}.pth", part)
    fields = meta_params(config) if params is None else dict(params)
    (folder / "params.json").write_text(json.dumps(fields))
    return folder


def write_pth(
    path: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    *,
    pickled: bytes | None = None,
    entries: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write a state dict as `torch.save` does."""
    files = {"data.pkl": pickled or state_dict_pickle(tensors), "byteorder": b"little"}
    files |= {
        f"data/{key}": np.ascontiguousarray(array).tobytes()
        for key, array in enumerate(tensors.values())
    }
    files |= {"version": b"3\n"} | dict(entries or {})
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)


def write_legacy_pth(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a state dict as PyTorch before 1.6 did."""
    machine = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"int": 4},
    }
    content = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    content += pickle.dumps(machine, 2) + state_dict_pickle(tensors, legacy=True)
    content += pickle.dumps([str(key) for key in range(len(tensors))], 2)
    for array in tensors.values():
        content += struct.pack("<q", array.size) + np.ascontiguousarray(array).tobytes()
    path.write_bytes(content)


def state_dict_pickle(
    tensors: Mapping[str, np.ndarray], *, legacy: bool = False
) -> bytes:
    """Return the pickle of a dict of contiguous tensors, one storage each."""
    out = b"\x80\x02}("
    for key, (name, array) in enumerate(tensors.items()):
        out += text(name) + tensor(
            STORAGES[array.dtype], str(key), array.size, 0, array.shape, legacy=legacy
        )
    return out + b"u."


def tensor(
    storage: str,
    key: str,
    numbers: int,
    offset: int,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    *,
    legacy: bool = False,
) -> bytes:
    """Return the opcodes of one tensor."""
    if strides is None:
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    storage_id = (
        b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key)
        + text("cpu") + integer(numbers) + (b"NtQ" if legacy else b"tQ")
    )  # fmt: skip
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage_id + integer(offset)
        + b"(" + b"".join(map(integer, shape)) + b"t"
        + b"(" + b"".join(map(integer, strides)) + b"t"
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def text(value: str) -> bytes:
    """Return a BINUNICODE opcode."""
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def integer(value: int) -> bytes:
    """Return a BININT opcode, or LONG1 for large integers."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


LLAMA2C_ORDER = (
    "tok_embeddings.weight", "layers.{}.attention_norm.weight",
    "layers.{}.attention.wq.weight", "layers.{}.attention.wk.weight",
    "layers.{}.attention.wv.weight", "layers.{}.attention.wo.weight",
    "layers.{}.ffn_norm.weight", "layers.{}.feed_forward.w1.weight",
    "layers.{}.feed_forward.w2.weight", "layers.{}.feed_forward.w3.weight",
    "norm.weight",
)  # fmt: skip


def write_llama2c(
    path: pathlib.Path, config: LlamaConfig, tensors: Mapping[str, np.ndarray]
) -> pathlib.Path:
    """Write a llama2.c checkpoint (legacy export) of weights under Meta's names."""
    vocab_size = config.vocab_size if config.tied_embeddings else -config.vocab_size
    with path.open("wb") as file:
        D, F, L = config.embed_dim, config.mlp_dim, config.num_layers
        heads = config.num_heads, config.num_kv_heads
        file.write(struct.pack("<7i", D, F, L, *heads, vocab_size, config.max_seq_len))
        for name in LLAMA2C_ORDER:
            for layer in range(config.num_layers if "{}" in name else 1):
                file.write(tensors[name.format(layer)].astype("<f4").tobytes())
        tables = 2 * config.max_seq_len * (config.head_dim // 2)
        file.write(np.full(tables, 7.0, "<f4").tobytes())
        if not config.tied_embeddings:
            file.write(tensors["output.weight"].astype("<f4").tobytes())
    return path


def write_llama2c_tokenizer(path: pathlib.Path, pieces: int = 272) -> pathlib.Path:
    """Write a llama2.c tokenizer of special pieces, all bytes, and some letters."""
    letters = [" ", "e", "t", "a", " t", "he", " the", "o", "n", "in", "an", "h", "i"]
    all_pieces = ["<unk>", "\n<s>\n", "\n</s>\n"]
    all_pieces += [f"<0x{byte:02X}>" for byte in range(256)] + letters
    all_pieces += [chr(0x4E00 + i) for i in range(pieces - len(all_pieces))]
    encoded = [piece.encode() for piece in all_pieces[:pieces]]
    content = struct.pack("<i", max(map(len, encoded)))
    for id, piece in enumerate(encoded):
        content += struct.pack("<fi", -float(id), len(piece)) + piece
    path.write_bytes(content)
    return path


def tiny_tokenizer(folder: pathlib.Path, pieces: int = 272) -> Tokenizer:
    """Return the tokenizer of `write_llama2c_tokenizer`; leaves no file."""
    packed = write_llama2c_tokenizer(folder / "packed.bin", pieces)
    tokenizer = Tokenizer(read_llama2c_tokenizer(packed))
    packed.unlink()
    return tokenizer


def write_tokenizer_model(folder: pathlib.Path, pieces: int = 272) -> pathlib.Path:
    """Write the same tokenizer as a `tokenizer.model`."""
    file = folder / "tokenizer.model"
    file.write_bytes(tiny_tokenizer(folder, pieces).contents)
    return file
