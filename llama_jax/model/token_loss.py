"""The loss of each token on a mesh: each device has its tokens, and its ids.

The head is put together along D once, and its gradient is added up once, over the
devices that share it: within XLA's own partition both would be done for every chunk.
"""

import jax
from jax.sharding import PartitionSpec

from llama_jax import kernels
from llama_jax.runtime import Rules
from llama_jax.sharding import axes_size, divisible, spec
from llama_jax.types import Array, Float, Int, Mesh


def token_losses(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    rules: Rules,
    mesh: Mesh | None,
) -> Float[Array, "B T"]:
    """`kernels.token_losses`, on a mesh where there is one."""
    if mesh is None or mesh.size == 1:
        return kernels.token_losses(x, head, targets)
    rows, tokens, _ = divisible(x.shape, "B T D", rules, mesh)
    ids = divisible(head.shape, "D V", rules, mesh)[1]
    held = spec("D V", rules.weights)[0]
    width = head.shape[0]
    held = held if held and width % axes_size(mesh, held) == 0 else None

    def on_device(x: Array, head: Array, targets: Array) -> Array:
        head = head.astype(x.dtype)
        if held:
            head = jax.lax.all_gather(head, held, axis=0, tiled=True)
        return kernels.token_losses(x, head, targets, axis_name=ids)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(
            PartitionSpec(rows, tokens),
            PartitionSpec(held, ids),
            PartitionSpec(rows, tokens),
        ),
        out_specs=PartitionSpec(rows, tokens),
        check_vma=False,
    )(x, head, targets)
