"""Read and write LoRA adapters in the folders of the `peft` package.

`adapter_config.json` has their settings, `adapter_model.safetensors` (before peft 0.6
`adapter_model.bin`) the tensors under Hugging Face's weight names: lora_A [R, I] and
lora_B [O, R]. Both use the half-split rotary layout of this library, so nothing is
permuted. Adapters of a reward model or critic have a scalar head too: for `peft` the
module `score` [1, D] of a sequence classifier with one label.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.atomic_write import new_folder
from llama_jax.checkpoint.json_files import read_json, write_json
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, lazy_leaf, lazy_leaves
from llama_jax.config import LlamaConfig
from llama_jax.conversion.other_folders import ADAPTER_CONFIG, why_no_adapter
from llama_jax.conversion.peft_base import write_base
from llama_jax.conversion.peft_context import write_context
from llama_jax.conversion.pth_reader import read_pth
from llama_jax.conversion.safetensors import read_safetensors, write_safetensors
from llama_jax.conversion.tensor_mapping import foreign_names
from llama_jax.conversion.tensor_tables import HUGGING_FACE
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.model.lora import Lora, lora_shapes
from llama_jax.params import SCALAR_HEAD, flatten, leaf_paths, unflatten
from llama_jax.types import JsonObject, Params, Path, PyTree

_CONFIG, _TENSORS = ADAPTER_CONFIG, "adapter_model.safetensors"
_OLD_TENSORS = "adapter_model.bin"
_PREFIX = "base_model.model."
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight"}
_HEAD, _HEAD_TENSOR = "score", f"{_PREFIX}score.weight"

# Fields that do not change what the adapters compute.
_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # of adapted embeddings and heads, which are refused
    "eva_config",
    "exclude_modules",  # the tensors show which were adapted
    "inference_mode",
    "layers_pattern",  # only with layers_to_transform
    "lora_dropout",
    "megatron_core",  # only with megatron_config
    "peft_version",
    "qalora_group_size",  # only with use_qalora
    "revision",
    "runtime_config",
    "target_modules",  # as above
    "task_type",
}
_READ = {"init_lora_weights", "lora_alpha", "peft_type", "r", "use_rslora"}
# These leave the base weights unchanged; others (PiSSA, OLoRA, ...) change them.
_INERT_INITS = ("gaussian", "eva", "orthogonal")


def read_peft(path: Path, config: LlamaConfig) -> tuple[dict[str, PyTree], Lora]:
    """Read the adapters of a folder that `peft` saved.

    Args:
      path: of the folder.
      config: of the base model.

    Returns:
      The adapters, unrolled, on the default device, in the file's dtype, with a scalar
      head if there is one; and their description, of which `lora.adapt` needs
      `scaling`.

    Raises:
      CheckpointError: a file is missing or damaged; a number is not finite; the
        adapters are for another model; or they compute more than x a b (DoRA, biases,
        whole modules, ranks that differ between layers).
    """
    folder = pathlib.Path(path)
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{folder}: {why_no_adapter(folder)}")
    settings = _read_settings(folder / _CONFIG)
    file, tensors = _read_tensors(folder)
    head = tensors.pop(_HEAD_TENSOR, None)
    names = _names(config)
    known = {
        f"{_PREFIX}{name}.{part}": f"{ours}/{leaf}"
        for ours, name in names.items()
        for leaf, part in _PARTS.items()
    }
    if unknown := sorted(tensors.keys() - known.keys()):
        raise CheckpointError(
            f"{file}: contains {unknown[0]}, which is not an adapter of a "
            f"projection of this model's {config.num_layers} layers; only those are "
            "supported"
        )
    leaves = {known[name]: tensor for name, tensor in tensors.items()}
    targets = {leaf.split("/")[-2] for leaf in leaves}
    lora = _lora(folder / _CONFIG, file, settings, _ordered(targets, names))
    shapes = flatten(lora_shapes(config, lora, layout="unrolled"))
    if missing := [leaf for leaf in shapes if leaf not in leaves]:
        raise CheckpointError(
            f"{file}: lacks {_foreign_name(missing[0], names)}; "
            "adapters of only some layers are not supported"
        )
    adapters = {}
    for leaf, shape in shapes.items():
        tensor = leaves[leaf]
        if tensor.shape != shape.shape[::-1]:
            raise CheckpointError(
                f"{file}: {_foreign_name(leaf, names)} has the shape "
                f"{list(tensor.shape)}, but model and rank require "
                f"{list(shape.shape[::-1])}; do they belong together?"
            )
        array = tensor.checked(file, _foreign_name(leaf, names)).read()
        adapters[leaf] = jnp.asarray(np.ascontiguousarray(array.T))
    if head is not None:
        adapters[SCALAR_HEAD] = jnp.asarray(_scalar_head(file, head, config))
    return unflatten(adapters), lora


def _scalar_head(
    file: pathlib.Path, tensor: LazyLeaf, config: LlamaConfig
) -> np.ndarray:
    if tensor.shape != (1, config.embed_dim):
        raise CheckpointError(
            f"{file}: {_HEAD_TENSOR} has the shape {list(tensor.shape)}, but a head "
            f"that gives this model's tokens a score has [1, {config.embed_dim}]"
        )
    return np.ascontiguousarray(tensor.checked(file, _HEAD_TENSOR).read()[0])


def write_peft(
    path: Path,
    adapters: Params,
    config: LlamaConfig,
    lora: Lora,
    *,
    base_model: str | None = None,
    base_weights: str | None = None,
) -> None:
    """Write adapters as a folder that `peft` loads; it appears complete or not at all.

    Args:
      path: of the folder; must not exist, or be empty.
      adapters: in either layout; with a scalar head if `config` has one.
      config: of the base model.
      lora: description of the adapters.
      base_model: name or folder of the base model, for `peft` to load it.
      base_weights: fingerprint of its weights.

    Raises:
      CheckpointError: `path` exists.
      ConfigError: the adapters do not have the leaves of `config` and `lora`.
    """
    leaves = lazy_leaves(adapters)
    shapes = flatten(lora_shapes(config, lora, layout="unrolled"))
    has_head = config.head == "scalar"
    if has_head:
        shapes[SCALAR_HEAD] = jax.ShapeDtypeStruct((config.embed_dim,), jnp.float32)
    for name in sorted(leaves.keys() ^ shapes.keys()):
        raise ConfigError(
            f"lora: {name} is {'missing' if name in shapes else 'not expected'}; "
            "adapters, configuration and targets do not belong together"
        )
    names = _names(config)
    tensors = {}
    for name, leaf in leaves.items():
        if leaf.shape != shapes[name].shape:
            raise ConfigError(
                f"lora: {name} has the shape {list(leaf.shape)}, but model and rank "
                f"require {list(shapes[name].shape)}"
            )
        if name == SCALAR_HEAD:
            tensors[_HEAD_TENSOR] = lazy_leaf(leaf.read()[None])
        else:
            tensors[_foreign_name(name, names)] = _transposed(leaf)
    settings = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": [_HEAD] if has_head else None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.targets),
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rank_stabilized,
    }
    with new_folder(path) as folder:
        write_safetensors(folder / _TENSORS, tensors)
        write_json(folder / _CONFIG, settings)
        write_context(folder, config)
        write_base(folder, base_model, base_weights)


def _read_tensors(
    folder: pathlib.Path,
) -> tuple[pathlib.Path, dict[str, LazyLeaf]]:
    """Return the file that peft would read, and its tensors."""
    old = folder / _OLD_TENSORS
    if old.is_file() and not (folder / _TENSORS).is_file():
        return old, {name: lazy_leaf(array) for name, array in read_pth(old).items()}
    return folder / _TENSORS, read_safetensors(folder / _TENSORS)


def _read_settings(file: pathlib.Path) -> dict[str, Any]:
    """Return the fields of `adapter_config.json`; refuse what is more than x a b."""
    settings = read_json(file, remedy="copy or download it again")
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {settings.get('peft_type')!r}, but only LORA is "
            "supported; merge the adapter with peft (merge_and_unload) instead"
        )
    for name, value in sorted(settings.items()):
        if name in _READ | _INERT or not value:
            continue
        if name == "bias" and value == "none":
            continue
        if name == "modules_to_save" and set(value) <= {_HEAD, "classifier"}:
            continue  # of a sequence classifier; the tensors show which it has
        raise CheckpointError(
            f"{file}: {name} is {value!r}, which is not supported; merge the adapter "
            "into its model with peft (merge_and_unload), and convert the result"
        )
    init = settings.get("init_lora_weights", True)
    if type(init) is not bool and init not in _INERT_INITS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {init!r}, which changes the base weights; "
            "save plain adapters with peft (path_initial_model_for_weight_conversion)"
        )
    return settings


def _lora(
    file: pathlib.Path,
    tensors: pathlib.Path,
    settings: JsonObject,
    targets: tuple[str, ...],
) -> Lora:
    rank, alpha = settings.get("r"), settings.get("lora_alpha", 0.0)
    stabilized = settings.get("use_rslora", False)
    if type(rank) is not int or type(stabilized) is not bool:
        raise CheckpointError(
            f"{file}: r is {rank!r} and use_rslora {stabilized!r}; they must be an "
            "integer and a boolean, download the file again"
        )
    if type(alpha) is bool or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{file}: lora_alpha is {alpha!r}; it must be a number, download the file "
            "again"
        )
    if not targets:
        raise CheckpointError(f"{tensors}: contains no adapters; download it again")
    try:
        return Lora(rank=rank, alpha=alpha, rank_stabilized=stabilized, targets=targets)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _names(config: LlamaConfig) -> dict[str, str]:
    """Return Hugging Face's name, without `.weight`, of each projection."""
    config = config.replace(head="lm")  # heads have no adapters
    pairs = zip(leaf_paths(config), foreign_names(HUGGING_FACE, config), strict=True)
    return {
        ours: name.removesuffix(".weight")
        for ours, name in pairs
        if ours.endswith("_proj")
    }


def _foreign_name(leaf: str, names: Mapping[str, str]) -> str:
    ours, _, part = leaf.rpartition("/")
    return f"{_PREFIX}{names[ours]}.{_PARTS[part]}"


def _ordered(targets: set[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """Return the targets in the order of a layer's projections."""
    projections = dict.fromkeys(path.rpartition("/")[2] for path in names)
    return tuple(name for name in projections if name in targets)


def _transposed(leaf: LazyLeaf) -> LazyLeaf:
    def read() -> np.ndarray:
        return np.ascontiguousarray(leaf.read().T)

    return LazyLeaf(leaf.shape[::-1], leaf.dtype, read)
