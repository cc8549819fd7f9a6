"""The first weights of a model, each born where it belongs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.params import (
    AXES,
    axes_of,
    draw,
    flatten,
    init_std,
    leaf_paths,
    row_of,
    unflatten,
    weight_shape,
)
from llama_jax.sharding import param_shardings
from llama_jax.types import Array, PRNGKeyArray


def init_params(
    model: Llama | ScalarModel, key: PRNGKeyArray | Array
) -> dict[str, Any]:
    """Random weights, the same in either layout and on any mesh.

    They are drawn one by one, so that compiling does not take longer for more layers;
    on a mesh each is born sharded: no device ever holds more than its part.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    config, runtime = model.config, model.runtime
    dtype = jnp.dtype(runtime.weight_dtype)
    shardings: dict[str, Any] = {}
    if model.mesh is not None:
        shardings = flatten(param_shardings(config, runtime, model.mesh))
    first = {}
    for path in leaf_paths(config, runtime.layer_layout):
        shape = weight_shape(config, axes_of(path))
        row, layer = row_of(path)
        own = jax.random.fold_in(key, list(AXES).index(row))
        if layer is not None:
            own = jax.random.fold_in(own, layer)
        elif AXES[row].startswith("L "):
            own = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(shape[0]))
            shape = shape[1:]
        first[path] = _draw_in_place(
            own, shape, dtype, init_std(path, config), shardings.get(path)
        )
    return unflatten(first)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "std", "place"))
def _draw_in_place(
    keys: Array,
    shape: tuple[int, ...],
    dtype: Any,
    std: float | None,
    place: NamedSharding | None,
) -> Array:
    """One array, or one for each of several keys, where it belongs."""
    one = functools.partial(draw, shape=shape, dtype=dtype, std=std)
    drawn = jax.vmap(one)(keys) if keys.ndim else one(keys)
    return drawn if place is None else jax.lax.with_sharding_constraint(drawn, place)
