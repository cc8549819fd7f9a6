"""Where arrays lie on a mesh: axis letters, read through the rules of a `Runtime`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.cache import KVCache
from llama_jax.config import LlamaConfig
from llama_jax.errors import MeshError
from llama_jax.params import Head, axes_of, leaf_paths, unflatten
from llama_jax.runtime import MESH_AXES, MeshAxes, Rules, Runtime
from llama_jax.types import Array, Mesh


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=1,fsdp=-1,tensor=4"` to sizes by axis; -1 takes what devices are left.

    Raises:
      MeshError: an axis that does not exist, a size that is none, or two -1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name in sizes:
            raise MeshError(f"mesh {text!r}: {name!r} is there twice")
        try:
            sizes[name] = int(size)
        except ValueError:
            sizes[name] = 0
        _check_axis(repr(text), name, size, sizes[name])
    _check_left_over(repr(text), sizes)
    return sizes


def _check_axis(mesh: str, name: str, written: object, size: int) -> None:
    if name not in MESH_AXES:
        raise MeshError(
            f"mesh {mesh}: {name!r} is not an axis; there are "
            f"{', '.join(MESH_AXES)}, written as in tensor=4"
        )
    if size < 1 and size != -1:
        raise MeshError(
            f"mesh {mesh}: {name}={written} is not a size; write a positive number, "
            "or -1 for the devices that are left"
        )


def _check_left_over(mesh: str, sizes: Mapping[str, int]) -> None:
    if list(sizes.values()).count(-1) > 1:
        raise MeshError(f"mesh {mesh}: only one axis can be -1")


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes data, fsdp, sequence and tensor over all devices.

    Args:
      sizes: size by axis; an absent axis is 1, one may be -1 (what is left).
      devices: which, in what order; all of this process's backend where not given.

    Raises:
      MeshError: an axis that does not exist, a size that is none, two -1, or sizes
        that do not multiply to the number of devices.
    """
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    for name, size in sizes.items():
        _check_axis(given, name, size, size)
    _check_left_over(given, sizes)
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(name, 1) for name in MESH_AXES]
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // fixed, 1)
    if math.prod(shape) != len(devices):
        wanted = ", ".join(f"{n}={s}" for n, s in zip(MESH_AXES, shape, strict=True))
        raise MeshError(
            f"mesh {wanted} needs {math.prod(shape)} devices, but there are "
            f"{len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)


def spec(axes: str, rules: tuple[tuple[str, MeshAxes], ...]) -> PartitionSpec:
    """The placement of an array whose axes are these letters: `"D NH"` and so on."""
    table = dict(rules)
    names = [table.get(letter) for letter in axes.split()]
    return PartitionSpec(*(n[0] if n and len(n) == 1 else n for n in names))


def constrain(x: Array, axes: str, rules: Rules, mesh: Mesh | None) -> Array:
    """`x`, placed by its letters; unchanged where there is no mesh.

    A dimension that its mesh axes do not divide (a batch of one, a single query)
    is replicated: that is a fact of the request, not a mistake.
    """
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, divisible(x, axes, rules, mesh))
    return jax.lax.with_sharding_constraint(x, sharding)


def keep_layout(x: Array, axes: str, rules: Rules, mesh: Mesh | None) -> Array:
    """`x`, in memory as arrays lie by default: last axis innermost.

    For what is written in place: the compiler may not turn it within a program.
    """

    def pinned(x: Array) -> Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    if mesh is None:
        return pinned(x)
    # Device by device, since the partitioner of jax 0.7 would gather `x` for it.
    place = divisible(x, axes, rules, mesh)
    return jax.shard_map(
        pinned, mesh=mesh, in_specs=place, out_specs=place, check_vma=False
    )(x)


def divisible(x: Array, axes: str, rules: Rules, mesh: Mesh) -> PartitionSpec:
    """The placement of an activation; an axis that is not divisible stays whole."""
    wanted = [
        names if names and x.shape[index] % axes_size(mesh, names) == 0 else None
        for index, names in enumerate(spec(axes, rules.activations))
    ]
    return PartitionSpec(*wanted)


def param_shardings(
    config: LlamaConfig, runtime: Runtime, mesh: Mesh, *, head: Head = "lm_head"
) -> dict[str, Any]:
    """The tree of `NamedSharding`s of a model's weights on a mesh.

    K heads fewer than the `tensor` axis are replicated (in whole).

    Raises:
      MeshError: a mesh axis does not divide the axis of a weight that it splits.
    """
    sizes = {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "NH": config.num_heads,  # heads are split whole
        "KH": config.num_kv_heads,
        "F": config.mlp_dim,
    }
    flat = {}
    for path in leaf_paths(config, runtime.layer_layout, head):
        axes = axes_of(path)
        entries = list(spec(axes, runtime.rules.weights))
        for index, letter in enumerate(axes.split()):
            names = entries[index]
            ways = axes_size(mesh, names) if names else 1
            if ways == 1 or sizes[letter] % ways == 0:
                continue
            if letter == "V" or (letter == "KH" and sizes[letter] < ways):
                entries[index] = None
                continue
            raise MeshError(
                f"{path}: axis {letter} of {sizes[letter]} is not divisible by mesh "
                f"axis {names} of {ways}; change --mesh"
            )
        flat[path] = NamedSharding(mesh, PartitionSpec(*entries))
    return unflatten(flat)


def cache_shardings(
    config: LlamaConfig, runtime: Runtime, mesh: Mesh, batch: int
) -> KVCache:
    """The placement of a cache: rows over `data` and `fsdp`, heads over `tensor`."""
    entries: list[Any] = list(spec("B K S H", runtime.rules.activations))
    for index, size in enumerate((batch, config.num_kv_heads)):
        if entries[index] and size % axes_size(mesh, entries[index]):
            entries[index] = None
    layer = NamedSharding(mesh, PartitionSpec(*entries))
    layers = (layer,) * config.num_layers
    return KVCache(layers, layers, NamedSharding(mesh, PartitionSpec()))  # type: ignore[arg-type]


def axes_size(mesh: Mesh, names: str | MeshAxes) -> int:
    """How many parts these axes of a mesh make."""
    names = (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names)
