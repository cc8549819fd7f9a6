"""`load`: a model, its weights and its tokenizer from a folder, ours or foreign."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
from llama_jax.errors import CheckpointError, TokenizerError
from llama_jax.model.lora import Lora, adapt
from llama_jax.model.quantize import check_kind, quantize_leaf
from llama_jax.model.transformer import Llama, ScalarModel, model_for
from llama_jax.params import stack_layers
from llama_jax.runtime import Runtime
from llama_jax.sharding import weight_shardings
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Mesh, Path
from llama_jax.weights import Kind

_BUNDLED = pathlib.Path(__file__).resolve().parent / "assets"


class Opened(NamedTuple):
    """A model that was found, of whose weights none was read.

    Attributes:
      config: what it is.
      tokenizer: that came with it, or was given.
      leaves: its weights, one for each layer, to be read when they are wanted.
    """

    config: LlamaConfig
    tokenizer: Tokenizer
    leaves: Mapping[str, LazyLeaf]


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
    """Load a checkpoint of ours, or any that `llama_jax.conversion` can read.

    Weights go to their place one by one; of a foreign checkpoint nothing is written.
    One that is loaded often is worth converting: its axes are then moved only once.

    Args:
      path: folder or file; the small model that comes with the package if not given.
      runtime: choices of this run; `default_runtime()` where not given.
      mesh: devices to lay the weights out on.
      tokenizer: or the file of one, in place of the checkpoint's own.
      max_seq_len: in place of the checkpoint's own; Meta's need it where their sizes
        are not those of a published model.
      quantize: hold the layers' projections in eight or four bits; each is quantized
        before the next one is read.
      adapter: a folder of LoRA adapters that stay beside the weights (ours and those
        of `peft`).

    Raises:
      CheckpointError: there is no checkpoint, or a damaged one.
      ConfigError: its configuration is not understood.
      TokenizerError: there is no tokenizer, or it has more pieces than the model ids.
      MeshError: the mesh does not divide the model.
    """
    opened = open_model(path, tokenizer=tokenizer, max_seq_len=max_seq_len)
    runtime = default_runtime() if runtime is None else runtime
    params = read_weights(opened, runtime=runtime, mesh=mesh, quantize=quantize)
    model = model_for(opened.config, runtime, mesh)
    if adapter is not None:
        adapters, lora = read_adapters(adapter, model)
        params = adapt(params, adapters, lora.scaling)
    return Loaded(model, params, opened.tokenizer)


def open_model(
    path: Path | None = None,
    *,
    tokenizer: Path | Tokenizer | None = None,
    max_seq_len: int | None = None,
) -> Opened:
    """Find and check a model; arguments and errors are those of `load`."""
    path = bundled() if path is None else pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such folder; give one with a model (a converted one, "
            "or one that `python -m llama_jax.conversion` can read)"
        )
    leaves: Mapping[str, LazyLeaf]
    if is_checkpoint(path):
        config = read_config(path)
        if max_seq_len is not None:
            config = config.replace(max_seq_len=max_seq_len)
        pieces = _tokenizer(path, tokenizer)
        pieces.check_fits(config.vocab_size)
        leaves = open_params(path, config)
    else:
        # Costs start-up time and is rarely needed.
        from llama_jax import conversion

        source = conversion.open_source(path, max_seq_len=max_seq_len)
        config = source.config
        if tokenizer is None:
            pieces, _ = source.find_tokenizer()
        else:
            pieces = _tokenizer(path, tokenizer)
        pieces.check_fits(config.vocab_size)
        leaves = source.leaves()
    return Opened(config, pieces, leaves)


def read_weights(
    opened: Opened,
    *,
    runtime: Runtime,
    mesh: Mesh | None = None,
    quantize: Kind | None = None,
) -> dict[str, Any]:
    """The weights in the runtime's dtype and layout, each read when the last is placed.

    Args:
      opened: of `open_model`; its config may have been changed where that changes no
        shape.
      runtime: its dtype, layout and rules count.
      mesh: devices to lay them out on.
      quantize: hold the layers' projections in eight or four bits.
    """
    held = None
    if quantize is not None:
        check_kind(quantize)
        held = functools.partial(quantize_leaf, kind=quantize)
    return device_put_leaves(
        opened.leaves, opened.config, runtime=runtime, mesh=mesh, quantize=held
    )


def read_adapters(
    path: Path, model: Llama | ScalarModel
) -> tuple[dict[str, Any], Lora]:
    """The adapters of a PEFT folder in a model's layout, on its devices, in float32.

    Raises:
      CheckpointError: they are damaged, not this model's, or more than x a b.
    """
    from llama_jax.conversion.peft import read_peft

    adapters, lora = read_peft(path, model.config)
    if model.runtime.layer_layout == "stacked":
        adapters = stack_layers(adapters)
    adapters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), adapters)
    if model.mesh is not None:
        places = weight_shardings(adapters, model.config, model.runtime, model.mesh)
        adapters = jax.tree.map(jax.device_put, adapters, places)
    return adapters, lora


def default_runtime() -> Runtime:
    """What suits the devices here: float32 on CPU, else bfloat16 where it is fast.

    GPUs before compute capability 8.0 (T4, V100) get float16.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Runtime(dtype="float32")
    capability = getattr(device, "compute_capability", None)
    if capability is not None and float(capability) < 8.0:
        return Runtime(dtype="float16")
    return Runtime(dtype="bfloat16")


def bundled() -> pathlib.Path:
    """The folder of the small model that comes with the package.

    Raises:
      CheckpointError: it is not there, or not the only one.
    """
    found = [folder for folder in sorted(_BUNDLED.glob("*")) if is_checkpoint(folder)]
    if len(found) != 1:
        raise CheckpointError(
            f"{_BUNDLED}: should hold one model, but holds {len(found)}; install "
            "llama-jax again, or name a model's folder"
        )
    return found[0]


def _tokenizer(path: pathlib.Path, given: Path | Tokenizer | None) -> Tokenizer:
    if isinstance(given, Tokenizer):
        return given
    if given is not None and pathlib.Path(given).suffix == ".bin":
        from llama_jax import conversion

        return conversion.open_tokenizer(given)
    found = read_tokenizer(path) if given is None else Tokenizer.from_file(given)
    if found is None:
        raise TokenizerError(
            f"{path}: has no tokenizer.model or tokenizer.json; name one with "
            "--tokenizer FILE (tokenizer=)"
        )
    return found
