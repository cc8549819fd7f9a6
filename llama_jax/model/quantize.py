"""Weights in eight or four bits: quantized leaf by leaf, described and restored."""

import functools
from collections.abc import Collection, Mapping
from typing import TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.arguments import checked
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.params import flatten, param_shapes, unflatten
from llama_jax.runtime import Runtime
from llama_jax.types import Array, FlatParams, Float, JsonObject, Params, PyTree
from llama_jax.weights import (
    GROUP_SIZE,
    KINDS,
    NF4,
    NF4_LEVELS,
    Int4,
    Int8,
    Kind,
    Quantized,
    Weight,
    group_size,
)

Description: TypeAlias = dict[str, str | int]
"""The kind of a quantized weight, and its number of inputs."""

PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""A layer's seven projections, which can be quantized and adapted."""


@checked(ConfigError)
def quantize_params(
    params: Params,
    kind: Kind,
    *,
    group: int = GROUP_SIZE,
    which: Collection[str] = PROJECTIONS,
    delete: bool = False,
) -> dict[str, PyTree]:
    """Quantize the projections of a tree in either layout; other leaves stay.

    Args:
      params: plain arrays on any devices; each is quantized where it is.
      kind: "int8", "int4" or "nf4".
      group: most inputs that share a scale in four bits; see `quantize`.
      which: names of the projections.
      delete: free each weight as soon as it is quantized, so that at most one is in
        memory twice.

    Returns:
      The tree, with a `Quantized` leaf for each projection.

    Raises:
      ConfigError: an unknown kind or projection.

    >>> import jax.numpy as jnp
    >>> quantized = quantize_params({"up_proj": jnp.asarray([[1.0], [-2.54]])}, "int8")
    >>> quantized["up_proj"].values.tolist()
    [[50], [-127]]
    """
    quantized = {}
    for path, leaf in flatten(params).items():
        new = quantize_leaf(path, leaf, kind, group=group, which=which)
        if delete and new is not leaf and isinstance(leaf, jax.Array):
            jax.block_until_ready(new)
            leaf.delete()
        quantized[path] = new
    return unflatten(quantized)


def quantize_leaf(
    path: str,
    leaf: Weight,
    kind: Kind,
    *,
    group: int = GROUP_SIZE,
    which: Collection[str] = PROJECTIONS,
) -> Weight:
    """Quantize one leaf of a tree if its path ends with one of `which`.

    Other leaves, and those that are quantized already, are returned as they are.

    Raises:
      ConfigError: an unknown kind or projection.
    """
    if unknown := set(which) - set(PROJECTIONS):
        raise ConfigError(
            f"quantize: unknown projection {min(unknown)!r}; choose from "
            f"{', '.join(PROJECTIONS)}"
        )
    check_kind(kind)
    if path.rpartition("/")[2] not in which or isinstance(leaf, Quantized):
        return leaf
    return _quantized(leaf, kind, group)


def quantized_shapes(
    config: LlamaConfig,
    runtime: Runtime,
    kind: Kind,
    *,
    group: int = GROUP_SIZE,
    which: Collection[str] = PROJECTIONS,
) -> dict[str, PyTree]:
    """The tree of a quantized model as `ShapeDtypeStruct`s."""
    shapes = param_shapes(
        config, runtime.layer_layout, dtype=jnp.dtype(runtime.weight_dtype)
    )
    return unflatten(
        {
            path: jax.eval_shape(
                functools.partial(
                    quantize_leaf, path, kind=kind, group=group, which=which
                ),
                leaf,
            )
            for path, leaf in flatten(shapes).items()
        }
    )


def check_kind(kind: str) -> None:
    """Check that a kind of quantization exists.

    Raises:
      ConfigError: it does not; the error names those that do.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"quantize: unknown kind {kind!r}; choose from {', '.join(get_args(Kind))}"
        )


def quantize(
    weight: Float[Array, "I O"], kind: Kind, *, group: int = GROUP_SIZE
) -> Quantized:
    """Round one weight to the nearest numbers that its bits can express.

    The largest magnitude of each column (eight bits) or of each group of inputs in a
    column (four bits) is exact; every other number is off by half a step at most.

    Args:
      weight: float32, bfloat16 or float16. Scales have its dtype in four bits, and
        float32 in eight.
      kind: "int8" in steps of 1/127 of the largest, "int4" of 1/7, "nf4" to the levels
        of arXiv:2305.14314.
      group: most inputs that share a scale in four bits; groups are equal, of the
        largest divisor of I up to this.

    Returns:
      An `Int8`, `Int4` or `NF4`.
    """
    if kind == "int8":
        steps = jnp.max(jnp.abs(weight.astype(jnp.float32)), axis=0) / 127
        values = _rounded(weight.astype(jnp.float32), steps[None], 127)
        return Int8(values.astype(jnp.int8), steps)
    inputs, outputs = weight.shape
    grouped = weight.reshape(-1, group_size(inputs, group), outputs)
    exact = grouped.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=1)
    if kind == "int4":
        # Divide by the scale as it is stored, rounded.
        scales = (largest / 7).astype(weight.dtype)
        values = _rounded(exact, scales.astype(jnp.float32)[:, None], 7)
        return Int4(values.reshape(weight.shape).astype(jnp.int4), scales)
    scales = largest.astype(weight.dtype)
    codes = _nearest_levels(exact / _divisor(scales.astype(jnp.float32)[:, None]))
    return NF4(codes.reshape(weight.shape).astype(jnp.uint4), scales)


def _rounded(weight: Array, steps: Array, limit: int) -> Array:
    return jnp.clip(jnp.round(weight / _divisor(steps)), -limit, limit)


def _divisor(scales: Array) -> Array:
    """Scales to divide by: where one is 0, so are all numbers."""
    return jnp.where(scales > 0, scales, 1.0)


def _nearest_levels(numbers: Array) -> Array:
    """The code of the level nearest to each number."""
    levels = np.asarray(NF4_LEVELS, np.float32)
    codes = jnp.zeros(numbers.shape, jnp.int32)
    for middle in (levels[1:] + levels[:-1]) / 2:
        codes = codes + (numbers > middle)
    return codes


@functools.partial(jax.jit, static_argnames=("kind", "group"))
def _quantized(weight: Array, kind: Kind, group: int) -> Quantized:
    """Quantize one weight, or a stack of them a layer at a time."""
    of_layer = functools.partial(quantize, kind=kind, group=group)
    return of_layer(weight) if weight.ndim == 2 else jax.lax.map(of_layer, weight)


def describe(params: Params) -> tuple[dict[str, PyTree], dict[str, Description]]:
    """Split a tree into plain arrays and a JSON description of its quantized weights.

    Returns:
      The arrays by path: plain weights under their own, quantized ones under
      `.../values` and `.../scales`. Four-bit values are packed, two in a byte (uint8):
      the first half of all inputs in the low bits. And by path the kind and number of
      inputs of each quantized weight. `restore` is the inverse.
    """
    arrays: dict[str, PyTree] = {}
    described: dict[str, Description] = {}
    for path, leaf in flatten(params).items():
        if not isinstance(leaf, Quantized):
            arrays[path] = leaf
            continue
        kind = next(kind for kind, form in KINDS.items() if type(leaf) is form)
        described[path] = {"kind": kind, "inputs": leaf.shape[-2]}
        values = leaf.values if kind == "int8" else _pack(leaf.values)
        arrays |= {f"{path}/values": values, f"{path}/scales": leaf.scales}
    return arrays, described


def restore(
    arrays: FlatParams, described: Mapping[str, JsonObject]
) -> dict[str, PyTree]:
    """Rebuild the tree from what `describe` returned.

    Raises:
      CheckpointError: the two do not match.
    """
    leaves = dict(arrays)
    for path, facts in described.items():
        try:
            kind, inputs = cast(Kind, facts["kind"]), facts["inputs"]
            form = KINDS[kind]
            values = leaves.pop(f"{path}/values")
            scales = leaves.pop(f"{path}/scales")
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: described as quantized, but {error} is missing or unknown; "
                "quantize the model again"
            ) from error
        if kind != "int8":
            unpack = _unpack_codes if kind == "nf4" else _unpack_integers
            values = unpack(jnp.asarray(values), inputs)
        leaves[path] = form(values, scales)
    return unflatten(leaves)


@jax.jit
def _pack(values: Array) -> Array:
    codes = (values.astype(jnp.int8) & 15).astype(jnp.uint8)
    inputs = codes.shape[-2]
    if inputs % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, 1), (0, 0)])
    low, high = jnp.split(codes, 2, axis=-2)
    return low | (high << 4)


@functools.partial(jax.jit, static_argnums=1)
def _unpack_codes(packed: Array, inputs: int) -> Array:
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=-2)
    return codes[..., :inputs, :].astype(jnp.uint4)


@functools.partial(jax.jit, static_argnums=1)
def _unpack_integers(packed: Array, inputs: int) -> Array:
    codes = jnp.concatenate([packed & 15, packed >> 4], axis=-2).astype(jnp.int8)
    signed = jnp.where(codes > 7, codes - 16, codes)
    return signed[..., :inputs, :].astype(jnp.int4)
