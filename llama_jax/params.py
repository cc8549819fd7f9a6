"""The table of weights and their axes, and operations on trees of parameters.

`AXES` describes each weight once: its path and a letter per axis. Shapes, shardings,
initialization and conversion are derived from it.

A tree has one of two layouts. *Stacked*: one array per kind of layer weight, with a
leading axis L, as in the table. *Unrolled*: one array per layer, without L, with the
layer's number in the path (`transformer/layers/3/attention/q_proj`). Checkpoints on
disk are unrolled.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.runtime import LayerLayout
from llama_jax.types import Array, FlatParams, Params, PyTree

AXES: dict[str, str] = {
    "transformer/embedding": "V D",
    "transformer/layers/attention_norm/scale": "L D",
    "transformer/layers/attention/q_proj": "L D NH",
    "transformer/layers/attention/k_proj": "L D KH",
    "transformer/layers/attention/v_proj": "L D KH",
    "transformer/layers/attention/o_proj": "L NH D",
    "transformer/layers/mlp_norm/scale": "L D",
    "transformer/layers/mlp/gate_proj": "L D F",
    "transformer/layers/mlp/up_proj": "L D F",
    "transformer/layers/mlp/down_proj": "L F D",
    "transformer/final_norm/scale": "D",
    "lm_head": "D V",
    "scalar_head": "D",
}
"""Every weight and the letters of its axes; NH = N × H and KH = K × H.

>>> import llama_jax
>>> llama_jax.AXES["transformer/layers/attention/q_proj"]
'L D NH'
"""

SCALAR_HEAD = "scalar_head"

LAYERS = "transformer/layers/"
"""The prefix of every layer weight's path, in either layout."""


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
    """The size of each axis letter of `AXES` for a model."""
    return {
        "V": config.vocab_size,
        "D": config.embed_dim,
        "L": config.num_layers,
        "NH": config.num_heads * config.head_dim,
        "KH": config.num_kv_heads * config.head_dim,
        "F": config.mlp_dim,
    }


def row_of(path: str) -> tuple[str, int | None]:
    """The row of `AXES` for a path in either layout, and its layer if it has one."""
    layer, _, weight = path.removeprefix(LAYERS).partition("/")
    if path.startswith(LAYERS) and layer.isdecimal():
        return LAYERS + weight, int(layer)
    return path, None


def axes_of(path: str) -> str:
    """The axis letters of a leaf, without `L` if its path has a layer number."""
    row, layer = row_of(path)
    return AXES[row] if layer is None else AXES[row].removeprefix("L ")


def init_std(path: str, config: LlamaConfig) -> float | None:
    """Standard deviation of a leaf's initial values; None for norms, which are ones.

    0.02, and 0.02 / √(2 L) for the 2 L projections whose outputs are added to the
    residual stream (GPT-2), so that its variance does not grow with depth.
    """
    if path.endswith("/scale"):
        return None
    if path.endswith(("/o_proj", "/down_proj")):
        return 0.02 / (2 * config.num_layers) ** 0.5
    return 0.02


def draw(
    key: Array, shape: tuple[int, ...], dtype: DTypeLike, std: float | None
) -> Array:
    """Initial values of a leaf: normal with standard deviation `std`, or ones."""
    if std is None:
        return jnp.ones(shape, dtype)
    return std * jax.random.normal(key, shape, dtype)


def weight_shape(config: LlamaConfig, axes: str) -> tuple[int, ...]:
    """The shape of axis letters in a model: `"D NH"` gives `(4096, 4096)`."""
    sizes = axis_sizes(config)
    return tuple(sizes[letter] for letter in axes.split())


def leaf_paths(config: LlamaConfig, layout: LayerLayout = "unrolled") -> Iterator[str]:
    """The path of every leaf, in the order of the forward pass."""
    absent = {"scalar": "lm_head", "lm": SCALAR_HEAD}[config.head]
    tied = config.tied_embeddings
    layer_rows = [path for path in AXES if path.startswith(LAYERS)]
    for path in AXES:
        if path == absent or (path == "lm_head" and tied):
            continue
        if layout == "unrolled" and path == layer_rows[0]:
            for layer in range(config.num_layers):
                for row in layer_rows:
                    yield f"{LAYERS}{layer}/{row.removeprefix(LAYERS)}"
        elif layout == "stacked" or path not in layer_rows:
            yield path


def param_shapes(
    config: LlamaConfig,
    layout: LayerLayout = "unrolled",
    *,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, PyTree]:
    """The parameters of a model as a tree of `jax.ShapeDtypeStruct`s."""
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(weight_shape(config, axes_of(path)), dtype)
            for path in leaf_paths(config, layout)
        }
    )


def count_params(tree: Params) -> int:
    """The number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flatten(tree: Params) -> dict[str, PyTree]:
    """Convert nested dicts to one dict of `"a/b/c"` paths, in the tree's order."""
    flat: dict[str, PyTree] = {}
    for name, branch in tree.items():
        if isinstance(branch, Mapping):
            flat |= {f"{name}/{rest}": leaf for rest, leaf in flatten(branch).items()}
        else:
            flat[name] = branch
    return flat


def unflatten(flat: FlatParams) -> dict[str, PyTree]:
    """The inverse of `flatten`."""
    tree: dict[str, PyTree] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def stack_layers(
    tree: Params, stack: Callable[[list[Array]], Array] = jnp.stack
) -> dict[str, PyTree]:
    """Convert an unrolled tree to the stacked layout, one kind of weight at a time.

    Args:
      tree: in the unrolled layout.
      stack: stacks the arrays of all layers along a new first axis.
    """
    flat = flatten(tree)
    layers = len(tree["transformer"]["layers"])
    stacked = {}
    for path, leaf in flat.items():
        if not path.startswith(LAYERS):
            stacked[path] = leaf
            continue
        layer, _, weight = path.removeprefix(LAYERS).partition("/")
        if layer == "0":
            rows = [flat[f"{LAYERS}{index}/{weight}"] for index in range(layers)]
            stacked[LAYERS + weight] = stack(rows)
    return unflatten(stacked)


def unstack_layers(tree: Params) -> dict[str, PyTree]:
    """Convert a stacked tree to the unrolled layout; the inverse of `stack_layers`."""
    flat = flatten(tree)
    rows = {path: leaf for path, leaf in flat.items() if path.startswith(LAYERS)}
    layers = next(iter(rows.values())).shape[0]
    unrolled: dict[str, PyTree] = {}
    for path, leaf in flat.items():
        if path not in rows:
            unrolled[path] = leaf
        elif path == next(iter(rows)):
            for index in range(layers):
                for row, stacked in rows.items():
                    name = f"{LAYERS}{index}/{row.removeprefix(LAYERS)}"
                    unrolled[name] = stacked[index]
    return unflatten(unrolled)
