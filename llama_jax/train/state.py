"""`TrainState`: trained leaves, the optimizer's state, and the number of steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.arguments import checked
from llama_jax.errors import TrainError
from llama_jax.types import AnyMesh, Array, Int, Mesh, PyTree


class TrainState(NamedTuple):
    """The arrays that a training step updates.

    Attributes:
      step: number of steps done.
      params: trained leaves: all weights, or adapters.
      opt_state: state of the optimizer, sharded as the weights are.

    >>> import jax.numpy as jnp, optax
    >>> state = init_state({"x": jnp.zeros(3)}, optax.adam(1e-3))
    >>> int(state.step), state.opt_state[0].mu["x"].shape
    (0, (3,))
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: optax.OptState


@checked(TrainError)
def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Make the state before the first step; moments are initialized sharded.

    Args:
      params: trained leaves. They are not copied, and the first step donates them.
      optimizer: the optimizer.

    >>> import jax.numpy as jnp, optax
    >>> int(init_state({"x": jnp.zeros(3)}, optax.sgd(0.1)).step)
    0
    """
    shardings = None
    leaves = jax.tree.leaves(params)
    if isinstance(leaves[0].sharding, NamedSharding):
        param_shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        shapes = jax.eval_shape(optimizer.init, params)
        shardings = opt_state_shardings(
            optimizer, shapes, params, param_shardings, leaves[0].sharding.mesh
        )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step = jnp.zeros((), jnp.int32)
    if shardings is not None:
        replicated = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
        step = jax.device_put(step, replicated)
    return TrainState(step, params, opt_state)


def state_shapes(
    params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """Describe the state as `jax.ShapeDtypeStruct`s, without memory.

    Args:
      params: shapes of the trained leaves, with shardings if there is a mesh.
      optimizer: the optimizer.
      mesh: devices.
    """
    step: PyTree = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, params)
    if mesh is None:
        return TrainState(step, params, opt_state)
    param_shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    shardings = opt_state_shardings(optimizer, opt_state, params, param_shardings, mesh)
    opt_state, step = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        (opt_state, step),
        (shardings, NamedSharding(mesh, PartitionSpec())),
    )
    return TrainState(step, params, opt_state)


def opt_state_shardings(
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: PyTree,
    shardings: PyTree[NamedSharding],
    mesh: AnyMesh,
) -> PyTree[NamedSharding]:
    """Shardings of an optimizer's state: arrays shaped like a weight are sharded as it.

    Others (counts, Adafactor's rows and columns) are replicated.

    Args:
      optimizer: the optimizer.
      opt_state: its state, or the shapes of it.
      params: trained leaves, or their shapes.
      shardings: of `params`.
      mesh: devices.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def is_masked(leaf: object) -> bool:
        return isinstance(leaf, optax.MaskedNode)  # weights of another optimizer

    def sharding_of(moment: PyTree, weight: PyTree, sharding: PyTree) -> PyTree:
        if is_masked(moment):
            return moment
        return sharding if moment.shape == weight.shape else replicated

    return optax.tree_utils.tree_map_params(
        optimizer,
        sharding_of,
        opt_state,
        params,
        shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=is_masked,
    )
