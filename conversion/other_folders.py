"""Say what a path is if it is not the checkpoint or adapter that it was given as."""

import json
import pathlib
from collections.abc import Callable, Iterator

from llama_jax.file_kinds import check_file

ADAPTER_CONFIG = "adapter_config.json"
_RUN = "run.json"  # of a training run, whose results are in these folders:
_RESULTS = ("model", "adapter", "best")
_FOLDER_FILES = (".safetensors", ".pth", ".json")
_MODEL_FILES = ("config.json", "params.json", "*.safetensors", "*.pth", "*.gguf")


def why_no_checkpoint(
    path: pathlib.Path, is_checkpoint: Callable[[pathlib.Path], bool]
) -> str:
    """Return the problem with a path that no reader of checkpoints recognizes.

    Args:
      path: a file or folder that exists.
      is_checkpoint: whether a reader recognizes a path.

    Raises:
      CheckpointError: it is a file of a kind that `check_file` recognizes.
    """
    if path.is_file():
        if path.suffix in _FOLDER_FILES:
            return f"is one file of a checkpoint; name its folder, {path.parent}"
        check_file(path, "GGUF")
        return f"is not a checkpoint; {_KNOWN}"
    if (path / ADAPTER_CONFIG).is_file():
        return (
            f"is an adapter, not a model; give it together with its base model"
            f"{_base_of(path)}: --checkpoint BASE --adapter {path} (adapter=), or join "
            "the two with `python -m llama_jax.finetune merge`"
        )
    if run := _run_of(path):
        return _why_run(run)
    if inner := list(_inner_checkpoints(path, is_checkpoint)):
        return f"is not a checkpoint, but contains one; name {_choices(inner)}"
    if broken := [file.name for file in sorted(path.iterdir()) if _is_broken(file)]:
        return (
            f"{broken[0]} is a link to a file that does not exist; finish the "
            "download, or copy the files that the links mean (cp -L)"
        )
    if (path / "config.json").is_file():
        return (
            "has a config.json, but no weights (*.safetensors, pytorch_model*.bin); "
            "download them too"
        )
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return "has weights, but no config.json; download it too"
    if not any(path.iterdir()):
        return "is an empty folder; name the folder of a checkpoint"
    return f"is not a checkpoint of a known format; {_KNOWN}"


def why_no_adapter(path: pathlib.Path) -> str:
    """Return the problem with a path that has no `adapter_config.json`."""
    if not path.exists():
        return "does not exist; name the folder of an adapter"
    if path.is_file():
        return f"is a file; name the folder of the adapter, {path.parent}"
    if run := _run_of(path):
        return _why_run(run)
    if inner := list(_inner_checkpoints(path, _is_adapter)):
        return f"is not an adapter, but contains one; name {_choices(inner)}"
    if any(path.glob("adapter_model.*")):
        return f"has no {ADAPTER_CONFIG}; download it too"
    if any(next(path.glob(name), None) for name in _MODEL_FILES):
        return f"is a model, not an adapter; give it as --checkpoint {path}"
    return (
        f"has no {ADAPTER_CONFIG}; name a folder that peft or `python -m "
        "llama_jax.finetune --method lora` wrote"
    )


_KNOWN = (
    "name a folder of this library, of Meta's (params.json, consolidated.00.pth) or of "
    "Hugging Face's (config.json, *.safetensors), a .gguf file, or a .bin file of "
    "llama2.c"
)


def _is_adapter(path: pathlib.Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file()


def _is_broken(path: pathlib.Path) -> bool:
    return path.is_symlink() and not path.exists()


def _base_of(adapter: pathlib.Path) -> str:
    """Return the base model that an adapter names, in parentheses."""
    try:
        name = json.loads((adapter / ADAPTER_CONFIG).read_text("utf-8")).get(
            "base_model_name_or_path"
        )
    except (OSError, ValueError, AttributeError):
        name = None
    return f" ({name})" if isinstance(name, str) and name.isprintable() else ""


def _run_of(path: pathlib.Path) -> pathlib.Path | None:
    """Return the training run that a folder is, or is a training checkpoint of."""
    folders = (path, path.parent, path.parent.parent)
    return next((folder for folder in folders if (folder / _RUN).is_file()), None)


def _why_run(run: pathlib.Path) -> str:
    results = [run / name for name in _RESULTS if (run / name).is_dir()]
    if not results:
        return (
            "belongs to a training run that has no result yet; resume it with the "
            f"command that started it, and --resume --output {run}"
        )
    adapters = [path for path in results if _is_adapter(path)]
    if adapters:
        flags = "--checkpoint BASE --adapter "
        return f"belongs to a training run; give {flags}{_choices(adapters)}"
    return f"belongs to a training run; give --checkpoint {_choices(results)}"


def _inner_checkpoints(
    path: pathlib.Path, is_checkpoint: Callable[[pathlib.Path], bool]
) -> Iterator[pathlib.Path]:
    """Yield GGUF files and subfolders with a checkpoint, also of a hub's cache."""
    for inner in [path, *sorted(path.iterdir())]:
        if inner != path and is_checkpoint(inner):
            yield inner
        elif (snapshots := inner / "snapshots").is_dir():
            main = inner / "refs" / "main"
            current = main.read_text().strip() if main.is_file() else ""
            folders = filter(is_checkpoint, sorted(snapshots.iterdir()))
            # The snapshot that the main branch was at first.
            yield from sorted(folders, key=lambda folder: folder.name != current)


def _choices(paths: list[pathlib.Path]) -> str:
    more = f" (there are {len(paths) - 3} more)" if len(paths) > 3 else ""
    return " or ".join(map(str, paths[:3])) + more
