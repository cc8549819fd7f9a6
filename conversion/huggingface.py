"""Hugging Face folders: `config.json`, safetensors (or older `.bin`), a tokenizer."""

import pathlib
from collections.abc import Mapping

from llama_jax.checkpoint.json_files import config_errors_in, read_json, write_json
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.conversion.huggingface_config import (
    config_from_hugging_face,
    config_to_hugging_face,
)
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
from llama_jax.conversion.tokenizer_files import (
    read_hugging_face_tokenizer,
    write_hugging_face_tokenizer,
)

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
    return Source(
        path=path,
        format=HUGGING_FACE,
        config=config,
        max_seq_len_origin=origin,
        tensors=read_weights(path, config),
        find_tokenizer=lambda: read_hugging_face_tokenizer(path, config.vocab_size),
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
    special_ids = {}
    if model.tokenizer is not None:
        ids = {"bos": model.tokenizer.bos_id, "eos": model.tokenizer.eos_id}
        special_ids = {name: id for name, id in ids.items() if id >= 0}
        write_hugging_face_tokenizer(folder, model.tokenizer, model.config.max_seq_len)
        generation = {f"{name}_token_id": id for name, id in special_ids.items()}
        write_json(folder / "generation_config.json", generation)
    dtype = tensors[_EMBEDDING].dtype
    fields = config_to_hugging_face(model.config, dtype, special_ids)
    write_json(folder / _CONFIG, fields)


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
