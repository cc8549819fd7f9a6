"""Hugging Face folders: `config.json`, safetensors (or older `.bin`), a tokenizer."""

import functools
import pathlib
from collections.abc import Mapping

from llama_jax.checkpoint.json_files import config_errors_in, read_json, write_json
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.conversion.huggingface_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)
from llama_jax.conversion.huggingface_generation import (
    GENERATION,
    generation_fields,
    special_ids,
)
from llama_jax.conversion.huggingface_text import read_text
from llama_jax.conversion.huggingface_text_writer import write_text
from llama_jax.conversion.huggingface_weights import has_weights, read_weights
from llama_jax.conversion.safetensors import write_safetensors
from llama_jax.conversion.source import (
    LazyModel,
    Source,
    override_max_seq_len,
    tensor_progress,
)
from llama_jax.conversion.tensor_mapping import tensors_from_leaves
from llama_jax.conversion.tensor_tables import HUGGING_FACE

_CONFIG = "config.json"
_INDEX, _EMBEDDING = "model.safetensors.index.json", "model.embed_tokens.weight"
_SHARD_BYTES = 5_000_000_000  # limit of a file, unless one tensor is larger


def is_hugging_face(path: pathlib.Path) -> bool:
    """Return whether a folder looks like a checkpoint of Hugging Face's."""
    return (path / _CONFIG).is_file() and has_weights(path)


def read_hugging_face(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open a checkpoint folder of Hugging Face's without reading weights.

    Args:
      path: the folder.
      max_seq_len: replaces the checkpoint's own.

    Raises:
      CheckpointError: a file is missing or damaged.
      ConfigError: `config.json` is not that of a supported model.
    """
    file = path / _CONFIG
    fields = read_json(file)
    with config_errors_in(file):
        config, origin = override_max_seq_len(
            config_from_hugging_face(fields), max_seq_len, f"from {_CONFIG}"
        )
    text = functools.cache(lambda: read_text(path, config.vocab_size))
    return Source(
        path=path,
        format=HUGGING_FACE,
        config=config,
        max_seq_len_origin=origin,
        tensors=read_weights(path, config),
        find_tokenizer=lambda: (text().tokenizer, text().file),
        text_notes=lambda: text().notes,
    )


def write_hugging_face(
    folder: pathlib.Path,
    model: LazyModel,
    *,
    progress: Progress | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write the files of a folder that `transformers` loads, one tensor at a time.

    Args:
      folder: an empty folder.
      model: to write.
      progress: called with the bytes of the model that are written.
      shard_bytes: limit of each safetensors file.

    Raises:
      TokenizerError: the tokenizer has ids that `tokenizers` would number otherwise.
    """
    tensors = tensors_from_leaves(HUGGING_FACE, model.leaves, model.config)
    written = tensor_progress(progress, tensors)
    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard, written)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / _INDEX, index)
    ids: dict[str, int | list[int]] = {}
    if (tokenizer := model.tokenizer) is not None:
        ids = special_ids(tokenizer)
        write_text(folder, tokenizer, model.config.max_seq_len)
        write_json(folder / GENERATION, generation_fields(tokenizer))
    dtype = tensors[_EMBEDDING].dtype
    write_json(folder / _CONFIG, config_to_hugging_face(model.config, dtype, ids))


def _shards(
    tensors: Mapping[str, LazyLeaf], shard_bytes: int
) -> list[dict[str, LazyLeaf]]:
    """Distribute the tensors over files, in order, each file as full as possible."""
    shards: list[dict[str, LazyLeaf]] = [{}]
    free = shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > free and shards[-1]:
            shards.append({})
            free = shard_bytes
        shards[-1][name] = tensor
        free -= tensor.nbytes
    return shards
