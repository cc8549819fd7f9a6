"""Load models: configuration, weights and tokenizer from any supported format."""

import functools
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.arguments import checked
from llama_jax.checkpoint.device_put import device_put_leaves
from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.checkpoint.model_folder import (
    Loaded,
    is_checkpoint,
    open_params,
    read_config,
    read_tokenizer,
)
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError, TokenizerError
from llama_jax.model.lora import Lora, adapt
from llama_jax.model.quantize import check_kind, quantize_leaf
from llama_jax.model.transformer import Llama, ScalarModel, model_for
from llama_jax.params import SCALAR_HEAD, stack_layers
from llama_jax.runtime import Runtime
from llama_jax.sharding import weight_shardings
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Mesh, Path, PyTree
from llama_jax.weights import Kind

_ASSETS = pathlib.Path(__file__).resolve().parent / "assets"


class Opened(NamedTuple):
    """A model whose weights have not been read.

    Attributes:
      config: of the checkpoint.
      tokenizer: of the checkpoint, or as given.
      leaves: lazily read weights by path, one per layer and weight.
    """

    config: LlamaConfig
    tokenizer: Tokenizer
    leaves: Mapping[str, LazyLeaf]


@checked(ConfigError)
def load(
    path: Path | None = None,
    *,
    runtime: Runtime | None = None,
    mesh: Mesh | None = None,
    tokenizer: Path | Tokenizer | None = None,
    max_seq_len: int | None = None,
    quantize: Kind | None = None,
    adapter: Path | None = None,
) -> Loaded:
    """Load a model: a llama_jax checkpoint, or any that `llama_jax.conversion` reads.

    Weights are read and put on devices one by one. Foreign checkpoints are converted
    in memory; convert those that are loaded often, which is faster.

    Args:
      path: folder or file; defaults to the small model in the package.
      runtime: choices of this run; defaults to `default_runtime()`.
      mesh: devices to shard the weights over.
      tokenizer: a tokenizer or its file; defaults to that in the adapter's folder, or
        the checkpoint's.
      max_seq_len: context length in tokens; defaults to the checkpoint's. Required for
        Meta's format if no published model has these sizes.
      quantize: store the layers' projections in eight or four bits; each is quantized
        before the next is read.
      adapter: folder of LoRA adapters (of `save_adapters` or `peft`), which are not
        merged. Rotary positions that they were trained with replace the checkpoint's,
        and so does a scalar head.

    Returns:
      The model, its parameters and its tokenizer. The model is a `Llama`, or a
      `ScalarModel` if the checkpoint has a scalar head.

    Raises:
      CheckpointError: the checkpoint is missing or damaged.
      ConfigError: its configuration is not understood.
      TokenizerError: there is no tokenizer, or it does not fit the model.
      MeshError: the mesh does not divide the model.

    >>> import llama_jax
    >>> loaded = llama_jax.load()
    >>> loaded.model.config.num_layers, loaded.tokenizer.vocab_size
    (5, 2048)
    """
    opened = open_model(path, tokenizer=tokenizer, max_seq_len=max_seq_len)
    runtime = default_runtime() if runtime is None else runtime
    if adapter is not None:
        from llama_jax.conversion.peft_context import with_context_of

        context = with_context_of(adapter, opened.config, max_seq_len=max_seq_len)
        opened = opened._replace(config=context)
        if tokenizer is None:
            from llama_jax.conversion.peft_text import with_text_of

            text = with_text_of(adapter, opened.tokenizer, context.vocab_size)
            opened = opened._replace(tokenizer=text)
    params = read_weights(opened, runtime=runtime, mesh=mesh, quantize=quantize)
    model = model_for(opened.config, runtime, mesh)
    if adapter is not None:
        adapters, lora = read_adapters(adapter, model)
        if SCALAR_HEAD in adapters:
            params.pop("lm_head", None)
            model = model_for(opened.config.replace(head="scalar"), runtime, mesh)
        params = adapt(params, adapters, lora.scaling)
    return Loaded(model, params, opened.tokenizer)


@checked(ConfigError)
def open_model(
    path: Path | None = None,
    *,
    tokenizer: Path | Tokenizer | None = None,
    max_seq_len: int | None = None,
) -> Opened:
    """Find and check a model without reading its weights.

    Args and Raises: as in `load`.

    >>> import llama_jax
    >>> opened = llama_jax.open_model()
    >>> opened.leaves["transformer/embedding"].shape
    (2048, 192)
    """
    path = bundled() if path is None else pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: does not exist; name a model's folder or file (a llama_jax "
            "checkpoint, or one that `python -m llama_jax.conversion` reads)"
        )
    leaves: Mapping[str, LazyLeaf]
    if is_checkpoint(path):
        config = read_config(path)
        if max_seq_len is not None:
            config = config.replace(max_seq_len=max_seq_len)
        opened_tokenizer = _open_tokenizer(path, tokenizer)
        leaves = open_params(path, config)
    else:
        # Imported here because it is slow to import and rarely needed.
        from llama_jax import conversion

        source = conversion.open_source(path, max_seq_len=max_seq_len)
        config, leaves = source.config, source.leaves()
        if tokenizer is None:
            opened_tokenizer, _ = source.find_tokenizer()
        else:
            opened_tokenizer = _open_tokenizer(path, tokenizer)
    opened_tokenizer.check_fits(config.vocab_size)
    return Opened(config, opened_tokenizer, leaves)


def read_weights(
    opened: Opened,
    *,
    runtime: Runtime,
    mesh: Mesh | None = None,
    quantize: Kind | None = None,
) -> dict[str, PyTree]:
    """Read the weights of an opened model, in the runtime's dtype and layout.

    Args:
      opened: of `open_model`; fields of its config that change no shape may differ.
      runtime: its dtype, layout and sharding rules are used.
      mesh: devices to shard the weights over.
      quantize: store the layers' projections in eight or four bits.

    Returns:
      The tree of parameters.
    """
    quantize_one = None
    if quantize is not None:
        check_kind(quantize)
        quantize_one = functools.partial(quantize_leaf, kind=quantize)
    return device_put_leaves(
        opened.leaves, opened.config, runtime=runtime, mesh=mesh, quantize=quantize_one
    )


def read_adapters(
    path: Path, model: Llama | ScalarModel
) -> tuple[dict[str, PyTree], Lora]:
    """Read the adapters in a PEFT folder, in float32 and the model's layout and mesh.

    A scalar head is among them if the folder has one.

    Raises:
      CheckpointError: they are damaged, of another model, or not plain LoRA.
    """
    from llama_jax.conversion.peft import read_peft

    adapters, lora = read_peft(path, model.config)
    if model.runtime.layer_layout == "stacked":
        adapters = stack_layers(adapters)
    adapters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapters)
    if model.mesh is not None:
        config = model.config
        if SCALAR_HEAD in adapters:
            config = config.replace(head="scalar")
        shardings = weight_shardings(adapters, config, model.runtime, model.mesh)
        adapters = jax.tree.map(jax.device_put, adapters, shardings)
    return adapters, lora


def default_runtime() -> Runtime:
    """Return the choices for this device: float32 on CPU, else bfloat16.

    GPUs without fast bfloat16 (compute capability below 8.0: T4, V100) get float16.

    >>> import llama_jax
    >>> llama_jax.default_runtime().dtype in ("float32", "bfloat16", "float16")
    True
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Runtime(dtype="float32")
    capability = getattr(device, "compute_capability", None)
    if capability is not None and float(capability) < 8.0:
        return Runtime(dtype="float16")
    return Runtime(dtype="bfloat16")


def bundled() -> pathlib.Path:
    """The folder of the small model in the package.

    Raises:
      CheckpointError: the package has no model, or several.
    """
    models = [folder for folder in sorted(_ASSETS.glob("*")) if is_checkpoint(folder)]
    if len(models) != 1:
        raise CheckpointError(
            f"{_ASSETS}: holds {len(models)} models instead of one; install llama-jax "
            "again, or name a model's folder"
        )
    return models[0]


def _open_tokenizer(
    path: pathlib.Path, tokenizer: Path | Tokenizer | None
) -> Tokenizer:
    """The given tokenizer, or the one in the model's folder."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer is not None:
        if pathlib.Path(tokenizer).suffix == ".bin":
            from llama_jax import conversion

            return conversion.open_tokenizer(tokenizer)
        return Tokenizer.from_file(tokenizer)
    own = read_tokenizer(path)
    if own is None:
        raise TokenizerError(
            f"{path}: has no tokenizer.model or tokenizer.json; name one with "
            "--tokenizer FILE (tokenizer=)"
        )
    return own
