"""What training changes: the trained leaves, the optimizer's, and the step's number."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.types import Array, Int, Mesh


class TrainState(NamedTuple):
    """Arrays that a step takes and gives back.

    Attributes:
      step: how many batches were taken.
      params: the trained leaves: all weights, or adapters.
      opt_state: the optimizer's, with arrays that lie where their weights lie.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; moments are born where their weights lie.

    The weights are taken over, not copied: the first step donates them.
    """
    places = None
    leaves = jax.tree.leaves(params)
    if isinstance(leaves[0].sharding, NamedSharding):
        of_params = jax.tree.map(lambda leaf: leaf.sharding, params)
        shapes = jax.eval_shape(optimizer.init, params)
        places = opt_state_shardings(
            optimizer, shapes, params, of_params, leaves[0].sharding.mesh
        )
    moments = jax.jit(optimizer.init, out_shardings=places)(params)
    step = jnp.zeros((), jnp.int32)
    if places is not None:
        whole = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
        step = jax.device_put(step, whole)
    return TrainState(step, params, moments)


def state_shapes(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s, which take no memory.

    Args:
      params: of the trained leaves, with their shardings where there is a mesh.
      optimizer: whose moments.
      mesh: where they lie.
    """
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    moments = jax.eval_shape(optimizer.init, params)
    if mesh is None:
        return TrainState(step, params, moments)
    of_params = jax.tree.map(lambda leaf: leaf.sharding, params)
    places = opt_state_shardings(optimizer, moments, params, of_params, mesh)
    moments, step = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        (moments, step),
        (places, NamedSharding(mesh, PartitionSpec())),
    )
    return TrainState(step, params, moments)


def opt_state_shardings(
    optimizer: optax.GradientTransformation,
    opt_state: Any,
    params: Any,
    shardings: Any,
    mesh: Any,
) -> Any:
    """Where an optimizer's arrays lie: those shaped like a weight where it lies.

    Others (counts, Adafactor's rows and columns) are whole on every device.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def place(moment: Any, weight: Any, sharding: Any) -> Any:
        return sharding if moment.shape == weight.shape else whole

    return optax.tree_utils.tree_map_params(
        optimizer,
        place,
        opt_state,
        params,
        shardings,
        transform_non_params=lambda _: whole,
    )
