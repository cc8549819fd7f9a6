"""When a run is to stop early: one process is told, and all stop behind one step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.distributed import place


class Stop:
    """To be asked behind each step; of several processes all must ask.

    Any thread or signal handler of any process may call `ask`. With one process the
    next question is answered with yes. With several the answers come one question
    later, so that no step waits for the votes: they are counted on the devices.
    """

    def __init__(self) -> None:
        self.asked = False
        self._votes: Any = None

    def ask(self) -> None:
        """Let the run stop."""
        self.asked = True

    def __call__(self) -> bool:
        """Whether to stop now; the same in all processes."""
        if place()[1] == 1:
            return self.asked
        before, self._votes = self._votes, _vote(self.asked)
        return before is not None and bool(before)


def _vote(asked: bool) -> Any:
    mesh = _all_devices()
    every = NamedSharding(mesh, PartitionSpec("all"))
    own = np.full(jax.local_device_count(), asked, np.int32)
    return _most(mesh)(jax.make_array_from_process_local_data(every, own))


@functools.cache
def _all_devices() -> Mesh:
    return Mesh(np.asarray(jax.devices()), ("all",))


@functools.cache
def _most(mesh: Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
