"""Hugging Face folders: `config.json`, safetensors (or older `.bin`), a tokenizer."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint.json_files import config_errors_in, read_json, write_json
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.conversion.safetensors import read_safetensors, write_safetensors
from llama_jax.conversion.source import Export, Source, counted
from llama_jax.conversion.tensor_mapping import export
from llama_jax.conversion.tensor_tables import HUGGING_FACE
from llama_jax.conversion.tokenizer_files import (
    read_folders_tokenizer,
    write_folders_tokenizer,
)
from llama_jax.conversion.torch_zip import read_pth
from llama_jax.errors import CheckpointError, ConfigError

_CONFIG = "config.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_SHARD_BYTES = 5_000_000_000  # of a file at most, unless one tensor is larger

_INTEGERS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed_dim",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "max_position_embeddings": "max_seq_len",
}
_OPTIONAL = (
    "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
# Known, but only with the value that a Llama has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# What says nothing about the numbers that the model computes.
_INERT = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range",
    "_name_or_path", "_commit_hash", "pretraining_tp", "attention_dropout", "prefix",
    "max_sequence_length", "tokenizer_class", "attn_implementation", "return_dict",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "num_labels",
    "task_specific_params", "finetuning_task", "unsloth_version", "unsloth_fixed",
    "transformers.js_config",
}  # fmt: skip


def is_hugging_face(path: pathlib.Path) -> bool:
    """Whether a folder looks like one of Hugging Face's."""
    kinds = ("*.safetensors", "pytorch_model*.bin", *_INDEXES)
    files = any(next(path.glob(kind), None) for kind in kinds)
    return path.is_dir() and (path / _CONFIG).is_file() and files


def read_hugging_face(path: pathlib.Path, *, max_seq_len: int | None = None) -> Source:
    """Open one of Hugging Face's folders; no weights are read.

    Raises:
      CheckpointError: a file is missing or damaged.
      ConfigError: `config.json` is not a Llama's, or not understood.
    """
    file = path / _CONFIG
    fields = read_json(file)
    with config_errors_in(file):
        config = config_from_hugging_face(fields)
        context = f"from {_CONFIG}"
        if max_seq_len is not None:
            config, context = config.replace(max_seq_len=max_seq_len), "as given"
    tensors = _tensors(path)
    if config.tied_embeddings and {_EMBEDDING, _HEAD} <= tensors.keys():
        tensors[_EMBEDDING] = _both(path, tensors[_EMBEDDING], tensors.pop(_HEAD))
    return Source(
        path=path,
        form=HUGGING_FACE,
        config=config,
        context=context,
        tensors=tensors,
        find_tokenizer=lambda: read_folders_tokenizer(path, config.vocab_size),
    )


def config_from_hugging_face(fields: Mapping[str, Any]) -> LlamaConfig:
    """The configuration in a `config.json`.

    Raises:
      ConfigError: a field is missing, impossible, unknown, or has a value that is not
        supported.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name, allowed in _FIXED.items():
        if given.get(name, allowed[0]) not in allowed:
            raise ConfigError(
                f"{name} is {given[name]!r}, but only {allowed[0]!r} is supported; "
                "this is another kind of model"
            )
    known = {*_INTEGERS, *_OPTIONAL, *_FIXED, *_INERT}
    unknown = [n for n in given if n not in known and given[n] not in (False, [], {})]
    if unknown:
        raise ConfigError(
            f"{', '.join(sorted(unknown))} not understood; it may change what the "
            "model computes, so that it is not ignored"
        )
    if missing := [name for name in _INTEGERS if name not in given]:
        raise ConfigError(f"lacks {', '.join(missing)}; is it a language model?")
    sizes = {ours: _integer(name, given[name]) for name, ours in _INTEGERS.items()}
    heads, width = sizes["num_heads"], sizes["embed_dim"]
    if "head_dim" not in given and width % heads:
        raise ConfigError(
            f"hidden_size {width} is not a multiple of num_attention_heads {heads}, "
            "and there is no head_dim"
        )
    theta, scaling = rope_from_hugging_face(given)
    tied = given.get("tie_word_embeddings", False)
    eps = given.get("rms_norm_eps", 1e-6)  # as transformers reads a file without it
    for name, value in (("rms_norm_eps", eps), ("rope_theta", theta)):
        if type(value) not in (int, float):
            raise ConfigError(f"{name} is {value!r}, which is not a number")
    return LlamaConfig(
        **sizes,
        num_kv_heads=_integer(
            "num_key_value_heads", given.get("num_key_value_heads", heads)
        ),
        head_dim=_integer("head_dim", given.get("head_dim", width // heads)),
        rope_theta=float(theta),
        rope_scaling=scaling,
        norm_eps=float(eps),
        tied_embeddings=tied,
        head="lm",
    )


def config_to_hugging_face(
    config: LlamaConfig, dtype: Any, special: Mapping[str, int]
) -> dict[str, Any]:
    """A `config.json` for `transformers`; the inverse of `config_from_hugging_face`.

    Args:
      config: of the model.
      dtype: of most of its weights.
      special: ids of the tokens that begin and end a text.
    """
    theirs = {name: getattr(config, ours) for name, ours in _INTEGERS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{f"{name}_token_id": id for name, id in special.items()},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "use_cache": True,
        **theirs,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_to_hugging_face(config),
        "tie_word_embeddings": config.tied_embeddings,
        "torch_dtype": np.dtype(dtype).name,
    }


def write_hugging_face(
    folder: pathlib.Path,
    model: Export,
    *,
    progress: Progress | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Fill a folder that `transformers` loads, one tensor in memory at a time."""
    tensors = export(HUGGING_FACE, model.leaves, model.config)
    done = counted(progress, tensors)
    shards = _shards(tensors, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        for tensor in write_safetensors(folder / name, shard):
            weight_map[tensor] = name
            done(tensor)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / _INDEXES[0], index)
    special = {}
    if model.tokenizer is not None:
        special = {"bos": model.tokenizer.bos_id, "eos": model.tokenizer.eos_id}
        write_folders_tokenizer(folder, model.tokenizer, model.config.max_seq_len)
        generation = {f"{name}_token_id": id for name, id in special.items()}
        write_json(folder / "generation_config.json", generation)
    dtype = tensors[_EMBEDDING].dtype
    described = config_to_hugging_face(model.config, dtype, special)
    write_json(folder / _CONFIG, described)


def _shards(tensors: Mapping[str, LazyLeaf], most: int) -> list[dict[str, LazyLeaf]]:
    """The tensors file by file, in their order, each file as full as it may be."""
    shards: list[dict[str, LazyLeaf]] = [{}]
    room = most
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _tensors(path: pathlib.Path) -> dict[str, LazyLeaf]:
    """All tensors of all files, each of which must be in the file that is named."""
    index = next((path / n for n in _INDEXES if (path / n).is_file()), None)
    if index is None:
        weight_map = None
        files = sorted(path.glob("*.safetensors"))
        files = files or sorted(path.glob("pytorch_model*.bin"))
    else:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)
            for name in weight_map.values()
        ):
            raise CheckpointError(
                f"{index}: has no weight_map of tensors to files; download it again"
            )
        files = [path / name for name in sorted(set(weight_map.values()))]
    tensors: dict[str, LazyLeaf] = {}
    for file in files:
        for name, tensor in _read(file).items():
            if name in tensors or (weight_map and weight_map.get(name) != file.name):
                raise CheckpointError(
                    f"{file}: holds {name}, which belongs to another file; download "
                    "all files again from one place"
                )
            tensors[name] = tensor
    if missing := sorted(set(weight_map or ()) - tensors.keys()):
        raise CheckpointError(
            f"{index}: lists {missing[0]}, which is not in its file; download all "
            "files again from one place"
        )
    return tensors


def _read(file: pathlib.Path) -> dict[str, LazyLeaf]:
    if file.suffix == ".safetensors":
        return read_safetensors(file)

    def lazy(array: np.ndarray) -> LazyLeaf:
        return LazyLeaf(array.shape, array.dtype, lambda: array)

    return {name: lazy(array) for name, array in read_pth(file).items()}


def _both(path: pathlib.Path, embedding: LazyLeaf, head: LazyLeaf) -> LazyLeaf:
    """The embedding, which must be the output head as well."""

    def read() -> np.ndarray:
        found = embedding.read()
        if not np.array_equal(found, head.read()):
            raise CheckpointError(
                f"{path}: config.json ties the embeddings, but {_HEAD} is another "
                "matrix; set tie_word_embeddings to false there if that is meant"
            )
        return found

    return LazyLeaf(embedding.shape, embedding.dtype, read, embedding.host_bytes)


def _integer(name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ConfigError(f"{name} is {value!r}, which no model has")
    return value


def rope_from_hugging_face(
    given: Mapping[str, Any],
) -> tuple[Any, RopeScaling | None]:
    """Theta and scaling, from the top level or from where newer files nest them."""
    nested = given.get("rope_parameters", given.get("rope_scaling", {}))
    if not isinstance(nested, dict):
        raise ConfigError(f"rope_scaling is {nested!r}, which is not an object")
    theta = nested.get("rope_theta", given.get("rope_theta", 1e4))
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return theta, None
    fields = dict(_LINEAR if kind == "linear" else _LLAMA3)
    if kind not in ("linear", "llama3") or not fields.keys() <= nested.keys():
        raise ConfigError(
            f"rope_scaling is {nested!r}; the kinds default, linear and llama3 are "
            "supported, each with all of its fields"
        )
    return theta, RopeScaling(
        kind=kind, **{ours: nested[theirs] for theirs, ours in fields.items()}
    )


def rope_to_hugging_face(config: LlamaConfig) -> dict[str, Any] | None:
    """The scaling as `rope_scaling` has it."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    fields = _LINEAR if scaling.kind == "linear" else _LLAMA3
    named = {theirs: getattr(scaling, ours) for theirs, ours in fields.items()}
    return {"rope_type": scaling.kind} | named


_LINEAR = {"factor": "factor"}
_LLAMA3 = _LINEAR | {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}
