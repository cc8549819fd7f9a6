"""Adapters on disk, in the format of `peft`, and merged into their model."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from llama_jax.arguments import checked
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress, lazy_leaf
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.config import LlamaConfig
from llama_jax.conversion.peft import read_peft, write_peft
from llama_jax.conversion.peft_context import with_context_of
from llama_jax.conversion.peft_text import with_text_of
from llama_jax.distributed import barrier, is_main, to_host
from llama_jax.errors import ConfigError
from llama_jax.loading import open_model
from llama_jax.model.lora import Lora, merge
from llama_jax.params import SCALAR_HEAD, flatten, unflatten
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Params, Path


@checked(ConfigError)
def save_adapters(
    path: Path,
    adapters: Params,
    config: LlamaConfig,
    lora: Lora,
    *,
    base_model: str | None = None,
    base_weights: str | None = None,
) -> None:
    """Save adapters in a folder of `peft`; with several processes all must call this.

    Args:
      path: of the folder; must not exist, or be empty.
      adapters: tree of adapters, in either layout; with a scalar head if the model
        has one.
      config: of their model.
      lora: their configuration.
      base_model: path or name of their model.
      base_weights: fingerprint of its weights, see `checkpoint.fingerprint`.

    Raises:
      CheckpointError: `path` exists or cannot be written.

    >>> import pathlib, tempfile, jax, llama_jax
    >>> config = llama_jax.load().model.config
    >>> lora = llama_jax.Lora(rank=2, alpha=4.0, targets=("q_proj",))
    >>> adapters = llama_jax.init_lora(config, jax.random.key(0), lora)
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "adapter"
    >>> save_adapters(folder, adapters, config, lora)
    >>> loaded = llama_jax.load(adapter=folder)
    """
    on_host = to_host(adapters)
    if is_main():
        write_peft(
            path,
            on_host,
            config,
            lora,
            base_model=base_model,
            base_weights=base_weights,
        )
    barrier("the adapters are saved")


@checked(ConfigError)
def merge_checkpoint(
    base: Path | None,
    adapter: Path,
    output: Path,
    *,
    tokenizer: Path | Tokenizer | None = None,
    progress: Progress | None = None,
) -> None:
    """Merge an adapter into its model, one weight at a time, and save the result.

    Args:
      base: any model that `load` takes; None is the bundled one.
      adapter: folder of `save_adapters` or of `peft`.
      output: new folder, for a model in the dtype of the base.
      tokenizer: instead of the adapter's or the base's.
      progress: called with the bytes written so far.

    Raises:
      CheckpointError: one of them is missing or damaged, or has numbers that are not
        finite, they do not belong together, or `output` exists.

    >>> import pathlib, tempfile, jax, llama_jax
    >>> config = llama_jax.load().model.config
    >>> lora = llama_jax.Lora(rank=2, alpha=4.0, targets=("q_proj",))
    >>> adapters = llama_jax.init_lora(config, jax.random.key(0), lora)
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> save_adapters(folder / "adapter", adapters, config, lora)
    >>> merge_checkpoint(None, folder / "adapter", folder / "merged")
    >>> llama_jax.load(folder / "merged").model.config == config
    True
    """
    opened = open_model(base, tokenizer=tokenizer)
    adapters, lora = read_peft(adapter, opened.config)
    checked = {
        name: leaf.checked("the base model" if base is None else base, name)
        for name, leaf in opened.leaves.items()
    }
    leaves = merged_leaves(checked, adapters, lora)
    config = with_context_of(adapter, opened.config)
    if SCALAR_HEAD in adapters:
        config = config.replace(head="scalar")
        leaves.pop("lm_head", None)
    text = opened.tokenizer
    if tokenizer is None:
        text = with_text_of(adapter, text, config.vocab_size)
    save_params(output, leaves, config, tokenizer=text, progress=progress)


def merged_leaves(
    leaves: Mapping[str, LazyLeaf], adapters: Params, lora: Lora
) -> dict[str, LazyLeaf]:
    """The weights with adapters merged into them, each computed when it is read.

    Args:
      leaves: one per layer and weight.
      adapters: unrolled; a scalar head among them is added.
      lora: their configuration.
    """
    flat = flatten(adapters)

    def merged(path: str, leaf: LazyLeaf) -> LazyLeaf:
        if f"{path}/a" not in flat:
            return leaf
        adapter = {f"{path}/{name}": flat[f"{path}/{name}"] for name in "ab"}

        def read() -> np.ndarray:
            weight = jnp.asarray(leaf.read())
            tree = merge(unflatten({path: weight}), unflatten(adapter), lora.scaling)
            return np.asarray(flatten(tree)[path])

        return dataclasses.replace(
            leaf, read=read, host_bytes=leaf.host_bytes + leaf.nbytes
        )

    head = {SCALAR_HEAD: lazy_leaf(flat[SCALAR_HEAD])} if SCALAR_HEAD in flat else {}
    return {path: merged(path, leaf) for path, leaf in leaves.items()} | head
