"""The loss of each token on a mesh: each device has its tokens and its part of V.

The head is gathered along D once, and its gradient reduced once over the devices that
share it; XLA's own partitioning does both for every chunk.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec

from llama_jax import kernels
from llama_jax.runtime import Rules
from llama_jax.sharding import activation_spec, axes_size, partition_spec
from llama_jax.types import Array, Float, Int, Mesh

_Result = TypeVar("_Result")


def token_losses(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    rules: Rules,
    mesh: Mesh | None,
) -> Float[Array, "B T"]:
    """Compute `kernels.token_losses`, on a mesh if there is one.

    Args:
      x: hidden states.
      head: weights of the output head.
      targets: the token that follows each.
      rules: map axis letters to mesh axes.
      mesh: the devices.

    Returns:
      -log p of each target (nats, float32).
    """
    return _on_mesh(kernels.token_losses, x, head, targets, rules=rules, mesh=mesh)


def greedy_tokens(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    *,
    rules: Rules,
    mesh: Mesh | None,
) -> kernels.GreedyTokens:
    """Compute `kernels.greedy_tokens`, on a mesh if there is one.

    Args:
      x: hidden states.
      head: weights of the output head.
      rules: map axis letters to mesh axes.
      mesh: the devices.

    Returns:
      The likeliest token after each, and its loss.
    """
    return _on_mesh(kernels.greedy_tokens, x, head, rules=rules, mesh=mesh)


def _on_mesh(
    function: Callable[..., _Result],
    x: Array,
    head: Array,
    *targets: Array,
    rules: Rules,
    mesh: Mesh | None,
) -> _Result:
    if mesh is None or mesh.size == 1:
        return function(x, head, *targets)
    rows, tokens, _ = activation_spec(x.shape, "B T D", rules, mesh)
    ids = activation_spec(head.shape, "D V", rules, mesh)[1]
    cut = partition_spec("D V", rules.weights)[0]
    width = head.shape[0]
    cut = cut if cut and width % axes_size(mesh, cut) == 0 else None

    def on_device(x: Array, head: Array, *targets: Array) -> _Result:
        head = head.astype(x.dtype)
        if cut:
            head = jax.lax.all_gather(head, cut, axis=0, tiled=True)
        return function(x, head, *targets, axis_name=ids)

    per_token = PartitionSpec(rows, tokens)
    result: _Result = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(per_token, PartitionSpec(cut, ids), *(per_token for _ in targets)),
        out_specs=per_token,
        check_vma=False,
    )(x, head, *targets)
    return result
