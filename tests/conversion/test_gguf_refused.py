"""GGUF files that are refused: other models, damaged files, malicious ones."""

import pathlib
import random
import struct
import sys
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from support.foreign_gguf import (
    GQA,
    LLAMA31,
    gguf,
    make,
    metadata,
    renamed,
    write,
    write_foreign,
)
from support.type_checks import without_type_checks

from llama_jax.checkpoint.lazy_leaf import lazy_leaves
from llama_jax.conversion.gguf import is_gguf, read_gguf, write_gguf
from llama_jax.conversion.source import LazyModel
from llama_jax.errors import CheckpointError, ConfigError, LlamaJaxError, TokenizerError
from llama_jax.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "expert_count is 8, but only 0 is supported"),
        (
            {"llama.rope.scaling.type": "longrope"},
            "scaling.type is 'longrope'; supported are the types none",
        ),
        ({"llama.rope.scaling.yarn_beta_fast": 8.0}, "yarn_beta_fast is 8.0, but only"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "ext_factor is 0.5, but only"),
        (
            {"llama.rope.scaling.type": "yarn", "tensors.rope_freqs.weight": 2},
            "not the factors of a published Llama 3",
        ),
        ({"llama.rope.scaling.factor": -2.0}, "rope_scaling factor is -2.0"),
        ({"llama.rope.scaling.attn_factor": 0.5}, "attn_factor is 0.5, but only 1.0"),
        ({"llama.rope.dimension_count": 2}, "dimension_count is 2, but only 4"),
        ({"llama.attention.value_length": 8}, "value_length is 8, but only 4"),
        ({"llama.attention.causal": False}, "causal is False, but only True"),
        (
            {"llama.attention.sliding_window": 8},
            r"unknown fields llama.\S*sliding_window",
        ),
        ({"llama.logit_scale": 0.5}, "logit_scale is 0.5, but only 1.0"),
        ({"llama.final_logit_softcapping": 30.0}, r"unknown fields llama.final_logit"),
        ({"llama.feed_forward_length": [96, 96]}, "must be a positive integer"),
        ({"llama.block_count": 0}, "block_count is 0; it must be a positive integer"),
        ({"llama.block_count": 2**31 - 1}, "only 21 tensors"),
        ({"llama.context_length": True}, "context_length is True; it must"),
        ({"llama.attention.head_count": 5}, "not a multiple of head_count 5"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple of num_kv_heads 3"),
        ({"llama.vocab_size": 9}, "vocab_size is 9, but"),
        ({"llama.rope.freq_base": "1e4"}, "freq_base is '1e4'; it must be a number"),
        ({"llama.context_length": None}, "missing fields llama.context_length"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"general.alignment": 32}, "general.alignment is not of the type uint32"),
        ({"general.alignment": "x"}, "general.alignment is not of the type uint32"),
        ({"tensors.blk.0.attn_q.bias": 32}, "are not part of a GGUF"),
        ({"tensors.rope_freqs.weight": 2}, "not the factors of a published Llama 3"),
        ({"tensors.rope_freqs.weight": 3}, "the shape .3. instead of .2."),
    ],
)
def test_unsupported_models_are_refused(
    tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    fields, tensors = metadata(GQA), renamed(make(GQA)[0])
    for key, value in changes.items():
        if key.startswith("tensors."):
            tensors[key.removeprefix("tensors.")] = np.full(value, 3.0, np.float32)
        elif value is None:
            del fields[key]
        else:
            fields[key] = value
    path = write_foreign(tmp_path / "x.gguf", fields, tensors)
    with pytest.raises(LlamaJaxError, match=message) as error:
        read_gguf(path).leaves()
    assert str(path) in str(error.value)


def test_another_architecture_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    tensors = renamed(make(GQA)[0])
    path = write_foreign(tmp_path / "x", metadata(GQA), tensors, architecture="qwen2")
    with pytest.raises(ConfigError, match="'qwen2', but only 'llama'"):
        read_gguf(path)
    big = {"endianess": gguf.GGUFEndian.BIG}
    path = write_foreign(tmp_path / "y", metadata(GQA), tensors, **big)
    with pytest.raises(CheckpointError, match="for big-endian machines"):
        read_gguf(path)


def test_gguf_files_are_recognized_by_their_content(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "model.bin", GQA)
    (tmp_path / "other.bin").write_bytes(b"GGU")
    (tmp_path / "other.gguf").write_bytes(b"")
    assert is_gguf(tmp_path / "model.bin")
    assert is_gguf(tmp_path / "other.gguf")
    assert not is_gguf(tmp_path / "other.bin")
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "absent.gguf")


def test_without_gguf_only_quantized_files_are_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "q.gguf", GQA, dtype="q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    write(tmp_path / "f.gguf", GQA, dtype="float16")
    assert read_gguf(tmp_path / "f.gguf").config == GQA
    for refused in (
        lambda: read_gguf(tmp_path / "q.gguf"),
        lambda: write(tmp_path / "r.gguf", GQA, dtype="q8_0"),
    ):
        with pytest.raises(CheckpointError, match=r'pip install "llama-jax\[gguf\]"'):
            refused()


def test_models_that_gguf_cannot_store_are_refused(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
) -> None:
    path = tmp_path / "x.gguf"
    message = "'q4_0' is unknown to GGUF; choose from float32"
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        write(path, GQA, dtype="q4_0")
    with pytest.raises(TokenizerError, match="do not fit a model with vocab_size 270"):
        write(path, GQA.replace(vocab_size=270), tokenizer=tiny_tokenizer)
    for dtype, number in (("float16", 7e4), ("q8_0", 1e7)):
        ours = {name: array * number for name, array in make(GQA)[1].items()}
        with pytest.raises(CheckpointError, match="does not fit into float16"):
            write_gguf(path, LazyModel(GQA, lazy_leaves(ours), None), dtype=dtype)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


LLAMA = text("general.architecture") + struct.pack("<I", 8) + text("llama")
ALIGNMENT = text("general.alignment") + struct.pack("<I", 4)
HUGE = (1 << 64) - 1


def container(
    *tensors: bytes, entries: bytes = LLAMA, counts: Any = None, data: int = 128
) -> bytes:
    """Return a file of hand-made tensor descriptions, with some bytes of data."""
    numbers = counts or (len(tensors), entries.count(b"general.") or 1)
    head = b"GGUF" + struct.pack("<IQQ", 3, *numbers) + entries + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data)


MALICIOUS = {
    "empty": (b"", "is empty"),
    "short": (b"GGUF\3\0", "is not a GGUF file"),
    "zip": (b"PK\3\4" + b"\0" * 40, "is a file of PyTorch"),
    "version 1": (b"GGUF\1\0\0\0" + b"\0" * 40, "is GGUF version 1"),
    "version 4": (b"GGUF\4\0\0\0" + b"\0" * 40, "is GGUF version 4"),
    "no counts": (b"GGUF\3\0\0\0", "its header is incomplete"),
    "many tensors": (container(counts=(HUGE, 1)), "would have 18,446,7"),
    "many entries": (container(counts=(0, 1 << 40)), "1,099,511,627,776 entries"),
    "some tensors": (container(counts=(9, 1)), "the name of a tensor would have 0"),
    "long name": (
        container(entries=struct.pack("<Q", 1 << 50), counts=(0, 1)),
        "the name of a metadata entry would have",
    ),
    "no text": (
        container(entries=struct.pack("<Q", 2) + b"\xff\xfe"),
        "the name of a metadata entry is not UTF-8",
    ),
    "long value": (
        container(entries=text("a") + struct.pack("<IQ", 8, HUGE)),
        "its header is incomplete",
    ),
    "long array": (
        container(entries=text("a") + struct.pack("<IIQ", 9, 12, HUGE)),
        "its header is incomplete",
    ),
    "array of many texts": (
        container(entries=text("a") + struct.pack("<IIQ", 9, 8, 1 << 60)),
        "a would have 1,152,921,504,606,846,976 strings",
    ),
    "nested arrays": (
        container(entries=text("a") + struct.pack("<IIQ", 9, 9, 1) * 1000),
        "a is of the unknown type 9",
    ),
    "unknown type": (
        container(entries=text("a") + struct.pack("<I", 77)),
        "a is of the unknown type 77",
    ),
    "an entry twice": (container(entries=LLAMA * 2), "architecture occurs twice"),
    "a tensor twice": (container(tensor("a", 4), tensor("a", 4)), "a occurs twice"),
    "no axes": (container(tensor("a")), "a has 0 axes"),
    "many axes": (container(tensor("a", 1, 1, 1, 1, 1)), "a has 5 axes"),
    "an empty axis": (container(tensor("a", 4, 0)), "impossible shape"),
    "too large a product": (
        container(tensor("a", 1 << 32, 1 << 32, 1 << 32)),
        "impossible shape",
    ),
    "too large": (container(tensor("a", 1 << 40)), "a ends at"),
    "large by one": (container(tensor("a", 33)), "a ends at"),
    "past the end": (
        container(tensor("a", 1, offset=128)),
        "would begin at byte 128",
    ),
    "far past the end": (
        container(tensor("a", 1, offset=HUGE - 31)),
        "would begin at",
    ),
    "unaligned offset": (container(tensor("a", 1, offset=4)), "would begin at byte 4"),
    "overlapping": (
        container(tensor("a", 9), tensor("b", 8, offset=32)),
        "b begins within a",
    ),
    "the same offset": (container(tensor("a", 9), tensor("b", 9)), "b begins within a"),
    "alignment 24": (container(entries=ALIGNMENT + b"\x18\0\0\0"), "alignment is 24"),
    "alignment 0": (container(entries=ALIGNMENT + b"\0\0\0\0"), "alignment is 0"),
    "large alignment": (
        container(tensor("a", 1), entries=ALIGNMENT + b"\0\0\0\x80"),
        "a would begin at byte 0",
    ),
    "unknown tensor type": (container(tensor("a", 32, kind=99)), "of the type 99"),
    "removed tensor type": (container(tensor("a", 32, kind=4)), "of the type 4"),
    "half a block": (container(tensor("a", 31, kind=8)), "blocks of 32"),
    "nothing": (container(), "missing fields llama.block_count"),
    "no architecture": (container(entries=b"", counts=(0, 0)), "architecture is None"),
}


@pytest.mark.parametrize("what", MALICIOUS)
def test_malicious_files_are_refused_at_once(tmp_path: pathlib.Path, what: str) -> None:
    data, message = MALICIOUS[what]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(LlamaJaxError, match=message) as error, without_type_checks():
        read_gguf(path)
    seconds = time.monotonic() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value)
    # The first quantized tensor imports gguf, which takes a moment and some memory.
    assert seconds < 5
    assert peak < 1 << 20 or "type" in what


def test_every_truncated_file_is_refused(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
) -> None:
    path = tmp_path / "x.gguf"
    write(path, GQA, dtype="bfloat16", tokenizer=tiny_tokenizer)
    whole = path.read_bytes()
    for size in [*range(0, 400), *range(400, len(whole), 611)]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_mutated_files_are_refused_or_read(
    tmp_path: pathlib.Path, tiny_tokenizer: Tokenizer
) -> None:
    config = GQA.replace(num_layers=1, rope_scaling=LLAMA31)
    path = tmp_path / "x.gguf"
    write(path, config, dtype="q8_0", tokenizer=tiny_tokenizer)
    whole = path.read_bytes()
    # The tokens are most of the header; the damage is done around them.
    tokens = whole.index(b"tokenizer.ggml.tokens")
    types = whole.index(b"tokenizer.ggml.add_space_prefix")
    end = whole.index(b"output.weight") + 48
    rng = random.Random(0)
    refused, longest_message, slowest = 0, 0, 0.0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 4))):
            low, high = rng.choice(((4, tokens), (tokens, types), (types, end)))
            at = rng.randrange(low, high)
            choice = rng.randrange(4)
            if choice == 0:
                data[at] = rng.choice((0, 1, 9, 127, 128, 255))
            elif choice == 1:
                data[at] ^= 1 << rng.randrange(8)
            elif choice == 2:
                number = rng.choice((0, 1, 1 << 31, 1 << 32, 1 << 62, HUGE))
                data[at : at + 8] = number.to_bytes(8, "little")
            else:
                data[at : at + rng.randrange(1, 40)] = b""
        path.write_bytes(data)
        start = time.monotonic()
        try:
            source = read_gguf(path)
            for name, leaf in source.leaves().items():
                array = leaf.read()
                assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype), name
            tokenizer, _ = source.find_tokenizer()
            ids = tokenizer.encode("the tea", bos=True, eos=True)
            assert tokenizer.decode(ids) == "the tea" or data[tokens:] != whole[tokens:]
        except LlamaJaxError as error:
            longest_message = max(longest_message, len(str(error)))
            refused += 1
        slowest = max(slowest, time.monotonic() - start)
    assert 150 < refused < 300
    assert longest_message < 1000
    assert slowest < 2
