"""`Stop`: ends a run early, after the same step in all processes."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.types import Array


class Stop:
    """A request to end a run, called after each step; all processes must call it.

    Any thread or signal handler of any process may request it. With one process the
    next call returns true. With several the answer is one step late, so that no step
    waits for the processes' votes, which are counted on the devices.

    >>> stop = Stop()
    >>> stop()
    False
    >>> stop.request()
    >>> stop()
    True
    """

    def __init__(self) -> None:
        self.requested = False
        self._votes: Array | None = None

    def request(self) -> None:
        """Ask the run to stop."""
        self.requested = True

    def __call__(self) -> bool:
        """Whether to stop now; the same in all processes."""
        if jax.process_count() == 1:
            return self.requested
        before, self._votes = self._votes, _vote(self.requested)
        return before is not None and bool(before)


def _vote(requested: bool) -> Array:
    """Whether any process votes to stop, as an array that nobody waits for."""
    mesh = _all_devices()
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    votes = np.full(jax.local_device_count(), requested, np.int32)
    any_vote: Array = _max(mesh)(
        jax.make_array_from_process_local_data(sharding, votes)
    )
    return any_vote


@functools.cache
def _all_devices() -> Mesh:
    return Mesh(np.asarray(jax.devices()), ("all",))


@functools.cache
def _max(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
