"""Low-rank adapters: a small trained product beside frozen weights.

y = x W + (x a) b · α / R, with a [I, R] and b [R, O] (arXiv:2106.09685). A tree of
adapters has the parameters' paths, with `{"a", "b"}` in place of the weight:
`params.stack_layers` and `unstack_layers` convert it between layouts, and it can be
saved, sharded and optimized like any other tree. It may also have a `scalar_head`,
which is trained as it is.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from llama_jax.arguments import checked
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.kernels.precision import matmul_precision
from llama_jax.model.quantize import PROJECTIONS
from llama_jax.params import (
    AXES,
    SCALAR_HEAD,
    axes_of,
    flatten,
    leaf_paths,
    row_of,
    unflatten,
    weight_shape,
)
from llama_jax.runtime import DType, LayerLayout, Runtime
from llama_jax.sharding import weight_shardings
from llama_jax.types import Array, FlatParams, Mesh, Params, PRNGKeyArray, PyTree
from llama_jax.weights import Adapted, Quantized, dequantize


@checked(ConfigError)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Rank, scale and targets of adapters.

    Attributes:
      rank: R.
      alpha: α; an adapter's product is multiplied by α / R.
      rank_stabilized: multiply it by α / √R instead (arXiv:2312.03732).
      targets: projections with an adapter, in every layer.

    >>> Lora(rank=8, alpha=16).scaling
    2.0
    """

    rank: int
    alpha: float
    rank_stabilized: bool = False
    targets: Sequence[str] = PROJECTIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ConfigError(
                f"lora: rank must be a positive integer, got {self.rank!r}; try 8 or 16"
            )
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(
                f"lora: alpha must be a positive number, got {self.alpha!r}; try "
                "the rank"
            )
        names = ", ".join(map(repr, self.targets))
        if len(set(self.targets)) < len(self.targets) or not self.targets:
            raise ConfigError(
                f"lora: targets must be distinct projections, got [{names}]; choose "
                f"from {', '.join(PROJECTIONS)}"
            )
        if unknown := [name for name in self.targets if name not in PROJECTIONS]:
            raise ConfigError(
                f"lora: unknown target {unknown[0]!r}; choose from "
                f"{', '.join(PROJECTIONS)}"
            )

    @property
    def scaling(self) -> float:
        """Factor of an adapter's product: α / R, or α / √R."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


def lora_shapes(
    config: LlamaConfig,
    lora: Lora,
    *,
    layout: LayerLayout = "stacked",
    dtype: DType = "float32",
) -> dict[str, PyTree]:
    """The tree of adapters as `ShapeDtypeStruct`s."""
    shapes = {}
    for path in leaf_paths(config, layout):
        if path.rpartition("/")[2] not in lora.targets:
            continue
        *layers, inputs, outputs = weight_shape(config, axes_of(path))
        for name, shape in (("a", (inputs, lora.rank)), ("b", (lora.rank, outputs))):
            shapes[f"{path}/{name}"] = jax.ShapeDtypeStruct((*layers, *shape), dtype)
    return unflatten(shapes)


@checked(ConfigError)
def init_lora(
    config: LlamaConfig,
    key: PRNGKeyArray | Array,
    lora: Lora,
    *,
    runtime: Runtime | None = None,
    dtype: DType = "float32",
    mesh: Mesh | None = None,
) -> dict[str, PyTree]:
    """Initialize adapters that change nothing: a uniform within ±1/√I, b zero.

    The same in either layout and on any mesh, where they are initialized sharded.

    Args:
      config: of the model.
      key: random key, typed or raw.
      lora: rank and targets.
      runtime: its layout and rules count; defaults to stacked layers.
      dtype: of the adapters, which are trained.
      mesh: the devices.

    Returns:
      The tree of adapters.

    >>> import jax
    >>> from llama_jax import preset
    >>> lora = Lora(rank=2, alpha=4, targets=("q_proj",))
    >>> config = preset("llama2-7b").replace(num_layers=3)
    >>> adapters = init_lora(config, jax.random.key(0), lora)
    >>> adapters["transformer"]["layers"]["attention"]["q_proj"]["a"].shape
    (3, 4096, 2)
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    runtime = runtime or Runtime(layer_layout="stacked")
    shapes = lora_shapes(config, lora, layout=runtime.layer_layout, dtype=dtype)
    shardings: dict[str, PyTree] = {}
    if mesh is not None:
        shardings = flatten(weight_shardings(shapes, config, runtime, mesh))
    adapters = {}
    for path, leaf in flatten(shapes).items():
        weight, _, name = path.rpartition("/")
        row, layer = row_of(weight)
        leaf_key = jax.random.fold_in(key, list(AXES).index(row))
        shape = leaf.shape
        if layer is not None:
            leaf_key = jax.random.fold_in(leaf_key, layer)
        else:
            layers = jnp.arange(shape[0])
            leaf_key = jax.vmap(jax.random.fold_in, (None, 0))(leaf_key, layers)
            shape = shape[1:]
        bound = shape[0] ** -0.5 if name == "a" else 0.0
        sharding = shardings.get(path)
        adapters[path] = _draw(leaf_key, shape, leaf.dtype, bound, sharding)
    return unflatten(adapters)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "bound", "sharding"))
def _draw(
    keys: Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    bound: float,
    sharding: NamedSharding | None,
) -> Array:
    """Draw numbers within ±bound, for one key or for several."""

    def draw(key: Array) -> Array:
        if not bound:
            return jnp.zeros(shape, dtype)
        exact = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        return exact.astype(dtype)

    drawn = jax.vmap(draw)(keys) if keys.ndim else draw(keys)
    if sharding is None:
        return drawn
    return jax.lax.with_sharding_constraint(drawn, sharding)


@checked(ConfigError)
def adapt(params: Params, adapters: Params, scaling: float) -> dict[str, PyTree]:
    """Put adapters beside their weights; nothing is computed or copied.

    Args:
      params: plain or quantized weights; arrays, tracers or shapes.
      adapters: in the same layout.
      scaling: `Lora.scaling`.

    Returns:
      The parameters, with an `Adapted` leaf for each weight with an adapter.

    Raises:
      ConfigError: an adapter has no weight, or another shape.

    >>> import jax.numpy as jnp
    >>> pair = {"a": jnp.zeros((4, 1)), "b": jnp.zeros((1, 3))}
    >>> adapt({"up_proj": jnp.ones((4, 3))}, {"up_proj": pair}, 2.0)["up_proj"].shape
    (4, 3)
    """
    flat = flatten(params) | _head(adapters)
    for path, a, b in _pairs(adapters):
        flat[path] = Adapted(_base(flat, path, a, b), a, b, float(scaling))
    return unflatten(flat)


@checked(ConfigError)
def merge(
    params: Params, adapters: Params, scaling: float, *, dtype: DType | None = None
) -> dict[str, PyTree]:
    """Merge adapters into plain weights: `base + scaling · a b`.

    For export: a leaf at a time, summed in float32 and rounded once.

    Args:
      params: plain or quantized weights.
      adapters: in the same layout.
      scaling: `Lora.scaling`.
      dtype: of merged weights; defaults to that of the base (of a quantized one, of its
        scales). Quantized weights without an adapter are dequantized too.

    Returns:
      The parameters, all of them plain.

    Raises:
      ConfigError: an adapter has no weight, or another shape.

    >>> import jax.numpy as jnp
    >>> pair = {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 3))}
    >>> merge({"up_proj": jnp.ones((4, 3))}, {"up_proj": pair}, 2.0)["up_proj"][0]
    Array([3., 3., 3.], dtype=float32)
    """
    flat = flatten(params) | _head(adapters)
    pairs = {path: (a, b) for path, a, b in _pairs(adapters)}
    merged = {path: _base(flat, path, a, b) for path, (a, b) in pairs.items()}
    for path, leaf in flat.items():
        if path in merged or isinstance(leaf, Quantized):
            base = leaf.scales.dtype if isinstance(leaf, Quantized) else leaf.dtype
            a, b = pairs.get(path, (None, None))
            flat[path] = _merged(leaf, a, b, scaling, jnp.dtype(dtype or base))
    return unflatten(flat)


def _head(adapters: Params) -> dict[str, PyTree]:
    """The trained head, if there is one."""
    return {SCALAR_HEAD: adapters[SCALAR_HEAD]} if SCALAR_HEAD in adapters else {}


def _pairs(adapters: Params) -> list[tuple[str, PyTree, PyTree]]:
    """Path, a and b of every adapter."""
    flat = {
        path: leaf for path, leaf in flatten(adapters).items() if path != SCALAR_HEAD
    }
    paths = dict.fromkeys(path.rpartition("/")[0] for path in flat)
    if unpaired := {f"{path}/{name}" for path in paths for name in "ab"} ^ flat.keys():
        raise ConfigError(
            f"lora: {min(unpaired)} is missing, or not part of an adapter; an adapter "
            "is a and b"
        )
    return [(path, flat[f"{path}/a"], flat[f"{path}/b"]) for path in paths]


def _base(flat: FlatParams, path: str, a: PyTree, b: PyTree) -> PyTree:
    """The weight of an adapter."""
    if path not in flat:
        raise ConfigError(
            f"lora: there is an adapter for {path}, but no such weight; use one layer "
            "layout for both (params.stack_layers, unstack_layers)"
        )
    base = flat[path]
    *layers, inputs, outputs = base.shape
    rank = a.shape[-1]
    fits = a.shape == (*layers, inputs, rank) and b.shape == (*layers, rank, outputs)
    if not fits or isinstance(base, Adapted):
        raise ConfigError(
            f"lora: the adapter for {path} is {list(a.shape)} by {list(b.shape)}, the "
            f"weight {list(base.shape)}; use adapters of this model, only once"
        )
    return base


@functools.partial(jax.jit, static_argnames=("scaling", "dtype"))
def _merged(
    base: Array | Quantized,
    a: Array | None,
    b: Array | None,
    scaling: float,
    dtype: DTypeLike,
) -> Array:
    if isinstance(base, Quantized):
        exact = dequantize(base, jnp.float32)
    else:
        exact = base.astype(jnp.float32)
    if a is not None and b is not None:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        product = jnp.matmul(a, b, precision=matmul_precision(jnp.float32))
        exact = exact + scaling * product
    return exact.astype(dtype)
