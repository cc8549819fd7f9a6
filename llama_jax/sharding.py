"""Where arrays lie on a mesh: axis letters, read through the rules of a `Runtime`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.config import LlamaConfig
from llama_jax.errors import MeshError
from llama_jax.params import axes_of, axis_sizes, flatten, leaf_paths, unflatten
from llama_jax.runtime import MESH_AXES, MeshAxes, Rules, Runtime
from llama_jax.types import AnyMesh, Array, Mesh, Params
from llama_jax.weights import Adapted, Quantized


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
    return PartitionSpec(*(_entry(table.get(letter) or ()) for letter in axes.split()))


def constrain(x: Array, axes: str, rules: Rules, mesh: Mesh | None) -> Array:
    """`x`, placed by its letters; unchanged where there is no mesh.

    A dimension that its mesh axes do not divide (a batch of one, a single query)
    is whole: that is a fact of the request, not a mistake.
    """
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, divisible(x.shape, axes, rules, mesh))
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
    place = divisible(x.shape, axes, rules, mesh)
    return jax.shard_map(
        pinned, mesh=mesh, in_specs=place, out_specs=place, check_vma=False
    )(x)


def divisible(
    shape: Sequence[int], axes: str, rules: Rules, mesh: AnyMesh
) -> PartitionSpec:
    """The placement of an activation of this shape.

    Where the mesh axes of a letter do not divide its size together, the last of them
    are left out. Where K is not divided, S takes its axes: then each device has some
    slots of all heads.
    """
    letters = axes.split()
    sizes = dict(zip(letters, shape, strict=True))
    table = dict(rules.activations)
    cut = {one: _dividing(sizes[one], table.get(one) or (), mesh) for one in letters}
    if {"K", "S"} <= sizes.keys():
        left = tuple(axis for axis in table.get("K") or () if axis not in cut["K"])
        cut["S"] = _dividing(sizes["S"], (*(table.get("S") or ()), *left), mesh)
    return PartitionSpec(*(_entry(cut[letter]) for letter in letters))


def _dividing(size: int, names: MeshAxes, mesh: AnyMesh) -> MeshAxes:
    """As many of these mesh axes as divide a size together, the first ones first."""
    while names and size % axes_size(mesh, names):
        names = names[:-1]
    return names


def _entry(names: MeshAxes) -> str | MeshAxes | None:
    return names[0] if len(names) == 1 else names or None


def param_shardings(
    config: LlamaConfig, runtime: Runtime, mesh: AnyMesh
) -> dict[str, Any]:
    """The tree of `NamedSharding`s of a model's weights on a mesh.

    Heads are split whole, but for K heads fewer than the `tensor` axis: those weights
    are cut within heads, whose parts are put together behind the product. Vectors are
    whole everywhere: gathering one takes longer than holding it.

    Raises:
      MeshError: a mesh axis does not divide the axis of a weight that it splits.
    """
    flat = {}
    for path in leaf_paths(config, runtime.layer_layout):
        try:
            place = weight_spec(axes_of(path), config, runtime.rules, mesh)
        except MeshError as error:
            raise MeshError(f"{path}: {error}") from None
        flat[path] = NamedSharding(mesh, place)
    return unflatten(flat)


def weight_spec(
    axes: str, config: LlamaConfig, rules: Rules, mesh: AnyMesh
) -> PartitionSpec:
    """The placement of a weight whose axes are these letters.

    Raises:
      MeshError: a mesh axis does not divide the axis of the weight that it splits.
    """
    if axes in ("D", "L D"):
        return PartitionSpec(*(None for _ in axes.split()))
    heads = {"NH": config.num_heads, "KH": config.num_kv_heads}
    entries = list(spec(axes, rules.weights))
    for index, letter in enumerate(axes.split()):
        names, width = entries[index], axis_sizes(config)[letter]
        ways = axes_size(mesh, names) if names else 1
        size = heads.get(letter, width)
        within = letter == "KH" and size < ways
        if ways == 1 or size % ways == 0 or (within and width % ways == 0):
            continue
        if letter != "V" and not within:
            raise MeshError(
                f"axis {letter} of {size} is not divisible by mesh axis {names} of "
                f"{ways}; change --mesh"
            )
        entries[index] = None
    return PartitionSpec(*entries)


def weight_shardings(
    tree: Params,
    config: LlamaConfig,
    runtime: Runtime,
    mesh: Mesh,
) -> dict[str, Any]:
    """The same tree with a `NamedSharding` for each array of it.

    For trees with quantized or adapted weights, and for trees of adapters. Bits lie as
    the weight would (`param_shardings`), scales along outputs as it does, and along
    groups of inputs where they can be split alike; an adapter's a [I, R] as I, its b
    [R, O] as O.

    Args:
      tree: of arrays or of their shapes, in the runtime's layout.
      config: of the model.
      runtime: its layout and its rules count.
      mesh: the devices.

    Raises:
      MeshError: a mesh axis does not divide the axis of a weight that it splits.
    """
    places = flatten(param_shardings(config, runtime, mesh))

    def place(*entries: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*entries))

    def placed(path: str, leaf: Any) -> Any:
        weight, _, name = path.rpartition("/")
        if weight in places:  # of an adapter's a or b
            *layers, inputs, outputs = places[weight].spec
            return place(*layers, *((inputs, None) if name == "a" else (None, outputs)))
        if isinstance(leaf, Adapted):
            a, b = placed(f"{path}/a", leaf.a), placed(f"{path}/b", leaf.b)
            base = placed(path, leaf.base)
            return dataclasses.replace(leaf, base=base, a=a, b=b)
        if not isinstance(leaf, Quantized):
            return places[path]
        *layers, inputs, outputs = places[path].spec
        scales = place(*layers, outputs)
        if leaf.scales.ndim == len(leaf.shape):
            ways = axes_size(mesh, inputs) if inputs else 1
            alike = leaf.scales.shape[-2] % ways == 0
            scales = place(*layers, inputs if alike else None, outputs)
        return dataclasses.replace(leaf, values=places[path], scales=scales)

    return unflatten({path: placed(path, leaf) for path, leaf in flatten(tree).items()})


def axes_size(mesh: AnyMesh, names: str | MeshAxes) -> int:
    """How many parts these axes of a mesh make."""
    names = (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names)
