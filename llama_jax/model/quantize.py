"""Weights in eight or four bits: made leaf by leaf, described, stored and restored."""

import functools
from collections.abc import Collection, Mapping
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.params import flatten, param_shapes, unflatten
from llama_jax.runtime import Runtime
from llama_jax.types import Array, Float, Params
from llama_jax.weights import (
    KINDS,
    NF4,
    NF4_LEVELS,
    Int4,
    Int8,
    Kind,
    Quantized,
    group_size,
)

GROUP = 64
"""Weights that share a scale in four bits: a block of QLoRA (arXiv:2305.14314)."""

PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""What can be quantized: a layer's seven projections."""


def quantize_params(
    params: Params,
    kind: Kind,
    *,
    group: int = GROUP,
    which: Collection[str] = PROJECTIONS,
    delete: bool = False,
) -> dict[str, Any]:
    """A tree (either layout) whose projections are quantized; the rest is as it was.

    Args:
      params: plain arrays, wherever they lie; each is quantized where it lies.
      kind: "int8", "int4" or "nf4".
      group: most inputs that share a scale in four bits; see `quantize`.
      which: projections, by their names.
      delete: free each weight as soon as it is quantized, so that memory never holds
        more than one of them twice.

    Raises:
      ConfigError: there is no such kind, or no such projection.
    """
    done = {}
    for path, leaf in flatten(params).items():
        done[path] = quantize_leaf(path, leaf, kind, group=group, which=which)
        if delete and done[path] is not leaf and isinstance(leaf, jax.Array):
            jax.block_until_ready(done[path])
            leaf.delete()
    return unflatten(done)


def quantize_leaf(
    path: str,
    leaf: Any,
    kind: Kind,
    *,
    group: int = GROUP,
    which: Collection[str] = PROJECTIONS,
) -> Any:
    """One leaf of a tree, quantized where its path says that it is a projection.

    What is quantized already, and what is none of `which`, is returned as it is.

    Raises:
      ConfigError: there is no such kind, or no such projection.
    """
    if unknown := set(which) - set(PROJECTIONS):
        raise ConfigError(
            f"quantize: there is no projection {min(unknown)!r}; choose from "
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
    group: int = GROUP,
    which: Collection[str] = PROJECTIONS,
) -> dict[str, Any]:
    """The tree of a quantized model as `ShapeDtypeStruct`s, no memory used."""
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
    """Refuse what is no kind of quantization.

    Raises:
      ConfigError: naming those that there are.
    """
    if kind not in KINDS:
        raise ConfigError(
            f"quantize: there is no {kind!r}; choose from {', '.join(get_args(Kind))}"
        )


def quantize(weight: Float[Array, "I O"], kind: Kind, *, group: int = GROUP) -> Any:
    """One weight, rounded to the nearest of what its bits can say.

    The largest number of each column (eight bits) or of each group of inputs in a
    column (four bits) is met exactly; no other is farther off than half a step.

    Args:
      weight: of float32, bfloat16 or float16. Four bits take their scales in its dtype,
        eight bits in float32.
      kind: "int8" in steps of 1/127 of the largest, "int4" of 1/7, "nf4" to the levels
        of arXiv:2305.14314.
      group: most inputs that share a scale in four bits. The groups are equal: of the
        largest divisor of I up to this.
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
        # Rounded to what is kept before it is divided by.
        scales = (largest / 7).astype(weight.dtype)
        values = _rounded(exact, scales.astype(jnp.float32)[:, None], 7)
        return Int4(values.reshape(weight.shape).astype(jnp.int4), scales)
    scales = largest.astype(weight.dtype)
    codes = _nearest_levels(exact / _divisor(scales.astype(jnp.float32)[:, None]))
    return NF4(codes.reshape(weight.shape).astype(jnp.uint4), scales)


def _rounded(weight: Array, steps: Array, most: int) -> Array:
    return jnp.clip(jnp.round(weight / _divisor(steps)), -most, most)


def _divisor(scales: Array) -> Array:
    """Where all is zero, so is what is divided."""
    return jnp.where(scales > 0, scales, 1.0)


def _nearest_levels(numbers: Array) -> Array:
    """The code of the level that is nearest to each number."""
    levels = np.asarray(NF4_LEVELS, np.float32)
    codes = jnp.zeros(numbers.shape, jnp.int32)
    for bar in (levels[1:] + levels[:-1]) / 2:
        codes = codes + (numbers > bar)
    return codes


@functools.partial(jax.jit, static_argnames=("kind", "group"))
def _quantized(weight: Array, kind: Kind, group: int) -> Any:
    """One weight, or all layers of one, a layer at a time."""
    one = functools.partial(quantize, kind=kind, group=group)
    return one(weight) if weight.ndim == 2 else jax.lax.map(one, weight)


def describe(params: Params) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A tree as plain arrays that anything can store, and what else there is to know.

    Returns:
      The arrays by path: plain weights under their own, of quantized ones
      `.../values` and `.../scales`. Four-bit values are packed: two in a byte (uint8),
      the first half of all inputs in its low bits. And by path the kind and number of
      inputs of each quantized weight, for JSON. `restore` makes the tree of both.
    """
    arrays: dict[str, Any] = {}
    described: dict[str, dict[str, Any]] = {}
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
    arrays: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The tree that `describe` took apart.

    Raises:
      CheckpointError: the two do not belong together.
    """
    left = dict(arrays)
    for path, facts in described.items():
        try:
            kind, inputs = cast(Kind, facts["kind"]), facts["inputs"]
            form = KINDS[kind]
            values, scales = left.pop(f"{path}/values"), left.pop(f"{path}/scales")
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: is described as quantized, but {error} is missing or not "
                "known; quantize the model again"
            ) from error
        if kind != "int8":
            unpack = _unpack_codes if kind == "nf4" else _unpack_integers
            values = unpack(jnp.asarray(values), inputs)
        left[path] = form(values, scales)
    return unflatten(left)


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
