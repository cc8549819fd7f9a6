"""A model on disk: its configuration, its tokenizer and its weights.

A checkpoint is a folder with

* config.json: `{"format": "llama_jax", "format_version": 1, "config": {...}}`;
* tokenizer.model or tokenizer.json: as it came with the model; with
  added_tokens.json where ids were added;
* params/: an Orbax tree of one uncompressed leaf per layer and weight (`leaves.py`).
"""

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.checkpoint.atomic_write import new_folder
from llama_jax.checkpoint.gathering import gathered
from llama_jax.checkpoint.lazy_leaf import (
    LazyLeaf,
    Progress,
    check_leaves,
    lazy_leaves,
    open_leaves,
    write_leaves,
)
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError, TokenizerError
from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.params import (
    LAYERS,
    axes_of,
    flatten,
    leaf_paths,
    unflatten,
    weight_shape,
)
from llama_jax.runtime import DType, Runtime
from llama_jax.sharding import param_shardings, weight_shardings
from llama_jax.text.tokenizer import FILE_NAMES, Tokenizer
from llama_jax.types import Array, Mesh, Params

Path = str | os.PathLike[str]
Quantize = Callable[[str, Array], Any]
"""(path, weight or a layer of one) to what is held in its place."""

_FORMAT, _VERSION = "llama_jax", 1
_CONFIG, _PARAMS = "config.json", "params"
_ADDED = "added_tokens.json"


class Loaded(NamedTuple):
    """A checkpoint in memory; `model.config` and `model.runtime` say what and how."""

    model: Llama | ScalarModel
    params: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def language_model(self) -> Llama:
        """The model, which must have an "lm" head.

        Raises:
          ConfigError: it has a scalar head, and no logits.
        """
        self.model.config.check_head("lm", "generation")
        assert isinstance(self.model, Llama)
        return self.model


def save_params(
    path: Path,
    params: Params,
    config: LlamaConfig,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: DType | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model checkpoint; it appears at `path` complete, or not at all.

    Of several processes all must call this; process 0 writes, and the others return
    when it is done.

    Args:
      path: of the folder; must not exist, or be empty.
      params: tree of arrays or of `LazyLeaf`s, in either layout, nested or flat.
      config: what the weights are.
      tokenizer: stored beside them.
      dtype: of the weights on disk; as they are where not given.
      progress: told of the bytes that are written.

    Raises:
      CheckpointError: there is something at `path`, or the tree is not the config's.
    """
    leaves = lazy_leaves(params)
    check_leaves(leaves, config, where="the parameters")
    if dtype is not None:
        leaves = {path: leaf.cast(jnp.dtype(dtype)) for path, leaf in leaves.items()}
    with gathered(leaves) as whole:
        if whole is not None:
            _write_checkpoint(path, whole, config, tokenizer, progress)


def _write_checkpoint(
    path: Path,
    leaves: Mapping[str, LazyLeaf],
    config: LlamaConfig,
    tokenizer: Tokenizer | None,
    progress: Progress | None,
) -> None:
    with new_folder(path) as folder:
        write_leaves(folder / _PARAMS, leaves, progress)
        described = {"format": _FORMAT, "format_version": _VERSION}
        write_json(folder / _CONFIG, described | {"config": config.to_dict()})
        if tokenizer is not None:
            (folder / tokenizer.file_name).write_bytes(tokenizer.contents)
            if tokenizer.added_tokens:
                ids = {name: id for id, name in tokenizer.added_tokens.items()}
                write_json(folder / _ADDED, ids)


def load_params(
    path: Path,
    config: LlamaConfig,
    *,
    runtime: Runtime,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The weights of a checkpoint in the runtime's dtype and layout.

    They go from mapped files to their place leaf by leaf; with a mesh no device holds
    more than its part of them.

    Raises:
      CheckpointError: a leaf is missing, damaged or not the config's.
      MeshError: the mesh does not divide the model.
    """
    leaves = open_params(path, config)
    return place_params(leaves, config, runtime=runtime, mesh=mesh)


def open_params(path: Path, config: LlamaConfig) -> dict[str, LazyLeaf]:
    """The weights of a checkpoint, one for each layer, to be read when wanted.

    Raises:
      CheckpointError: a leaf is missing, damaged or not the config's.
    """
    leaves = open_leaves(pathlib.Path(path) / _PARAMS)
    check_leaves(leaves, config, where=path)
    return leaves


def place_params(
    leaves: Mapping[str, LazyLeaf],
    config: LlamaConfig,
    *,
    runtime: Runtime,
    mesh: Mesh | None = None,
    quantize: Quantize | None = None,
) -> dict[str, Any]:
    """The leaves as arrays in the runtime's dtype and layout, on the mesh's devices.

    Each is read, cast and put in its place before the next one is read. On CPU a
    mapped leaf that needs no cast is used where it lies, not copied.

    Args:
      leaves: all of the model's, one for each layer and weight.
      config: of the model.
      runtime: its dtype, layout and rules count.
      mesh: devices; where there is none, the default one.
      quantize: what becomes of each as soon as it is in its place, given its path.
    """
    dtype = jnp.dtype(runtime.weight_dtype)
    shardings: Mapping[str, Any] = {}
    if mesh is not None:
        shardings = flatten(param_shardings(config, runtime, mesh))
    flat = {}
    for path in leaf_paths(config, runtime.layer_layout):
        sharding = shardings.get(path)
        axes = axes_of(path)
        if not axes.startswith("L "):
            leaf = _place(leaves[path], dtype, sharding)
            flat[path] = quantize(path, leaf) if quantize else leaf
            continue
        weight = path.removeprefix(LAYERS)
        shape = weight_shape(config, axes)
        stacked: Any = None
        row = None
        if sharding is not None:
            spec = PartitionSpec(*sharding.spec[1:])
            row = NamedSharding(sharding.mesh, spec)
        for layer in range(config.num_layers):
            leaf = _place(leaves[f"{LAYERS}{layer}/{weight}"], dtype, row)
            if quantize is not None:
                leaf = quantize(path, leaf)
            if stacked is None and isinstance(leaf, jax.Array):
                stacked = jnp.zeros(shape, dtype, device=sharding)
            elif stacked is None:
                stacked = _empty_layers(leaf, config.num_layers)
            stacked = jax.tree.map(
                functools.partial(_set_layer, layer=layer), stacked, leaf
            )
        flat[path] = stacked
    if mesh is not None and quantize is not None:
        # Its scales lie where the compiler put them.
        places = weight_shardings(unflatten(flat), config, runtime, mesh)
        flat = flatten(jax.tree.map(jax.device_put, unflatten(flat), places))
    return unflatten(flat)


def is_checkpoint(path: Path) -> bool:
    """Whether there is a folder of ours, be it damaged: by its files and names."""
    file = pathlib.Path(path) / _CONFIG
    if not file.is_file():
        return False
    try:
        ours = read_json(file).get("format") == _FORMAT
    except CheckpointError:
        ours = False
    return ours or file.with_name(_PARAMS).is_dir()


def read_config(path: Path) -> LlamaConfig:
    """What a checkpoint of ours says it is.

    Raises:
      CheckpointError: it is not one, or a newer version wrote it.
      ConfigError: its fields are not a model.
    """
    file = pathlib.Path(path) / _CONFIG
    found = read_json(file)
    if found.get("format") != _FORMAT:
        raise CheckpointError(
            f"{file}: not the configuration of a llama_jax checkpoint; convert the "
            f"model with `python -m llama_jax.conversion {path} NEW_FOLDER`"
        )
    if found.get("format_version") != _VERSION:
        raise CheckpointError(
            f"{file}: format_version is {found.get('format_version')!r}, this "
            f"llama_jax reads {_VERSION}; upgrade with pip install -U llama-jax"
        )
    fields = found.get("config")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: has no `config`; convert the model again")
    with naming(file):
        return LlamaConfig.from_dict(fields)


def tokenizer_file(path: Path) -> pathlib.Path | None:
    """The file of a folder that `read_tokenizer` reads, where there is one."""
    files = [pathlib.Path(path) / name for name in FILE_NAMES]
    return next((file for file in files if file.is_file()), None)


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer that lies in a folder, ours or foreign, where there is one.

    Raises:
      TokenizerError: it is damaged, or needs a package that is not installed.
    """
    file = tokenizer_file(path)
    if file is None:
        return None
    added = file.with_name(_ADDED)
    if not added.is_file():
        return Tokenizer.from_file(file)
    ids = read_json(added)
    if not all(type(id) is int for id in ids.values()):
        raise TokenizerError(f"{added}: every value must be a token's id, an integer")
    names = {id: name for name, id in ids.items()}
    return Tokenizer.from_file(file, added_tokens=names)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      CheckpointError: there is no such file, or no object in it.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: is not JSON ({error}); download it again"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: is not a JSON object; download it again")
    return found


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Puts the file that a `ConfigError` is about in front of its message."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write an object as a JSON file that people can read."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _place(leaf: LazyLeaf, dtype: Any, sharding: NamedSharding | None) -> Array:
    array = leaf.read()
    if sharding is None:
        return jax.device_put(array.astype(dtype, copy=False))
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: array[index].astype(dtype, copy=False)
    )


def _empty_layers(layer: Any, count: int) -> Any:
    """Room for so many layers of a leaf of several arrays."""

    def room(array: Array) -> Array:
        place = None
        if isinstance(array.sharding, NamedSharding):
            spec = PartitionSpec(None, *array.sharding.spec)
            place = NamedSharding(array.sharding.mesh, spec)
        return jnp.zeros((count, *array.shape), array.dtype, device=place)

    return jax.tree.map(room, layer)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: Array, leaf: Array, layer: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, leaf, layer, 0)
