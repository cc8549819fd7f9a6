"""Shardings on a mesh: the rules of a `Runtime`, applied to axis letters."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.arguments import checked
from llama_jax.config import LlamaConfig
from llama_jax.errors import MeshError
from llama_jax.params import axes_of, axis_sizes, flatten, leaf_paths, unflatten
from llama_jax.runtime import MESH_AXES, AxisRules, MeshAxes, Rules, Runtime
from llama_jax.types import AnyMesh, Array, Mesh, Params, PyTree
from llama_jax.weights import Adapted, Quantized


@checked(MeshError)
def parse_mesh(text: str) -> dict[str, int]:
    """Parse sizes by mesh axis; -1 takes the remaining devices.

    Raises:
      MeshError: an unknown or repeated axis, an invalid size, or two -1.

    >>> parse_mesh("data=1,fsdp=-1,tensor=4")
    {'data': 1, 'fsdp': -1, 'tensor': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name in sizes:
            raise MeshError(f"mesh {text!r}: {name!r} is there twice; give one size")
        try:
            sizes[name] = int(size)
        except ValueError:
            sizes[name] = 0
        _check_axis(repr(text), name, size, sizes[name])
    _check_one_remainder(repr(text), sizes)
    return sizes


def _check_axis(mesh: str, name: str, written: str | int, size: int) -> None:
    if name not in MESH_AXES:
        raise MeshError(
            f"mesh {mesh}: {name!r} is not an axis; choose from "
            f"{', '.join(MESH_AXES)}, as in tensor=4"
        )
    if size < 1 and size != -1:
        raise MeshError(
            f"mesh {mesh}: {name}={written} is not a size; give a positive number, "
            "or -1 for the remaining devices"
        )


def _check_one_remainder(mesh: str, sizes: Mapping[str, int]) -> None:
    if list(sizes.values()).count(-1) > 1:
        raise MeshError(f"mesh {mesh}: two axes are -1; give all but one a size")


@checked(MeshError)
def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Make a mesh with the axes data, fsdp, sequence and tensor.

    Args:
      sizes: size by axis; absent axes have size 1, and one may be -1, which takes the
        remaining devices.
      devices: in the mesh's order; defaults to all devices of all processes.

    Returns:
      The mesh, `[data, fsdp, sequence, tensor]`.

    Raises:
      MeshError: an unknown axis, an invalid size, two -1, or sizes whose product is not
        the number of devices.

    >>> mesh = make_mesh({"fsdp": -1})
    >>> mesh.axis_names
    ('data', 'fsdp', 'sequence', 'tensor')
    >>> mesh.shape["fsdp"] == len(jax.devices())
    True
    """
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    for name, size in sizes.items():
        _check_axis(text, name, size, size)
    _check_one_remainder(text, sizes)
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(name, 1) for name in MESH_AXES]
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        shape[shape.index(-1)] = max(len(devices) // fixed, 1)
    if math.prod(shape) != len(devices):
        text = ", ".join(f"{n}={s}" for n, s in zip(MESH_AXES, shape, strict=True))
        raise MeshError(
            f"mesh {text}: needs {math.prod(shape)} devices, but there are "
            f"{len(devices)}; change the sizes, or make one -1"
        )
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)


def axes_size(mesh: AnyMesh, names: str | MeshAxes) -> int:
    """Return into how many parts these mesh axes split an array's axis."""
    names = (names,) if isinstance(names, str) else names
    return math.prod(mesh.shape[name] for name in names)


def partition_spec(axes: str, rules: AxisRules) -> PartitionSpec:
    """Return the spec of an array with these axis letters, such as `"D NH"`."""
    table = dict(rules)
    return PartitionSpec(
        *(_spec_entry(table.get(letter) or ()) for letter in axes.split())
    )


def activation_spec(
    shape: Sequence[int], axes: str, rules: Rules, mesh: AnyMesh
) -> PartitionSpec:
    """Return the spec of an activation of this shape.

    If the mesh axes of a letter do not divide its size, the last of them are left out.
    If they do not divide K, S is split over them instead: each device then has some
    slots of all heads.
    """
    sizes = dict(zip(axes.split(), shape, strict=True))
    table = dict(rules.activations)
    split = {
        letter: _dividing(size, table.get(letter) or (), mesh)
        for letter, size in sizes.items()
    }
    if {"K", "S"} <= sizes.keys():
        unused = tuple(name for name in table.get("K") or () if name not in split["K"])
        split["S"] = _dividing(sizes["S"], (*(table.get("S") or ()), *unused), mesh)
    return PartitionSpec(*(_spec_entry(split[letter]) for letter in axes.split()))


def _dividing(size: int, names: MeshAxes, mesh: AnyMesh) -> MeshAxes:
    """Return the longest prefix of these mesh axes that divides a size."""
    while names and size % axes_size(mesh, names):
        names = names[:-1]
    return names


def _spec_entry(names: MeshAxes) -> str | MeshAxes | None:
    return names[0] if len(names) == 1 else names or None


def constrain(x: Array, axes: str, rules: Rules, mesh: Mesh | None) -> Array:
    """Constrain an activation to the sharding of its axis letters.

    An axis that its mesh axes do not divide (a batch of one, a single query) is
    replicated, because its size comes from a request.

    Returns:
      `x`; unchanged without a mesh.
    """
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, activation_spec(x.shape, axes, rules, mesh))
    return jax.lax.with_sharding_constraint(x, sharding)


def constrain_layout(x: Array, axes: str, rules: Rules, mesh: Mesh | None) -> Array:
    """Constrain an activation to the default memory layout, last axis innermost.

    For arrays that are updated in place: the compiler may not transpose them within a
    program.
    """

    def pin(x: Array) -> Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    if mesh is None:
        return pin(x)
    # Device by device, since the partitioner of jax 0.7 would gather `x` for it.
    spec = activation_spec(x.shape, axes, rules, mesh)
    return jax.shard_map(
        pin, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )(x)


def weight_spec(
    axes: str, config: LlamaConfig, rules: Rules, mesh: AnyMesh
) -> PartitionSpec:
    """Return the spec of a weight with these axis letters.

    Heads are not split, except that K heads fewer than the `tensor` axis are: the model
    joins their parts after the product. Vectors are replicated: gathering one takes
    longer than storing it.

    Raises:
      MeshError: a mesh axis does not divide the axis of the weight that it splits.
    """
    if axes in ("D", "L D"):
        return PartitionSpec(*(None for _ in axes.split()))
    heads = {"NH": config.num_heads, "KH": config.num_kv_heads}
    entries = list(partition_spec(axes, rules.weights))
    for index, letter in enumerate(axes.split()):
        names, width = entries[index], axis_sizes(config)[letter]
        num_parts = axes_size(mesh, names) if names else 1
        size = heads.get(letter, width)
        splits_heads = letter == "KH" and size < num_parts
        if num_parts == 1 or size % num_parts == 0:
            continue
        if splits_heads and width % num_parts == 0:
            continue
        if letter != "V" and not splits_heads:
            raise MeshError(
                f"axis {letter} of {size} is not divisible by mesh axis {names} of "
                f"{num_parts}; change --mesh"
            )
        entries[index] = None
    return PartitionSpec(*entries)


def param_shardings(
    config: LlamaConfig, runtime: Runtime, mesh: AnyMesh
) -> dict[str, PyTree]:
    """Return the tree of `NamedSharding`s of a model's weights.

    Args:
      config: of the model.
      runtime: its `layer_layout` and `rules`.
      mesh: the devices.

    Raises:
      MeshError: a mesh axis does not divide the axis of a weight that it splits.
    """
    flat = {}
    for path in leaf_paths(config, runtime.layer_layout):
        try:
            spec = weight_spec(axes_of(path), config, runtime.rules, mesh)
        except MeshError as error:
            raise MeshError(f"{path}: {error}") from None
        flat[path] = NamedSharding(mesh, spec)
    return unflatten(flat)


def weight_shardings(
    tree: Params,
    config: LlamaConfig,
    runtime: Runtime,
    mesh: Mesh,
) -> dict[str, PyTree]:
    """Return a tree of weights or adapters with a `NamedSharding` for each array.

    Quantized values are split as the weight would be (`param_shardings`), and so are
    scales, along groups of inputs only if their number is divisible. An adapter's a
    [I, R] is split along I, its b [R, O] along O, as its weight [I, O] is.

    Args:
      tree: arrays or their shapes, in the runtime's layout; may have quantized and
        adapted weights.
      config: of the model.
      runtime: its `layer_layout` and `rules`.
      mesh: the devices.

    Raises:
      MeshError: a mesh axis does not divide the axis of a weight that it splits.
    """
    shardings = flatten(param_shardings(config, runtime, mesh))

    def sharding_of(path: str, leaf: PyTree) -> PyTree:
        weight, _, name = path.rpartition("/")
        if weight in shardings:  # an adapter's a or b
            *layers, inputs, outputs = shardings[weight].spec
            split = (inputs, None) if name == "a" else (None, outputs)
            return NamedSharding(mesh, PartitionSpec(*layers, *split))
        if isinstance(leaf, Adapted):
            a, b = sharding_of(f"{path}/a", leaf.a), sharding_of(f"{path}/b", leaf.b)
            base = sharding_of(path, leaf.base)
            return dataclasses.replace(leaf, base=base, a=a, b=b)
        if not isinstance(leaf, Quantized):
            return shardings[path]
        *layers, inputs, outputs = shardings[path].spec
        scales = PartitionSpec(*layers, outputs)
        if leaf.scales.ndim == len(leaf.shape):  # one for each group of inputs
            num_parts = axes_size(mesh, inputs) if inputs else 1
            is_divisible = leaf.scales.shape[-2] % num_parts == 0
            scales = PartitionSpec(*layers, inputs if is_divisible else None, outputs)
        return dataclasses.replace(
            leaf, values=shardings[path], scales=NamedSharding(mesh, scales)
        )

    return unflatten(
        {path: sharding_of(path, leaf) for path, leaf in flatten(tree).items()}
    )
