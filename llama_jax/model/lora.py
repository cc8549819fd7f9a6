"""Low-rank adapters: a small trained product beside every frozen weight.

y = x W + (x a) b · α / R, with a [I, R] and b [R, O] (arXiv:2106.09685). A tree of
adapters has the parameters' paths, with `{"a", "b"}` where the weight would be:
`params.stack_layers` and `unstack_layers` take it between the layouts as they take
weights, and it can be saved, sharded and optimized like any other tree.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.model.linear import matmul_precision
from llama_jax.model.quantize import PROJECTIONS
from llama_jax.params import (
    AXES,
    axes_of,
    flatten,
    leaf_paths,
    row_of,
    unflatten,
    weight_shape,
)
from llama_jax.runtime import DType, LayerLayout, Runtime
from llama_jax.sharding import weight_shardings
from llama_jax.types import Array, Mesh, Params, PRNGKeyArray
from llama_jax.weights import Adapted, Quantized, dequantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """What kind of adapters.

    Attributes:
      rank: R.
      alpha: α; what an adapter says is multiplied by α / R.
      rank_stabilized: multiplied by α / √R instead (arXiv:2312.03732).
      targets: the projections that have an adapter, in every layer.
    """

    rank: int
    alpha: float
    rank_stabilized: bool = False
    targets: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(
                f"lora: a rank of {self.rank!r} is none; choose a whole number from 1"
            )
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(
                f"lora: an alpha of {self.alpha!r} is none; choose a positive number"
            )
        given = ", ".join(map(repr, self.targets))
        if len(set(self.targets)) < len(self.targets) or not self.targets:
            raise ConfigError(
                f"lora: targets are [{given}]; name at least one projection, and none "
                "twice"
            )
        if unknown := [name for name in self.targets if name not in PROJECTIONS]:
            raise ConfigError(
                f"lora: there is no target {unknown[0]!r}; choose from "
                f"{', '.join(PROJECTIONS)}"
            )

    @property
    def scaling(self) -> float:
        """What the product of an adapter is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


def lora_shapes(
    config: LlamaConfig,
    lora: Lora,
    *,
    layout: LayerLayout = "stacked",
    dtype: DType = "float32",
) -> dict[str, Any]:
    """The tree of adapters as `ShapeDtypeStruct`s, no memory used."""
    shapes = {}
    for path in leaf_paths(config, layout):
        if path.rpartition("/")[2] not in lora.targets:
            continue
        *layers, inputs, outputs = weight_shape(config, axes_of(path))
        for name, shape in (("a", (inputs, lora.rank)), ("b", (lora.rank, outputs))):
            shapes[f"{path}/{name}"] = jax.ShapeDtypeStruct((*layers, *shape), dtype)
    return unflatten(shapes)


def init_lora(
    config: LlamaConfig,
    key: PRNGKeyArray | Array,
    lora: Lora,
    *,
    runtime: Runtime | None = None,
    dtype: DType = "float32",
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """First adapters, which change nothing: a is uniform within ±1/√I, b zero.

    The same in either layout and on any mesh, where they are born sharded.

    Args:
      config: of the model.
      key: random key.
      lora: rank and targets.
      runtime: its layout and its rules count; stacked where not given.
      dtype: of the adapters, which are trained.
      mesh: the devices.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    runtime = runtime or Runtime(layer_layout="stacked")
    shapes = lora_shapes(config, lora, layout=runtime.layer_layout, dtype=dtype)
    places: dict[str, Any] = {}
    if mesh is not None:
        places = flatten(weight_shardings(shapes, config, runtime, mesh))
    first = {}
    for path, leaf in flatten(shapes).items():
        weight, _, name = path.rpartition("/")
        row, layer = row_of(weight)
        own = jax.random.fold_in(key, list(AXES).index(row))
        shape = leaf.shape
        if layer is not None:
            own = jax.random.fold_in(own, layer)
        else:
            own = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(shape[0]))
            shape = shape[1:]
        bound = shape[0] ** -0.5 if name == "a" else 0.0
        first[path] = _draw(own, shape, leaf.dtype, bound, places.get(path))
    return unflatten(first)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "bound", "place"))
def _draw(
    keys: Array, shape: tuple[int, ...], dtype: Any, bound: float, place: Any
) -> Array:
    """Numbers within ±bound, for one key or for several, where they belong."""

    def draw(key: Array) -> Array:
        if not bound:
            return jnp.zeros(shape, dtype)
        exact = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        return exact.astype(dtype)

    drawn = jax.vmap(draw)(keys) if keys.ndim else draw(keys)
    return drawn if place is None else jax.lax.with_sharding_constraint(drawn, place)


def adapt(params: Params, adapters: Params, scaling: float) -> dict[str, Any]:
    """The parameters with adapters beside their weights; nothing is computed or copied.

    Args:
      params: plain or quantized weights; arrays, tracers or shapes.
      adapters: in the same layout.
      scaling: of what an adapter says (`Lora.scaling`).

    Raises:
      ConfigError: an adapter does not fit its weight, or has none.
    """
    flat = flatten(params)
    for path, a, b in _pairs(adapters):
        flat[path] = Adapted(_base(flat, path, a, b), a, b, float(scaling))
    return unflatten(flat)


def merge(
    params: Params, adapters: Params, scaling: float, *, dtype: DType | None = None
) -> dict[str, Any]:
    """Plain weights that do what the adapted ones do: `base + scaling · a b`.

    For export: a leaf at a time, summed in float32 and rounded once.

    Args:
      params: plain or quantized weights.
      adapters: in the same layout.
      scaling: of what an adapter says (`Lora.scaling`).
      dtype: of merged weights; the base's (of a quantized one, its scales') where not
        given. Quantized weights without an adapter are widened too.

    Raises:
      ConfigError: an adapter does not fit its weight, or has none.
    """
    flat = flatten(params)
    pairs = {path: (a, b) for path, a, b in _pairs(adapters)}
    merged = {path: _base(flat, path, a, b) for path, (a, b) in pairs.items()}
    for path, leaf in flat.items():
        if path in merged or isinstance(leaf, Quantized):
            own = leaf.scales.dtype if isinstance(leaf, Quantized) else leaf.dtype
            kind = jnp.dtype(dtype or own)
            flat[path] = _merged(leaf, *pairs.get(path, (None, None)), scaling, kind)
    return unflatten(flat)


def _pairs(adapters: Params) -> list[tuple[str, Any, Any]]:
    """Path, a and b of every adapter."""
    flat = flatten(adapters)
    paths = dict.fromkeys(path.rpartition("/")[0] for path in flat)
    if whole := {f"{path}/{name}" for path in paths for name in "ab"} ^ flat.keys():
        raise ConfigError(
            f"lora: {min(whole)} is no part of an adapter, or is missing; every "
            "adapter has a and b"
        )
    return [(path, flat[f"{path}/a"], flat[f"{path}/b"]) for path in paths]


def _base(flat: Mapping[str, Any], path: str, a: Any, b: Any) -> Any:
    """The weight that an adapter is for."""
    if path not in flat:
        raise ConfigError(
            f"lora: there is an adapter for {path}, but no such weight; are the layers "
            "of both stacked, or of both unrolled?"
        )
    base = flat[path]
    *layers, inputs, outputs = base.shape
    rank = a.shape[-1]
    fits = a.shape == (*layers, inputs, rank) and b.shape == (*layers, rank, outputs)
    if not fits or isinstance(base, Adapted):
        raise ConfigError(
            f"lora: the adapter for {path} is {list(a.shape)} by {list(b.shape)}, the "
            f"weight {list(base.shape)}; do the two belong together?"
        )
    return base


@functools.partial(jax.jit, static_argnames=("scaling", "dtype"))
def _merged(base: Any, a: Any, b: Any, scaling: float, dtype: Any) -> Array:
    if isinstance(base, Quantized):
        exact = dequantize(base, jnp.float32)
    else:
        exact = base.astype(jnp.float32)
    if a is not None:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        product = jnp.matmul(a, b, precision=matmul_precision(jnp.float32))
        exact = exact + scaling * product
    return exact.astype(dtype)
