"""Meta's folders: `params.json` and one `consolidated.NN.pth` per rank."""

import contextlib
import functools
import pathlib
import re

import numpy as np

from llama_jax.checkpoint.json_files import config_errors_in, read_json, write_json
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress, lazy_leaf
from llama_jax.config import LlamaConfig
from llama_jax.conversion.checksums import read_checklist
from llama_jax.conversion.meta_params import (
    check_ranks,
    config_from_params,
    params_from_config,
    published_max_seq_len,
)
from llama_jax.conversion.meta_tokenizer import meta_tokenizer
from llama_jax.conversion.pth_reader import read_pth
from llama_jax.conversion.pth_writer import PthWriter
from llama_jax.conversion.source import LazyModel, Source, tensor_progress
from llama_jax.conversion.tensor_mapping import (
    rule_of,
    source_shapes,
    tensors_from_leaves,
)
from llama_jax.conversion.tensor_tables import META
from llama_jax.conversion.tokenizer_files import find_tokenizer
from llama_jax.errors import CheckpointError
from llama_jax.types import JsonObject

_PARAMS, _TOKENIZER = "params.json", "tokenizer.model"
_EMBEDDING, _QUERY = "tok_embeddings.weight", "layers.0.attention.wq.weight"


def is_meta(path: pathlib.Path) -> bool:
    """Return whether a folder looks like a checkpoint of Meta's."""
    return (path / _PARAMS).is_file() or any(path.glob("consolidated.*.pth"))


def read_meta(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open a checkpoint folder of Meta's without reading weights.

    Args:
      path: the folder.
      max_seq_len: maximum sequence length, which Meta's files do not contain; defaults
        to that of the published model of the same sizes.

    Raises:
      CheckpointError: a file is missing or damaged, or the ranks do not fit together.
      ConfigError: `params.json` is not that of a supported model.
    """
    fields = read_json(path / _PARAMS)
    rank_files = _rank_files(path)
    ranks = [read_pth(file) for file in rank_files]
    if _EMBEDDING not in ranks[0] or ranks[0][_EMBEDDING].ndim != 2:
        raise CheckpointError(
            f"{path}: has no matrix {_EMBEDDING}; is it a Llama checkpoint of Meta's?"
        )
    _check_rank_count(path, ranks[0], fields, len(ranks))
    rows, columns = ranks[0][_EMBEDDING].shape
    with config_errors_in(path / _PARAMS):
        split_by_rows = columns == fields.get("dim")
        vocab_size = rows * len(ranks) if split_by_rows else rows
        config = config_from_params(fields, vocab_size, max_seq_len or 1)
    origin = "as given"
    if max_seq_len is None:
        published, origin = published_max_seq_len(config, path)
        config = config.replace(max_seq_len=published)
    return Source(
        path=path,
        format=META,
        config=config,
        max_seq_len_origin=origin,
        tensors=_join_ranks(path, ranks, config),
        find_tokenizer=lambda: find_tokenizer(path),
        checksums=read_checklist(path, [path / _PARAMS, *rank_files]),
        ranks=len(ranks),
    )


def _rank_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of all ranks, numbered from 00 without gaps."""
    files = {}
    for file in path.glob("consolidated.*.pth"):
        match = re.fullmatch(r"consolidated\.(\d\d)\.pth", file.name)
        if not match:
            raise CheckpointError(
                f"{file}: unexpected name of a weights file (Meta's are "
                "consolidated.00.pth, ...); remove or rename it"
            )
        files[int(match[1])] = file
    if not files:
        raise CheckpointError(
            f"{path}: has no consolidated.00.pth; download the weights too"
        )
    for rank in range(max(files)):
        if rank not in files:
            raise CheckpointError(
                f"{path}: consolidated.{rank:02}.pth is missing, but there is "
                f"consolidated.{max(files):02}.pth; download it too"
            )
    return [files[rank] for rank in sorted(files)]


def _check_rank_count(
    path: pathlib.Path,
    first: dict[str, np.ndarray],
    fields: JsonObject,
    count: int,
) -> None:
    """Raise a `CheckpointError` if the first rank's shapes show another count."""
    dim, query = fields.get("dim"), first.get(_QUERY)
    if query is None or query.ndim != 2 or query.shape[1] != dim or dim % len(query):
        return  # to be refused for another reason
    expected = dim // len(query)
    if expected > count:
        first_missing = f"consolidated.{count:02}.pth"
        others = f" to {expected - 1:02}" if expected > count + 1 else ""
        raise CheckpointError(
            f"{path}: the model is split into {expected} files, but {first_missing}"
            f"{others} is missing; download all of them"
        )
    if expected < count:
        raise CheckpointError(
            f"{path}: the model is split into {expected} files, but there are {count}; "
            f"remove those from consolidated.{expected:02}.pth on"
        )


def _join_ranks(
    path: pathlib.Path, ranks: list[dict[str, np.ndarray]], config: LlamaConfig
) -> dict[str, LazyLeaf]:
    """Join every tensor along the axis that its shapes show to be split."""
    first = ranks[0]
    for number, rank in enumerate(ranks):
        for name in sorted(first.keys() ^ rank.keys()):
            raise CheckpointError(
                f"{path}: only one of ranks 0 and {number} has {name}; download all "
                "files again from one source"
            )
        for name, array in rank.items():
            if (array.shape, array.dtype) != (first[name].shape, first[name].dtype):
                raise CheckpointError(
                    f"{path}: ranks 0 and {number} differ in the shape or dtype of "
                    f"{name}; download all files again from one source"
                )
    shapes = {}
    if config.num_layers <= len(first):  # a damaged file may claim 2**31 layers
        shapes = source_shapes(META, config)
    return {
        name: _join(path, name, [rank[name] for rank in ranks], shapes.get(name))
        for name in first
    }


def _join(
    path: pathlib.Path,
    name: str,
    parts: list[np.ndarray],
    expected: tuple[int, ...] | None,
) -> LazyLeaf:
    shape, dtype = parts[0].shape, parts[0].dtype
    if len(parts) == 1 or expected is None:  # unknown tensors are refused later
        return lazy_leaf(parts[0])
    for axis in range(len(shape)):
        joined = (*shape[:axis], shape[axis] * len(parts), *shape[axis + 1 :])
        if joined == expected:
            leaf = LazyLeaf(
                expected, dtype, functools.partial(np.concatenate, parts, axis)
            )
            return leaf.with_host_bytes(leaf.nbytes)

    def read_replicated() -> np.ndarray:
        for rank, part in enumerate(parts):
            if not np.array_equal(part, parts[0]):
                raise CheckpointError(
                    f"{path}: {name} should be equal in all ranks, but 0 and {rank} "
                    "differ; download all files again from one source"
                )
        return parts[0]

    if shape == expected and len(shape) == 1:
        return LazyLeaf(shape, dtype, read_replicated)
    raise CheckpointError(
        f"{path}: {name} has the shape {list(shape)} in each of {len(parts)} ranks, "
        f"which does not join to {list(expected)} as params.json requires; download "
        "all ranks"
    )


def write_meta(
    folder: pathlib.Path,
    model: LazyModel,
    *,
    ranks: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write the files of a folder that Meta's code loads, one tensor at a time.

    Args:
      folder: an empty folder.
      model: to write.
      ranks: number of files, one for each model-parallel process.
      progress: called with the bytes of the model that are written.

    Raises:
      ConfigError: the format has no field for what the model needs, or `ranks` does
        not divide it.
      TokenizerError: the tokenizer has no form that Meta's code reads.
    """
    params = params_from_config(model.config)
    tokenizer = None
    if model.tokenizer is not None:
        tokenizer = meta_tokenizer(model.tokenizer, model.config.vocab_size)
    check_ranks(model.config, ranks)
    tensors = tensors_from_leaves(META, model.leaves, model.config)
    written = tensor_progress(progress, tensors)
    # All of Meta's files contain the frequencies; its later code ignores them.
    freqs = _rotary_frequencies(model.config).astype(tensors[_EMBEDDING].dtype)
    rank_tensors = {
        name: _without_data(name, leaf, ranks) for name, leaf in tensors.items()
    }
    rank_tensors["rope.freqs"] = lazy_leaf(freqs)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                PthWriter(folder / f"consolidated.{rank:02}.pth", rank_tensors)
            )
            for rank in range(ranks)
        ]
        for name, tensor in tensors.items():
            whole = tensor.read()
            axis = rule_of(META, name).rank_axis
            parts = [whole] * ranks if axis is None else np.split(whole, ranks, axis)
            for writer, part in zip(writers, parts, strict=True):
                writer.add(part)
            del whole, parts, part  # before the next tensor is read
            written(name)
        for writer in writers:
            writer.add(freqs)
    write_json(folder / _PARAMS, params)
    if tokenizer is not None:
        (folder / _TOKENIZER).write_bytes(tokenizer)


def _without_data(name: str, tensor: LazyLeaf, ranks: int) -> LazyLeaf:
    """Return the shape and dtype of one rank's part of a tensor."""
    shape = list(tensor.shape)
    if (axis := rule_of(META, name).rank_axis) is not None:
        shape[axis] //= ranks
    return LazyLeaf(tuple(shape), tensor.dtype, tensor.read)


def _rotary_frequencies(config: LlamaConfig) -> np.ndarray:
    """Return theta^(-2i/H) in the arithmetic of Meta's code, `[H / 2]` float32."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32)
    power = exponent / np.float32(config.head_dim)
    return np.float32(1) / np.float32(config.rope_theta) ** power
