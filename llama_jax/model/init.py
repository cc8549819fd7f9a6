"""Random initialization of a model's weights, on a mesh too."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from llama_jax.arguments import checked
from llama_jax.errors import ConfigError
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
from llama_jax.types import Array, PRNGKeyArray, PyTree


@checked(ConfigError)
def init_params(
    model: Llama | ScalarModel, key: PRNGKeyArray | Array
) -> dict[str, PyTree]:
    """Initialize random weights, the same in either layout and on any mesh.

    Each weight is drawn by a program of its own, so that compile time does not grow
    with depth; on a mesh it is initialized sharded.

    Args:
      model: whose weights; its runtime decides layout and dtype.
      key: random key, typed or raw.

    Returns:
      The tree of parameters.

    >>> import jax
    >>> from llama_jax import Llama, Runtime, preset
    >>> config = preset("llama2-7b").replace(num_layers=1, mlp_dim=32, vocab_size=100)
    >>> config = config.replace(embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8)
    >>> params = init_params(Llama(config, Runtime()), jax.random.key(0))
    >>> params["transformer"]["layers"]["0"]["mlp"]["up_proj"].shape
    (16, 32)
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    config, runtime = model.config, model.runtime
    dtype = jnp.dtype(runtime.weight_dtype)
    shardings: dict[str, PyTree] = {}
    if model.mesh is not None:
        shardings = flatten(param_shardings(config, runtime, model.mesh))
    params = {}
    for path in leaf_paths(config, runtime.layer_layout):
        shape = weight_shape(config, axes_of(path))
        row, layer = row_of(path)
        leaf_key = jax.random.fold_in(key, list(AXES).index(row))
        if layer is not None:
            leaf_key = jax.random.fold_in(leaf_key, layer)
        elif AXES[row].startswith("L "):
            layers = jnp.arange(shape[0])
            leaf_key = jax.vmap(jax.random.fold_in, (None, 0))(leaf_key, layers)
            shape = shape[1:]
        params[path] = _draw_sharded(
            leaf_key, shape, dtype, init_std(path, config), shardings.get(path)
        )
    return unflatten(params)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "std", "sharding"))
def _draw_sharded(
    keys: Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    std: float | None,
    sharding: NamedSharding | None,
) -> Array:
    """Draw one array, or one for each of several keys."""
    draw_one = functools.partial(draw, shape=shape, dtype=dtype, std=std)
    drawn = jax.vmap(draw_one)(keys) if keys.ndim else draw_one(keys)
    if sharding is None:
        return drawn
    return jax.lax.with_sharding_constraint(drawn, sharding)
