"""A run over several processes, of which each has some of the devices.

Every process runs the same program on the same arguments, and computes the same
results; `is_main()` is the one that shows them. Of data and weights each reads what its
own devices need.

What happens when one of them is gone is told in `meeting`: the others say which one it
was on standard error, and end with status 1, wherever they are.
"""

import atexit
import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax._version import __version__
from llama_jax.clusters import Cluster, find_cluster
from llama_jax.errors import LlamaJaxError, MeshError, ProcessError
from llama_jax.meeting import Meeting
from llama_jax.runtime import Rules
from llama_jax.sharding import axes_size, divisible, spec
from llama_jax.types import Mesh

_LOSS_SECONDS = 5.0

_meeting: Meeting | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    silence: float = 100.0,
    on_loss: Callable[[str], None] | None = None,
) -> bool:
    """Find the other processes of this run; to be called before anything of JAX's.

    Where there are none it returns at once. When the program ends, it waits until the
    others have ended too.

    Args:
      coordinator: `host:port` where process 0 listens, as the others see it.
      num_processes: of the run.
      process_id: of this process, from 0.
      environ: `os.environ`, to ask SLURM or a TPU pod where the three are not given.
      timeout: seconds to wait for the others.
      silence: seconds after which a process that says nothing is taken for gone.
      on_loss: called from another thread with a sentence when one of the others is
        gone; by default that goes to standard error, and this process ends.

    Returns:
      Whether there are several processes.

    Raises:
      ProcessError: the arguments are incomplete or contradict each other, another
        process did not come, or JAX has been used before.
    """
    global _meeting
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        cluster = find_cluster(environ) if environ is not None else None
    else:
        cluster = _check(*given)
    if cluster is None or cluster.num_processes == 1:
        return False
    if _meeting is not None:
        raise ProcessError("the processes have met already; initialize only once")
    host, _, port = cluster.coordinator.rpartition(":")
    _meeting = Meeting(
        (host.strip("[]"), int(port)),
        cluster.process_id,
        cluster.num_processes,
        timeout=timeout,
        silence=silence,
        on_loss=on_loss or _end_here,
        facts=f"llama_jax {__version__}, jax {jax.__version__}",
    )
    # By default at both ends of what is supported, but it may have been switched off.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    atexit.register(_leave)
    try:
        on_term = signal.getsignal(signal.SIGTERM)
        jax.distributed.initialize(
            _meeting.jax_address,
            cluster.num_processes,
            cluster.process_id,
            # With SLURM, a process has the GPU of its number on its machine.
            cluster_detection_method=(
                "slurm" if cluster.kind == "slurm" else "deactivate"
            ),
            coordinator_bind_address=_meeting.jax_address,
            initialization_timeout=math.ceil(timeout),
            # Who is gone must be known here before JAX ends this process over it.
            heartbeat_timeout_seconds=math.ceil(4 * silence) + 100,
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ProcessError(
            f"jax cannot begin with several processes: {reason}"
        ) from error
    # JAX keeps the signal to itself: nothing would end a process any more but a kill.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)
    return True


def _check(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Cluster:
    if coordinator is None or num_processes is None or process_id is None:
        raise ProcessError(
            "--coordinator, --num-processes and --process-id belong together; give all "
            "three, or none"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ProcessError(
            f"--coordinator is {coordinator!r}; it must be HOST:PORT, where process 0 "
            "listens"
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ProcessError(
            f"--process-id is {process_id} and --num-processes {num_processes}; "
            f"processes are numbered from 0 to the number of them less one"
        )
    return Cluster(coordinator, num_processes, process_id, "flags")


def _end_here(why: str) -> None:
    """End this process, whatever its other threads wait for."""
    _say(why)
    os._exit(1)


def _say(why: str) -> None:
    # Not on what commands may have put in its place.
    channel = sys.__stderr__
    if channel is not None:
        channel.write(f"error: {why}\n")
        channel.flush()


def _leave() -> None:
    """At the program's end: after all, or with a word of what went wrong."""
    if _meeting is None:
        return
    error = getattr(sys, "last_value", None)  # what nobody caught
    if error is None:
        _meeting.end()
    else:
        fail(error)


def fail(error: BaseException, status: int = 1) -> None:
    """Tell the other processes that this one ends with an error, and end it so.

    Where that is because another one is gone, that is said instead. With a single
    process, and before `initialize`, it does nothing.
    """
    if _meeting is None:
        return
    if not isinstance(error, LlamaJaxError | OSError | KeyboardInterrupt):
        # A collective operation that breaks may be known before who has broken it.
        time.sleep(1.0)
    if not _meeting.fail(str(error).partition("\n")[0] or type(error).__name__):
        time.sleep(_LOSS_SECONDS)  # in which `on_loss` is called
    for channel in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            if channel is not None:
                channel.flush()
    # JAX's own way out would wait five minutes for the others.
    os._exit(status)


def is_main() -> bool:
    """Whether this is the process that prints, writes metrics and shows progress."""
    return _meeting is None or _meeting.index == 0


def place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (0, 1) if _meeting is None else (_meeting.index, _meeting.count)


def barrier(name: str, timeout: float | None = 300.0) -> None:
    """Return when every process has come here as often as this one.

    Args:
      name: of the place, which the error says too.
      timeout: seconds to wait; None for as long as the others live.

    Raises:
      ProcessError: some did not come in time; it says which, and on which machines.
    """
    if _meeting is not None:
        _meeting.barrier(name, timeout)


def agreed(number: int) -> int:
    """Process 0's number (below 2^63), in every process."""
    if _meeting is None:
        return number
    halves = np.asarray([number >> 32, number & 0xFFFFFFFF], np.uint32)
    high, low = multihost_utils.broadcast_one_to_all(halves)
    return int(high) << 32 | int(low)


def share_of_rows(mesh: Mesh | None, rules: Rules = Rules()) -> tuple[int, int]:  # noqa: B008  (it is frozen)
    """Which share of a global batch's rows this process has to read, of how many.

    That depends on the mesh: processes that split a model between them read the same
    rows.

    Raises:
      MeshError: the rows of a process are not next to each other, or overlap others'.
    """
    if mesh is None:
        return 0, 1
    owners = {device: device.process_index for device in mesh.devices.flat}
    blocks = blocks_of_rows(owners, mesh, rules)
    return blocks[jax.process_index()]


def blocks_of_rows(
    owners: Mapping[jax.Device, int],
    mesh: Mesh,
    rules: Rules = Rules(),  # noqa: B008
) -> dict[int, tuple[int, int]]:
    """`share_of_rows` of every process, given the process of each device."""
    names = dict(rules.activations)["B"]
    ways = axes_size(mesh, names)
    rows = NamedSharding(mesh, spec("B", rules.activations))
    parts: dict[int, set[int]] = {}
    for device, (index,) in rows.devices_indices_map((ways,)).items():
        parts.setdefault(owners[device], set()).update(range(*index.indices(ways)))
    size = len(next(iter(parts.values())))
    blocks = [set(range(first, first + size)) for first in range(0, ways, size)]
    if any(part not in blocks for part in parts.values()):
        raise MeshError(
            f"mesh {dict(mesh.shape)}: its {len(parts)} processes cannot share a "
            "batch's rows equally; let the devices of each be a multiple or a divisor "
            "of sequence x tensor"
        )
    return {
        process: (blocks.index(part), len(blocks)) for process, part in parts.items()
    }


def from_host_rows(rows: Any, mesh: Mesh | None, rules: Rules = Rules()) -> Any:  # noqa: B008
    """Global arrays, from the rows that each process has.

    Args:
      rows: a tree of [B, T] or [B] arrays: of the global batch those rows that
        `share_of_rows` says, whole in T.
      mesh: of all processes; where there is none, the rows are the batch.
      rules: how B and T are split.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, rows)
    _, count = share_of_rows(mesh, rules)

    def whole(local: Any) -> Any:
        local = np.asarray(local)
        shape = (local.shape[0] * count, *local.shape[1:])
        axes = " ".join(("B", "T")[: local.ndim])
        placed = NamedSharding(mesh, divisible(shape, axes, rules, mesh))
        return jax.make_array_from_process_local_data(placed, local, shape)

    return jax.tree.map(whole, rows)


def to_host(tree: Any) -> Any:
    """The whole value of arrays as NumPy arrays, in every process.

    For what is small: tokens, metrics. Where arrays lie over several processes each
    must call this, at the same point of the program.
    """

    def is_here(leaf: Any) -> bool:
        return not isinstance(leaf, jax.Array) or (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )

    leaves, treedef = jax.tree.flatten(tree)
    far = [leaf for leaf in leaves if not is_here(leaf)]
    if far:
        mesh = far[0].sharding.mesh
        near = iter(_everywhere(far, NamedSharding(mesh, PartitionSpec())))
        leaves = [leaf if is_here(leaf) else next(near) for leaf in leaves]
    return jax.device_get(jax.tree.unflatten(treedef, leaves))


@functools.partial(jax.jit, static_argnames="place")
def _everywhere(arrays: list[Any], place: NamedSharding) -> list[Any]:
    return [jax.lax.with_sharding_constraint(array, place) for array in arrays]
