"""Meta's folders: `params.json` and one `consolidated.NN.pth` per rank."""

import functools
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint import naming, read_json
from llama_jax.config import LlamaConfig
from llama_jax.conversion.pth import read_pth
from llama_jax.conversion.rules import META, source_shapes
from llama_jax.conversion.source import Source, published_context
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.leaves import LazyLeaf

_PARAMS, _CHECKLIST = "params.json", "checklist.chk"
_EMBEDDING = "tok_embeddings.weight"
_INTEGERS = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "vocab_size")
_NUMBERS = ("norm_eps", "ffn_dim_multiplier", "rope_theta")
_OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier", "rope_theta", "vocab_size")
_MOST = 1 << 31  # no size of a model is larger; keeps the arithmetic below small


def is_meta(path: pathlib.Path) -> bool:
    """Whether a folder looks like one of Meta's."""
    return (path / _PARAMS).is_file() or any(path.glob("consolidated.*.pth"))


def read_meta(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open one of Meta's folders; no weights are read.

    Args:
      path: the folder.
      max_seq_len: longest sequence; the published model's of these sizes where not
        given, since Meta's files do not say.

    Raises:
      CheckpointError: a file is missing or damaged, or ranks do not fit together.
      ConfigError: `params.json` is not understood.
    """
    fields = read_json(path / _PARAMS)
    ranks = [read_pth(file) for file in _rank_files(path)]
    if _EMBEDDING not in ranks[0] or ranks[0][_EMBEDDING].ndim != 2:
        raise CheckpointError(
            f"{path}: has no {_EMBEDDING} of two axes; is it a language model of Meta?"
        )
    rows, columns = ranks[0][_EMBEDDING].shape
    with naming(path / _PARAMS):
        split_by_rows = columns == fields.get("dim")
        vocab_size = rows * len(ranks) if split_by_rows else rows
        config = config_from_params(fields, vocab_size, max_seq_len or 1)
    context = "as given"
    if max_seq_len is None:
        longest, context = published_context(config, path)
        config = config.replace(max_seq_len=longest)
    return Source(
        path, META, config, context, _join_ranks(path, ranks, config), _checksums(path)
    )


def config_from_params(
    fields: Mapping[str, Any], vocab_size: int, max_seq_len: int
) -> LlamaConfig:
    """The configuration in a `params.json`.

    Args:
      fields: its content.
      vocab_size: rows of the embedding, which the file often leaves open (-1).
      max_seq_len: which it never says.

    Raises:
      ConfigError: a field is missing, unknown or impossible.
    """
    known = (*_INTEGERS, *_NUMBERS)
    if unknown := sorted(fields.keys() - {*known}):
        raise ConfigError(
            f"{', '.join(unknown)} not understood; this is not a Llama 1, Llama 2 or "
            "Code Llama model, or it was changed in a way that is not supported"
        )
    given = {name: value for name, value in fields.items() if value is not None}
    if missing := [n for n in known if n not in given and n not in _OPTIONAL]:
        raise ConfigError(f"lacks {', '.join(missing)}; download the file again")
    if given.get("vocab_size") == -1:
        del given["vocab_size"]
    for name, value in given.items():
        whole = name in _INTEGERS
        if type(value) is not int and (whole or type(value) is not float):
            raise ConfigError(f"{name} is {value!r}, which is not a number of its kind")
        if not 0 < value < _MOST:
            raise ConfigError(f"{name} is {value!r}, which no model has")
    dim, heads = given["dim"], given["n_heads"]
    if dim % heads:
        raise ConfigError(f"dim {dim} is not a multiple of n_heads {heads}")
    if given.get("vocab_size", vocab_size) != vocab_size:
        raise ConfigError(
            f"vocab_size is {given['vocab_size']}, but the embedding has {vocab_size} "
            "rows; the two files do not belong together"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        num_layers=given["n_layers"],
        embed_dim=dim,
        num_heads=heads,
        num_kv_heads=given.get("n_kv_heads", heads),
        head_dim=dim // heads,
        mlp_dim=_mlp_dim(dim, given["multiple_of"], given.get("ffn_dim_multiplier")),
        max_seq_len=max_seq_len,
        rope_theta=float(given.get("rope_theta", 1e4)),
        norm_eps=float(given["norm_eps"]),
        tied_embeddings=False,
    )


def _mlp_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Two thirds of four times D, scaled, rounded up, as Meta's code does it."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def _rank_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of all ranks in order, from 00 on without a gap."""
    found = {}
    for file in path.glob("consolidated.*.pth"):
        number = re.fullmatch(r"consolidated\.(\d\d)\.pth", file.name)
        if not number:
            raise CheckpointError(
                f"{file}: not a name that Meta's files have (consolidated.00.pth, "
                "...); remove or rename it"
            )
        found[int(number[1])] = file
    if not found:
        raise CheckpointError(
            f"{path}: has no consolidated.00.pth; download the weights too"
        )
    for rank in range(max(found)):
        if rank not in found:
            raise CheckpointError(
                f"{path}: consolidated.{rank:02}.pth is missing, though there is "
                f"consolidated.{max(found):02}.pth; download it too"
            )
    return [found[rank] for rank in sorted(found)]


def _join_ranks(
    path: pathlib.Path, ranks: list[dict[str, np.ndarray]], config: LlamaConfig
) -> dict[str, LazyLeaf]:
    """Every tensor whole, by the axis that its shapes show to be divided."""
    first = ranks[0]
    for number, rank in enumerate(ranks):
        for name in sorted(first.keys() ^ rank.keys()):
            raise CheckpointError(
                f"{path}: ranks 0 and {number} differ: only one has {name}; download "
                "all files again from one place"
            )
        for name, array in rank.items():
            if (array.shape, array.dtype) != (first[name].shape, first[name].dtype):
                raise CheckpointError(
                    f"{path}: ranks 0 and {number} differ in the shape or dtype of "
                    f"{name}; download all files again from one place"
                )
    if config.num_layers > len(first):  # or the next line would list all of them
        wanted = {}
    else:
        wanted = source_shapes(META, config)
    return {
        name: _join(path, name, [rank[name] for rank in ranks], wanted.get(name))
        for name in first
    }


def _join(
    path: pathlib.Path,
    name: str,
    parts: list[np.ndarray],
    wanted: tuple[int, ...] | None,
) -> LazyLeaf:
    shape, dtype = parts[0].shape, parts[0].dtype
    if len(parts) == 1 or wanted is None:  # a shape nobody wants is refused later
        return LazyLeaf(shape, dtype, lambda: parts[0])
    for axis in range(len(shape)):
        joined = (*shape[:axis], shape[axis] * len(parts), *shape[axis + 1 :])
        if joined == wanted:
            return LazyLeaf(
                wanted, dtype, functools.partial(np.concatenate, parts, axis)
            )

    def read_same() -> np.ndarray:
        for rank, part in enumerate(parts):
            if not np.array_equal(part, parts[0]):
                raise CheckpointError(
                    f"{path}: {name} should be the same in all ranks, but 0 and {rank} "
                    "differ; download all files again from one place"
                )
        return parts[0]

    if shape == wanted and len(shape) == 1:
        return LazyLeaf(shape, dtype, read_same)
    raise CheckpointError(
        f"{path}: {name} of {len(parts)} ranks with the shape {list(shape)} each does "
        f"not join to {list(wanted)}, which params.json makes it; are these all ranks?"
    )


def _checksums(path: pathlib.Path) -> dict[pathlib.Path, str]:
    """The md5 sums that came with the files that are used, where there is a list."""
    checklist = path / _CHECKLIST
    if not checklist.is_file():
        return {}
    used = {_PARAMS: path / _PARAMS} | {f.name: f for f in _rank_files(path)}
    sums = {}
    for line in checklist.read_bytes().decode("ascii", "replace").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{32})[ *]+(\S+)", line.strip())
        if line.strip() and not match:
            raise CheckpointError(
                f"{checklist}: the line {line[:60]!r} is not a checksum and a file; "
                "download it again, or remove it to go without"
            )
        if match and match[2] in used:
            sums[used[match[2]]] = match[1].lower()
        elif match and re.fullmatch(r"consolidated\.\d\d\.pth", match[2]):
            raise CheckpointError(
                f"{path}: {match[2]} is missing, though {_CHECKLIST} lists it; "
                "download it too"
            )
    return sums
