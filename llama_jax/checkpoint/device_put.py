"""Put a checkpoint's weights on devices, one at a time."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.config import LlamaConfig
from llama_jax.params import (
    LAYERS,
    axes_of,
    flatten,
    leaf_paths,
    unflatten,
    weight_shape,
)
from llama_jax.runtime import Runtime
from llama_jax.sharding import param_shardings, weight_shardings
from llama_jax.types import Array, Mesh, PyTree
from llama_jax.weights import Weight

Quantize = Callable[[str, Array], Weight]
"""Maps a path and its weight (or one layer of it) to what is stored instead."""


def device_put_leaves(
    leaves: Mapping[str, LazyLeaf],
    config: LlamaConfig,
    *,
    runtime: Runtime,
    mesh: Mesh | None = None,
    quantize: Quantize | None = None,
) -> dict[str, PyTree]:
    """Read the leaves as arrays in the runtime's dtype and layout, sharded on a mesh.

    Each leaf is read, cast, put on its devices and quantized before the next is read.
    On CPU a mapped leaf that needs no cast is used in place, without a copy.

    Args:
      leaves: all of the model's, one per layer and weight.
      config: of the model.
      runtime: its dtype, layout and sharding rules are used.
      mesh: devices; defaults to the first device.
      quantize: applied to each weight after it is on its devices.

    Returns:
      The tree of parameters.
    """
    dtype = jnp.dtype(runtime.weight_dtype)
    shardings: Mapping[str, NamedSharding] = {}
    if mesh is not None:
        shardings = flatten(param_shardings(config, runtime, mesh))
    flat: dict[str, PyTree] = {}
    for path in leaf_paths(config, runtime.layer_layout):
        sharding = shardings.get(path)
        axes = axes_of(path)
        if not axes.startswith("L "):
            array = _device_put(leaves[path], dtype, sharding)
            flat[path] = quantize(path, array) if quantize else array
            continue
        weight = path.removeprefix(LAYERS)
        shape = weight_shape(config, axes)
        stacked: Weight | None = None
        layer_sharding = None
        if sharding is not None:
            layer_spec = PartitionSpec(*sharding.spec[1:])
            layer_sharding = NamedSharding(sharding.mesh, layer_spec)
        for layer in range(config.num_layers):
            leaf = leaves[f"{LAYERS}{layer}/{weight}"]
            array = _device_put(leaf, dtype, layer_sharding)
            one: Weight = quantize(path, array) if quantize else array
            if stacked is None and isinstance(one, jax.Array):
                stacked = jnp.zeros(shape, dtype, device=sharding)
            elif stacked is None:
                stacked = _empty_layers(one, config.num_layers)
            stacked = jax.tree.map(
                functools.partial(_set_layer, layer=layer), stacked, one
            )
        flat[path] = stacked
    params = unflatten(flat)
    if mesh is not None and quantize is not None:
        # The compiler chose the sharding of the scales.
        params = jax.tree.map(
            jax.device_put, params, weight_shardings(params, config, runtime, mesh)
        )
    return params


def _device_put(
    leaf: LazyLeaf, dtype: np.dtype, sharding: NamedSharding | None
) -> Array:
    array = leaf.read()
    if sharding is None:
        return jax.device_put(array.astype(dtype, copy=False))
    return jax.make_array_from_callback(
        leaf.shape, sharding, lambda index: array[index].astype(dtype, copy=False)
    )


def _empty_layers(layer: Weight, num_layers: int) -> Weight:
    """Zeros for all layers of a weight, shaped and sharded as those of one layer."""

    def zeros(array: Array) -> Array:
        sharding = None
        if isinstance(array.sharding, NamedSharding):
            spec = PartitionSpec(None, *array.sharding.spec)
            sharding = NamedSharding(array.sharding.mesh, spec)
        return jnp.zeros((num_layers, *array.shape), array.dtype, device=sharding)

    return jax.tree.map(zeros, layer)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: Array, leaf: Array, layer: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, leaf, layer, 0)
