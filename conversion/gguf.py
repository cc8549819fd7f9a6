"""GGUF files of llama.cpp: weights, configuration and tokenizer in one file."""

import functools
import pathlib
from typing import get_args

from llama_jax.checkpoint.json_files import config_errors_in
from llama_jax.checkpoint.lazy_leaf import Progress, lazy_leaf, raw_bytes
from llama_jax.conversion.gguf_config import (
    check_keys,
    config_from_metadata,
    metadata_from_config,
)
from llama_jax.conversion.gguf_header import (
    STRING,
    UINT32,
    MetadataValue,
    pack_header,
    padding,
    read_header,
)
from llama_jax.conversion.gguf_rope import ROPE_FACTORS, rope_factors
from llama_jax.conversion.gguf_tensors import (
    GGUFDtype,
    encoded_chunks,
    lazy_tensors,
    require_gguf,
    tensor_layout,
)
from llama_jax.conversion.gguf_text_settings import left_out_ends
from llama_jax.conversion.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from llama_jax.conversion.source import (
    LazyModel,
    Source,
    override_max_seq_len,
    tensor_progress,
)
from llama_jax.conversion.tensor_mapping import tensors_from_leaves
from llama_jax.conversion.tensor_tables import GGUF
from llama_jax.errors import ConfigError

# `general.file_type` in llama.cpp's numbers.
_FILE_TYPES: dict[GGUFDtype, int] = {
    "float32": 0,
    "float16": 1,
    "bfloat16": 32,
    "q8_0": 7,
}
_QUANTIZATION_VERSION = 2


def is_gguf(path: pathlib.Path) -> bool:
    """Return whether a path is a file that claims to be GGUF."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open a `.gguf` file without reading weights.

    Float tensors keep their dtype, quantized ones become float32.

    Args:
      path: the file.
      max_seq_len: replaces the file's own.

    Raises:
      CheckpointError: the file is damaged, or quantized in an unknown way.
      ConfigError: its configuration is not that of a supported model.
    """
    header = read_header(path)
    with config_errors_in(path):
        check_keys(header)
    tensors = lazy_tensors(header)
    with config_errors_in(path):
        config, origin = override_max_seq_len(
            config_from_metadata(header, tensors),
            max_seq_len,
            "from the file's metadata",
        )
    tokenizer = functools.cache(lambda: read_tokenizer(header))
    return Source(
        path=path,
        format=GGUF,
        config=config,
        max_seq_len_origin=origin,
        tensors=tensors,
        find_tokenizer=lambda: (tokenizer(), path),
        text_notes=lambda: left_out_ends(header, tokenizer()),
    )


def write_gguf(
    path: pathlib.Path,
    model: LazyModel,
    *,
    dtype: GGUFDtype,
    progress: Progress | None = None,
) -> None:
    """Write a file that llama.cpp loads, one tensor at a time.

    Norms are always float32. Matrices with rows that are not multiples of 32 are
    float16 instead of q8_0.

    Args:
      path: of the file.
      model: to write; without a tokenizer, the file has none either.
      dtype: of the matrices.
      progress: called with the bytes of the model that are written.

    Raises:
      CheckpointError: a weight does not fit into float16, or gguf is not installed.
      ConfigError: the dtype is unknown, or the tokenizer is not a SentencePiece model.
    """
    if dtype not in _FILE_TYPES:
        choices = ", ".join(get_args(GGUFDtype))
        raise ConfigError(f"dtype {dtype!r} is unknown to GGUF; choose from {choices}")
    if dtype == "q8_0":
        require_gguf(path, "is to be quantized")
    config = model.config
    metadata = {
        "general.architecture": MetadataValue(STRING, "llama"),
        "general.type": MetadataValue(STRING, "model"),
        # Before the suffix of a temporary file that is renamed when complete.
        "general.name": MetadataValue(
            STRING, path.name.partition(".gguf")[0] or "llama"
        ),
        "general.file_type": MetadataValue(UINT32, _FILE_TYPES[dtype]),
        "general.quantization_version": MetadataValue(UINT32, _QUANTIZATION_VERSION),
        **metadata_from_config(config),
        **tokenizer_metadata(model.tokenizer, config.vocab_size),
    }
    tensors = tensors_from_leaves(GGUF, model.leaves, config)
    written = tensor_progress(progress, tensors)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        factors = rope_factors(config)
        tensors = {ROPE_FACTORS: lazy_leaf(factors)} | tensors
    layouts = {name: tensor_layout(leaf.shape, dtype) for name, leaf in tensors.items()}
    with path.open("wb") as file:
        file.write(pack_header(metadata, layouts))
        for name, leaf in tensors.items():
            array = leaf.read()
            for chunk in encoded_chunks(array, layouts[name].kind, name):
                file.write(raw_bytes(chunk))
            file.write(padding(layouts[name].nbytes))
            del array, chunk  # before the next tensor is read
            if name != ROPE_FACTORS:
                written(name)
