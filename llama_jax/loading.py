"""`load`: a model, its weights and its tokenizer from a folder, ours or foreign."""

import os
import pathlib

import jax

from llama_jax.checkpoint import (
    Loaded,
    is_checkpoint,
    load_params,
    place_params,
    read_config,
    read_tokenizer,
)
from llama_jax.errors import CheckpointError, TokenizerError
from llama_jax.model import Llama
from llama_jax.runtime import Runtime
from llama_jax.tokenizer import Tokenizer
from llama_jax.types import Mesh

Path = str | os.PathLike[str]

_BUNDLED = pathlib.Path(__file__).resolve().parent / "assets"


def load(
    path: Path | None = None,
    *,
    runtime: Runtime | None = None,
    mesh: Mesh | None = None,
    tokenizer: Path | Tokenizer | None = None,
    max_seq_len: int | None = None,
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

    Raises:
      CheckpointError: there is no checkpoint, or a damaged one.
      ConfigError: its configuration is not understood.
      TokenizerError: there is no tokenizer, or it has more pieces than the model ids.
      MeshError: the mesh does not divide the model.
    """
    path = bundled() if path is None else pathlib.Path(path)
    runtime = default_runtime() if runtime is None else runtime
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such folder; give one with a model (a converted one, "
            "or one that `python -m llama_jax.conversion` can read)"
        )
    if is_checkpoint(path):
        config = read_config(path)
        if max_seq_len is not None:
            config = config.replace(max_seq_len=max_seq_len)
        pieces = _tokenizer(path, tokenizer)
        pieces.check_fits(config.vocab_size)
        params = load_params(path, config, runtime=runtime, mesh=mesh)
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
        params = place_params(leaves, config, runtime=runtime, mesh=mesh)
    return Loaded(Llama(config, runtime, mesh), params, pieces)


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
