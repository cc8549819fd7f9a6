"""Which files of a Hugging Face folder have its weights, and the tensors in them.

As in `transformers`: safetensors before `.bin`, one file before several with an index.
What it refuses although the weights are there is read too: files of one variant
(`model.fp16.safetensors`), several files without an index, and an index whose files are
missing beside others that are complete.
"""

import pathlib
import re
from typing import NamedTuple

import numpy as np

from llama_jax.checkpoint.finite import all_finite
from llama_jax.checkpoint.json_files import read_json
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, lazy_leaf
from llama_jax.config import LlamaConfig
from llama_jax.conversion.pth_reader import read_pth
from llama_jax.conversion.safetensors import read_safetensors
from llama_jax.errors import CheckpointError

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_STEMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_FILE = r"(?:model|pytorch_model)(?:\.(\w+))?\.(?:safetensors|bin)"
_INDEX = r"(?:model\.safetensors|pytorch_model\.bin)\.index(?:\.(\w+))?\.json"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")
_INV_FREQ = re.compile(r"(.+\.)?rotary_emb\.inv_freq")


class _Files(NamedTuple):
    """One complete set of weights, if all files are there.

    Attributes:
      paths: of the files.
      index_file: that lists them, if there is one.
      listed: names of the tensors that the index lists.
    """

    paths: list[pathlib.Path]
    index_file: pathlib.Path | None = None
    listed: frozenset[str] = frozenset()


def has_weights(folder: pathlib.Path) -> bool:
    """Return whether a folder has files of weights, or an index of some."""
    return bool(_sets(folder) or _variants(folder) or _loose_files(folder))


def read_weights(folder: pathlib.Path, config: LlamaConfig) -> dict[str, LazyLeaf]:
    """Return the tensors of a folder, under the names of `LlamaForCausalLM`.

    Args:
      folder: of the checkpoint.
      config: its configuration, which decides about tied embeddings and checks rotary
        frequencies.

    Raises:
      CheckpointError: a file is missing or damaged, or files contradict each other.
    """
    files = _choose(folder)
    tensors: dict[str, LazyLeaf] = {}
    for path in files.paths:
        for name, tensor in _read_file(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: contains {name}, which another file contains too; "
                    "download all files again from one source"
                )
            tensors[name] = tensor
    missing = {name for name in files.listed - tensors.keys() if not _is_inert(name)}
    if config.tied_embeddings:  # safetensors files lack a head that shares its memory
        missing.discard(_HEAD)
    if missing:
        raise CheckpointError(
            f"{files.index_file}: lists {min(missing)}, which is not in its file; "
            "download all files again from one source"
        )
    tensors = _without_inv_freq(folder, tensors, config)
    if tensors and not any(name.startswith("model.") for name in tensors):
        tensors = _with_prefix(folder, tensors, config)
    if config.tied_embeddings and {_EMBEDDING, _HEAD} <= tensors.keys():
        head = tensors.pop(_HEAD)
        tensors[_EMBEDDING] = _require_equal_head(folder, tensors[_EMBEDDING], head)
    return tensors


def _choose(folder: pathlib.Path) -> _Files:
    """Return the first complete set of files."""
    variants = _variants(folder)
    sets = _sets(folder)
    if not sets and len(variants) > 1:
        raise CheckpointError(
            f"{folder}: has the variants {', '.join(sorted(variants))}, but no plain "
            "model.safetensors; remove all but one"
        )
    sets = sets or [files for name in variants for files in _sets(folder, f".{name}")]
    sets = sets or [_Files(_loose_files(folder))]
    complete = (s for s in sets if all(path.is_file() for path in s.paths))
    # The reader names the missing file of an incomplete set.
    return next(complete, sets[0])


def _sets(folder: pathlib.Path, variant: str = "") -> list[_Files]:
    """Return the sets of files that a variant has, complete or not."""
    sets = []
    for stem, suffix in _STEMS:
        file = folder / f"{stem}{variant}{suffix}"
        if file.is_file() or file.is_symlink():
            sets.append(_Files([file]))
        index = folder / f"{stem}{suffix}.index{variant}.json"
        if index.is_file():
            sets.append(_read_index(index))
    return sets


def _read_index(index: pathlib.Path) -> _Files:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)
        for name in weight_map.values()
    ):
        raise CheckpointError(
            f"{index}: has no weight_map from tensors to files; download it again"
        )
    paths = [index.with_name(name) for name in sorted(set(weight_map.values()))]
    return _Files(paths, index, frozenset(weight_map))


def _variants(folder: pathlib.Path) -> list[str]:
    """Return the names of variants, such as fp16."""
    names = [path.name for path in folder.glob("*model*")]
    matches = [re.fullmatch(f"{_FILE}|{_INDEX}", name) for name in names]
    return sorted({m[1] or m[2] for m in matches if m and (m[1] or m[2])})


def _loose_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return weights that no index lists, and the missing ones among their parts."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        paths = {
            path
            for path in folder.glob(pattern)
            if not path.name.startswith("adapter_model")
        }
        for path in list(paths):
            if part := _PART.fullmatch(path.name):
                count = min(int(part[3]), 1000)
                paths |= {
                    path.with_name(f"{part[1]}-{n:05}-of-{part[3]}{part[4]}")
                    for n in range(1, count + 1)
                }
        if paths:
            return sorted(paths)
    return []


def _read_file(path: pathlib.Path) -> dict[str, LazyLeaf]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return {name: lazy_leaf(array) for name, array in read_pth(path).items()}


def _is_inert(name: str) -> bool:
    """Return whether a tensor is a buffer that is computed from the configuration."""
    return bool(_INV_FREQ.fullmatch(name))


def _without_inv_freq(
    folder: pathlib.Path, tensors: dict[str, LazyLeaf], config: LlamaConfig
) -> dict[str, LazyLeaf]:
    """Drop rotary frequencies that older files contain, if they are the config's.

    Versions of `transformers` differ in whether a scaled model's are scaled, so those
    are not compared.
    """
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    expected = config.rope_theta**-exponent
    for name, tensor in tensors.items():
        if not _is_inert(name):
            continue
        # Some are float16 or bfloat16.
        if tensor.shape != expected.shape or (
            config.rope_scaling is None
            and not np.allclose(tensor.read().astype(float), expected, 1e-2, 1e-7)
        ):
            raise CheckpointError(
                f"{folder}: {name} has other frequencies than the rope_theta "
                f"{config.rope_theta:g} and the head_dim {config.head_dim} of "
                "config.json; correct config.json, or download it again"
            )
    return {name: tensor for name, tensor in tensors.items() if not _is_inert(name)}


def _with_prefix(
    folder: pathlib.Path, tensors: dict[str, LazyLeaf], config: LlamaConfig
) -> dict[str, LazyLeaf]:
    """Rename what `LlamaModel.save_pretrained` wrote, which lacks the `model.`."""
    renamed = {
        name if name == _HEAD else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }
    if _EMBEDDING not in renamed:
        return tensors  # of another kind, to be refused by their own names
    if _HEAD not in renamed and not config.tied_embeddings:
        raise CheckpointError(
            f"{folder}: has no {_HEAD}, since it was saved from a LlamaModel; save "
            "the LlamaForCausalLM that it is a part of"
        )
    return renamed


def _require_equal_head(
    folder: pathlib.Path, embedding: LazyLeaf, head: LazyLeaf
) -> LazyLeaf:
    """Return the embedding, which when read is compared with the stored head."""

    def read() -> np.ndarray:
        array = embedding.read()
        # NaN, which is not equal to itself, is left to those who read the weight.
        if not np.array_equal(array, head.read()) and all_finite(array):
            raise CheckpointError(
                f"{folder}: config.json ties the embeddings, but {_HEAD} differs from "
                f"{_EMBEDDING}; set tie_word_embeddings to false if that is intended"
            )
        return array

    return LazyLeaf(embedding.shape, embedding.dtype, read, embedding.host_bytes)
