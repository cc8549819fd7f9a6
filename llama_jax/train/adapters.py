"""Trained adapters on disk: saved on their own, and merged into their model on demand.

An adapter's folder is that of the `peft` package, so both read it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.config import LlamaConfig
from llama_jax.conversion.peft import read_peft, write_peft
from llama_jax.distributed import barrier, is_main, to_host
from llama_jax.loading import open_model
from llama_jax.model.lora import Lora, merge
from llama_jax.params import flatten, unflatten
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Params, Path


def save_adapters(
    path: Path,
    adapters: Params,
    config: LlamaConfig,
    lora: Lora,
    *,
    base_model: str | None = None,
) -> None:
    """Write adapters, in either layout; of several processes all must call this.

    Args:
      path: of the folder; must not exist, or be empty.
      adapters: that were trained.
      config: of their model.
      lora: what they are.
      base_model: where their model is.

    Raises:
      CheckpointError: there is something at `path`.
    """
    whole = to_host(adapters)
    if is_main():
        write_peft(path, whole, config, lora, base_model=base_model)
    barrier("the adapters are saved")


def merge_checkpoint(
    base: Path | None,
    adapter: Path,
    output: Path,
    *,
    tokenizer: Path | Tokenizer | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the model that does what base and adapter do together, weight by weight.

    In the dtype of the base, and as any model of ours: without an adapter.

    Args:
      base: any model that `load` takes.
      adapter: folder of `save_adapters` or of `peft`.
      output: new folder.
      tokenizer: in place of the base's own.
      progress: told of the bytes that are written.

    Raises:
      CheckpointError: one of them is missing or damaged, they do not belong together,
        or there is something at `output`.
    """
    opened = open_model(base, tokenizer=tokenizer)
    adapters, lora = read_peft(adapter, opened.config)
    leaves = merged_leaves(opened.leaves, adapters, lora)
    save_params(
        output, leaves, opened.config, tokenizer=opened.tokenizer, progress=progress
    )


def merged_leaves(
    leaves: Mapping[str, LazyLeaf], adapters: Params, lora: Lora
) -> dict[str, LazyLeaf]:
    """The weights with their adapters in them, each computed when it is read."""
    flat = flatten(adapters)

    def merged(path: str, leaf: LazyLeaf) -> LazyLeaf:
        if f"{path}/a" not in flat:
            return leaf
        own = {f"{path}/{name}": flat[f"{path}/{name}"] for name in "ab"}

        def read() -> np.ndarray:
            weight: Any = jnp.asarray(leaf.read())
            found = merge(unflatten({path: weight}), unflatten(own), lora.scaling)
            return np.asarray(flatten(found)[path])

        return dataclasses.replace(
            leaf, read=read, host_bytes=leaf.host_bytes + leaf.nbytes
        )

    return {path: merged(path, leaf) for path, leaf in leaves.items()}
