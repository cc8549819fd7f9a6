"""Every module of the library, in the checkout or as installed."""

import importlib.util
import pathlib

FOLDERS = {
    name: pathlib.Path(spec.origin).parent
    for name in ("llama_jax", "llama_jax.kernels", "llama_jax.conversion")
    if (spec := importlib.util.find_spec(name)) and spec.origin
}


def modules() -> dict[str, pathlib.Path]:
    """Every module of the library by its full name."""
    files = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if "assets" not in parts:
                name = ".".join((package, *parts)).removesuffix(".__init__")
                files[name] = file
    return files


MODULES = modules()
