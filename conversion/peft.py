"""Folders of the `peft` package: adapters and their settings, read and written.

`adapter_config.json` says what they are, `adapter_model.safetensors` holds them under
Hugging Face's names of the weights, with lora_A [R, I] and lora_B [O, R]. Rotary pairs
lie half a head apart there as they do here, so that nothing is permuted.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.atomic_write import new_folder
from llama_jax.checkpoint.json_files import read_json, write_json
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, lazy_leaves
from llama_jax.config import LlamaConfig
from llama_jax.conversion.safetensors import read_safetensors, write_safetensors
from llama_jax.conversion.tensor_mapping import foreign_names
from llama_jax.conversion.tensor_tables import HUGGING_FACE
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.model.lora import Lora, lora_shapes
from llama_jax.params import flatten, leaf_paths, unflatten
from llama_jax.types import Params, Path

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight"}

# What says nothing about the numbers, or only how they were drawn and trained.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",  # of embeddings and heads with adapters, which are refused
    "eva_config",
    "exclude_modules",  # the tensors say which are there
    "inference_mode",
    "layers_pattern",  # only together with layers_to_transform
    "lora_dropout",
    "megatron_core",  # only together with megatron_config
    "peft_version",
    "qalora_group_size",  # only together with use_qalora
    "revision",
    "runtime_config",
    "target_modules",  # as above
    "task_type",
}
_READ = {"init_lora_weights", "lora_alpha", "peft_type", "r", "use_rslora"}
# These leave the model's weights as they are; others (PiSSA, OLoRA, ...) change them.
_FIRST_NUMBERS = ("gaussian", "eva", "orthogonal")


def read_peft(path: Path, config: LlamaConfig) -> tuple[dict[str, Any], Lora]:
    """The adapters of a folder that `peft` saved, and what they are.

    Args:
      path: of the folder.
      config: of the model that they belong to.

    Returns:
      Unrolled adapters on the default device, in the file's dtype. `lora.scaling` is
      what `lora.adapt` wants besides.

    Raises:
      CheckpointError: a file is missing or damaged; the adapters are not this model's;
        or they are of a kind that is more than x a b (DoRA, biases, whole modules, a
        rank of its own for some layers).
    """
    folder = pathlib.Path(path)
    facts = _read_facts(folder / _CONFIG)
    tensors = read_safetensors(folder / _TENSORS)
    names = _names(config)
    known = {
        f"{_PREFIX}{name}.{part}": f"{ours}/{leaf}"
        for ours, name in names.items()
        for leaf, part in _PARTS.items()
    }
    if unknown := sorted(tensors.keys() - known.keys()):
        raise CheckpointError(
            f"{folder / _TENSORS}: holds {unknown[0]}, which is no adapter of a "
            f"projection of this model's {config.num_layers} layers; only those can be "
            "read"
        )
    found = {known[name]: tensor for name, tensor in tensors.items()}
    targets = {leaf.split("/")[-2] for leaf in found}
    lora = _lora(folder / _CONFIG, facts, tuple(_in_order(targets, names)))
    wanted = flatten(lora_shapes(config, lora, layout="unrolled"))
    if missing := [leaf for leaf in wanted if leaf not in found]:
        raise CheckpointError(
            f"{folder / _TENSORS}: lacks {_foreign(missing[0], names)}; adapters of "
            "some layers only cannot be read"
        )
    adapters = {}
    for leaf, shape in wanted.items():
        tensor = found[leaf]
        if tensor.shape != shape.shape[::-1]:
            raise CheckpointError(
                f"{folder / _TENSORS}: {_foreign(leaf, names)} has the shape "
                f"{list(tensor.shape)}, but model and rank make it "
                f"{list(shape.shape[::-1])}; do they belong together?"
            )
        adapters[leaf] = jnp.asarray(np.ascontiguousarray(tensor.read().T))
    return unflatten(adapters), lora


def write_peft(
    path: Path,
    adapters: Params,
    config: LlamaConfig,
    lora: Lora,
    *,
    base_model: str | None = None,
) -> None:
    """Write adapters as a folder that `peft` loads; it appears complete or not at all.

    Args:
      path: of the folder; must not exist, or be empty.
      adapters: in either layout.
      config: of the model that they belong to.
      lora: what they are.
      base_model: name or folder of that model, for `peft` to find it by itself.

    Raises:
      CheckpointError: there is something at `path`.
      ConfigError: the adapters are not of this model and kind.
    """
    leaves = lazy_leaves(adapters)
    wanted = flatten(lora_shapes(config, lora, layout="unrolled"))
    for name in sorted(leaves.keys() ^ wanted.keys()):
        raise ConfigError(
            f"lora: {name} is {'missing' if name in wanted else 'not expected'}; "
            "adapters, configuration and targets do not belong together"
        )
    names = _names(config)
    tensors = {}
    for name, leaf in leaves.items():
        if leaf.shape != wanted[name].shape:
            raise ConfigError(
                f"lora: {name} has the shape {list(leaf.shape)}, but model and rank "
                f"make it {list(wanted[name].shape)}"
            )
        tensors[_foreign(name, names)] = _turned(leaf)
    facts = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rank_stabilized,
    }
    with new_folder(path) as folder:
        for _ in write_safetensors(folder / _TENSORS, tensors):
            pass
        write_json(folder / _CONFIG, facts)


def _read_facts(file: pathlib.Path) -> dict[str, Any]:
    """The fields of `adapter_config.json`, if none asks for more than x a b."""
    facts = read_json(file)
    if facts.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {facts.get('peft_type')!r}; only LORA can be read"
        )
    for name, value in sorted(facts.items()):
        if name in _READ | _WITHOUT_EFFECT or not value:
            continue
        if name == "bias" and value == "none":
            continue
        raise CheckpointError(
            f"{file}: {name} is {value!r}, which this library does not do; merge the "
            "adapter into its model with peft (merge_and_unload), and convert that"
        )
    first = facts.get("init_lora_weights", True)
    if type(first) is not bool and first not in _FIRST_NUMBERS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {first!r}, which changes the model's own "
            "weights; save it as plain adapters with peft "
            "(path_initial_model_for_weight_conversion)"
        )
    return facts


def _lora(file: pathlib.Path, facts: Mapping[str, Any], targets: tuple) -> Lora:
    rank, alpha = facts.get("r"), facts.get("lora_alpha", 0.0)
    stabilized = facts.get("use_rslora", False)
    if type(rank) is not int or type(stabilized) is not bool:
        raise CheckpointError(
            f"{file}: r is {rank!r} and use_rslora {stabilized!r}, instead of a whole "
            "number and true or false; download it again"
        )
    if type(alpha) is bool or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{file}: lora_alpha is {alpha!r}, which is no number; download it again"
        )
    if not targets:
        raise CheckpointError(f"{file}: there are no adapters beside it")
    try:
        return Lora(rank=rank, alpha=alpha, rank_stabilized=stabilized, targets=targets)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _names(config: LlamaConfig) -> dict[str, str]:
    """Hugging Face's name, without `.weight`, of each projection."""
    pairs = zip(leaf_paths(config), foreign_names(HUGGING_FACE, config), strict=True)
    return {
        ours: name.removesuffix(".weight")
        for ours, name in pairs
        if ours.endswith("_proj")
    }


def _foreign(leaf: str, names: Mapping[str, str]) -> str:
    ours, _, part = leaf.rpartition("/")
    return f"{_PREFIX}{names[ours]}.{_PARTS[part]}"


def _in_order(targets: set[str], names: Mapping[str, str]) -> list[str]:
    """The targets, as they come in a layer."""
    every = dict.fromkeys(path.rpartition("/")[2] for path in names)
    return [name for name in every if name in targets]


def _turned(leaf: LazyLeaf) -> LazyLeaf:
    def read() -> np.ndarray:
        return np.ascontiguousarray(leaf.read().T)

    return LazyLeaf(leaf.shape[::-1], leaf.dtype, read)
