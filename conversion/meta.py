"""Meta's folders: `params.json` and one `consolidated.NN.pth` per rank."""

import contextlib
import functools
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint.json_files import config_errors_in, read_json, write_json
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.config import LlamaConfig
from llama_jax.conversion.source import Export, Source, counted, published_context
from llama_jax.conversion.tensor_mapping import export, rule_of, source_shapes
from llama_jax.conversion.tensor_tables import META
from llama_jax.conversion.tokenizer_files import find_tokenizer
from llama_jax.conversion.torch_state_dict import StateDictWriter
from llama_jax.conversion.torch_zip import read_pth
from llama_jax.errors import CheckpointError, ConfigError

_PARAMS, _CHECKLIST, _TOKENIZER = "params.json", "checklist.chk", "tokenizer.model"
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
    with config_errors_in(path / _PARAMS):
        split_by_rows = columns == fields.get("dim")
        vocab_size = rows * len(ranks) if split_by_rows else rows
        config = config_from_params(fields, vocab_size, max_seq_len or 1)
    context = "as given"
    if max_seq_len is None:
        longest, context = published_context(config, path)
        config = config.replace(max_seq_len=longest)
    return Source(
        path=path,
        form=META,
        config=config,
        context=context,
        tensors=_join_ranks(path, ranks, config),
        find_tokenizer=lambda: find_tokenizer(path),
        checksums=_checksums(path),
        ranks=len(ranks),
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
        rope_scaling=None,
        norm_eps=float(given["norm_eps"]),
        tied_embeddings=False,
        head="lm",
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
            read = functools.partial(np.concatenate, parts, axis)
            whole = LazyLeaf(wanted, dtype, read)
            return whole.with_host_bytes(whole.nbytes)

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


def params_from_config(config: LlamaConfig) -> dict[str, Any]:
    """A `params.json`; the inverse of `config_from_params`.

    Raises:
      ConfigError: Meta's format cannot say what the model is.
    """
    for name, value in (
        ("rope_scaling", None),
        ("head_dim", config.embed_dim // config.num_heads),
    ):
        if getattr(config, name) != value:
            raise ConfigError(
                f"Meta's format cannot say that {name} is {getattr(config, name)!r}: "
                f"its code takes it to be {value!r}"
            )
    fields = {
        "dim": config.embed_dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    width = int(2 * 4 * config.embed_dim / 3)
    # As published where that fits, else any pair that gives the same width.
    pairs = [(256, None), (4096, 1.3), (256, 1.0), (config.mlp_dim, None)]
    pairs.append((config.mlp_dim, config.mlp_dim / width))
    for multiple_of, multiplier in pairs:
        if _mlp_dim(config.embed_dim, multiple_of, multiplier) == config.mlp_dim:
            fields["multiple_of"] = multiple_of
            if multiplier is not None:
                fields["ffn_dim_multiplier"] = multiplier
            break
    return fields


def check_ranks(config: LlamaConfig, ranks: int) -> None:
    """Raise a `ConfigError` if a model cannot be divided among so many processes."""
    for name in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "embed_dim"):
        size = getattr(config, name)
        if not 1 <= ranks <= 100 or size % ranks:
            raise ConfigError(
                f"ranks is {ranks}, which does not divide {name} {size}; choose a "
                "number that does"
            )


def write_meta(
    folder: pathlib.Path,
    model: Export,
    *,
    ranks: int = 1,
    progress: Progress | None = None,
) -> None:
    """Fill a folder that Meta's code loads, one tensor in memory at a time.

    Args:
      folder: an empty one.
      model: what to write.
      ranks: files, one for each model-parallel process.
      progress: told of the bytes that are written.

    Raises:
      ConfigError: Meta's format cannot say what the model is, or `ranks` does not
        divide it.
      TokenizerError: its tokenizer cannot be one of Meta's.
    """
    params = params_from_config(model.config)
    tokenizer = None
    if model.tokenizer is not None:
        tokenizer = model.tokenizer.contents
        if model.tokenizer.file_name != _TOKENIZER:
            tokenizer = model.tokenizer.model_proto
    check_ranks(model.config, ranks)
    tensors = export(META, model.leaves, model.config)
    done = counted(progress, tensors)
    # Every original has them; Meta's later code ignores them.
    freqs = _freqs(model.config).astype(tensors[_EMBEDDING].dtype)
    parts = {name: _part(name, tensor, ranks) for name, tensor in tensors.items()}
    parts["rope.freqs"] = LazyLeaf(freqs.shape, freqs.dtype, lambda: freqs)
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(
                StateDictWriter(folder / f"consolidated.{rank:02}.pth", parts)
            )
            for rank in range(ranks)
        ]
        for name, tensor in tensors.items():
            whole = tensor.read()
            split = rule_of(META, name).split
            pieces = [whole] * ranks
            if split is not None:
                pieces = np.split(whole, ranks, axis=split)
            for file, piece in zip(files, pieces, strict=True):
                file.add(piece)
            del whole, pieces, piece
            done(name)
        for file in files:
            file.add(freqs)
    write_json(folder / _PARAMS, params)
    if tokenizer is not None:
        (folder / _TOKENIZER).write_bytes(tokenizer)


def _part(name: str, tensor: LazyLeaf, ranks: int) -> LazyLeaf:
    """What one rank holds of a tensor, as far as its shape goes."""
    shape = list(tensor.shape)
    if (split := rule_of(META, name).split) is not None:
        shape[split] //= ranks
    return LazyLeaf(tuple(shape), tensor.dtype, tensor.read)


def _freqs(config: LlamaConfig) -> np.ndarray:
    """The rotary frequencies, in the arithmetic of Meta's code."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32)
    power = exponent / np.float32(config.head_dim)
    return np.float32(1) / np.float32(config.rope_theta) ** power
