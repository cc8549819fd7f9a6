"""Model folders: a checkpoint's configuration, tokenizer and weights on disk.

A checkpoint is a folder with

* config.json: `{"format": "llama_jax", "format_version": 1, "config": {...}}`;
* tokenizer.model or tokenizer.json, unchanged from the original model;
* text_settings.json: what else the model says about text (`TextSettings`), if anything;
* params/: an Orbax tree with one uncompressed leaf per layer and weight (`orbax_io`).
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from llama_jax.arguments import checked
from llama_jax.checkpoint.atomic_write import new_folder
from llama_jax.checkpoint.device_put import device_put_leaves
from llama_jax.checkpoint.gather_to_main import gathered_to_main
from llama_jax.checkpoint.json_files import config_errors_in, read_json, write_json
from llama_jax.checkpoint.lazy_leaf import (
    LazyLeaf,
    Progress,
    check_leaves,
    lazy_leaves,
)
from llama_jax.checkpoint.orbax_io import open_leaves, write_leaves
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError, TokenizerError
from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.runtime import DType, Runtime
from llama_jax.text.settings import TextSettings
from llama_jax.text.tokenizer import FILE_NAMES, Tokenizer
from llama_jax.types import Mesh, Params, Path, PyTree

_FORMAT, _VERSION = "llama_jax", 1
_CONFIG, _PARAMS = "config.json", "params"
_SETTINGS = "text_settings.json"
_REMEDY = "copy or convert the model again"


class Loaded(NamedTuple):
    """A checkpoint in memory.

    Attributes:
      model: with the configuration (`model.config`) and the choices of this run
        (`model.runtime`, `model.mesh`); its class depends on `config.head`.
      params: tree of arrays in the runtime's layout and dtype.
      tokenizer: of the model.

    >>> import jax.numpy as jnp, llama_jax
    >>> loaded = llama_jax.load()
    >>> ids = jnp.asarray([loaded.tokenizer.encode("Once", bos=True, eos=False)])
    >>> logits, _ = llama_jax.apply(loaded.model, loaded.params, ids)
    >>> logits.shape
    (1, 2, 2048)
    """

    model: Llama | ScalarModel
    params: dict[str, PyTree]
    tokenizer: Tokenizer

    @property
    def language_model(self) -> Llama:
        """The model, if it has an "lm" head.

        Raises:
          ConfigError: the model has a scalar head, so it has no logits.
        """
        self.model.config.check_head("lm", "generation")
        assert isinstance(self.model, Llama)
        return self.model


@checked(ConfigError)
def save_params(
    path: Path,
    params: Params,
    config: LlamaConfig,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: DType | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model checkpoint, which appears at `path` only when it is complete.

    With several processes, all must call this function; process 0 writes, and the
    others return when it has finished.

    Args:
      path: of the folder; must not exist, or be empty.
      params: tree of arrays or of `LazyLeaf`s, in either layout, nested or flat.
      config: of the model; its head decides between `lm_head` and `scalar_head`.
      tokenizer: stored next to the weights.
      dtype: of the weights on disk; defaults to the dtypes of `params`.
      progress: called with the bytes written so far.

    Raises:
      CheckpointError: `path` exists or cannot be written, or `params` does not match
        `config`.

    >>> import pathlib, tempfile, llama_jax
    >>> loaded = llama_jax.load()
    >>> config, tokenizer = loaded.model.config, loaded.tokenizer
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
    >>> llama_jax.save_params(folder, loaded.params, config, tokenizer=tokenizer)
    >>> llama_jax.load(folder).model.config == config
    True
    """
    leaves = lazy_leaves(params)
    check_leaves(leaves, config, where="params")
    if dtype is not None:
        leaves = {
            name: leaf.cast(jnp.dtype(dtype), path, name)
            for name, leaf in leaves.items()
        }
    with gathered_to_main(leaves) as whole:
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
        header = {"format": _FORMAT, "format_version": _VERSION}
        write_json(folder / _CONFIG, header | {"config": config.to_dict()})
        if tokenizer is not None:
            (folder / tokenizer.file_name).write_bytes(tokenizer.contents)
            if settings := tokenizer.settings.to_dict():
                write_json(folder / _SETTINGS, settings)


def load_params(
    path: Path,
    config: LlamaConfig,
    *,
    runtime: Runtime,
    mesh: Mesh | None = None,
) -> dict[str, PyTree]:
    """Load the weights of a checkpoint in the runtime's dtype and layout.

    Mapped files are copied to devices leaf by leaf; with a mesh no device holds more
    than its shards.

    Raises:
      CheckpointError: a leaf is missing, damaged or does not match `config`.
      MeshError: the mesh does not divide the model.
    """
    leaves = open_params(path, config)
    return device_put_leaves(leaves, config, runtime=runtime, mesh=mesh)


def open_params(path: Path, config: LlamaConfig) -> dict[str, LazyLeaf]:
    """Open the weights of a checkpoint as lazy leaves, one per layer and weight.

    Raises:
      CheckpointError: a leaf is missing, damaged or does not match `config`.
    """
    leaves = open_leaves(pathlib.Path(path) / _PARAMS)
    check_leaves(leaves, config, where=path)
    return leaves


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a llama_jax checkpoint, intact or damaged, by its files."""
    file = pathlib.Path(path) / _CONFIG
    if not file.is_file():
        return False
    try:
        ours = read_json(file).get("format") == _FORMAT
    except CheckpointError:
        ours = False
    return ours or file.with_name(_PARAMS).is_dir()


def read_config(path: Path) -> LlamaConfig:
    """Read the configuration of a llama_jax checkpoint.

    Raises:
      CheckpointError: the folder is not one, or a newer version wrote it.
      ConfigError: a field is missing, unknown or out of range.
    """
    file = pathlib.Path(path) / _CONFIG
    content = read_json(file, remedy=_REMEDY)
    if content.get("format") != _FORMAT:
        raise CheckpointError(
            f"{file}: not the configuration of a llama_jax checkpoint; convert the "
            f"model with `python -m llama_jax.conversion {path} NEW_FOLDER`"
        )
    version = content.get("format_version")
    if version != _VERSION:
        raise CheckpointError(
            f"{file}: format_version is {version!r}, but this llama_jax reads "
            f"{_VERSION}; upgrade with pip install -U llama-jax"
        )
    fields = content.get("config")
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: has no `config`; convert the model again")
    with config_errors_in(file):
        return LlamaConfig.from_dict(fields)


def tokenizer_file(path: Path) -> pathlib.Path | None:
    """The file that `read_tokenizer` reads in a folder, or None without one."""
    files = [pathlib.Path(path) / name for name in FILE_NAMES]
    return next((file for file in files if file.is_file()), None)


def read_tokenizer(path: Path) -> Tokenizer | None:
    """Read the tokenizer in a folder (of any format), or return None without one.

    Raises:
      TokenizerError: it is damaged, or needs a package that is not installed.
    """
    file = tokenizer_file(path)
    if file is None:
        return None
    settings = file.with_name(_SETTINGS)
    if not settings.is_file():
        return Tokenizer.from_file(file)
    try:
        text_settings = TextSettings.from_dict(read_json(settings, remedy=_REMEDY))
    except TokenizerError as error:
        raise TokenizerError(f"{settings}: {error}") from error
    return Tokenizer.from_file(file, settings=text_settings)
