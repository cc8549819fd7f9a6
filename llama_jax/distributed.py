"""Runs over several processes, each of which has some of the devices.

Every process runs the same program with the same arguments and computes the same
results; only the main process (`is_main`) prints and writes them. Each process reads
the rows and the parts of weights that its own devices need.

JAX connects the processes and watches over them: if one dies, it ends the others within
the heartbeat timeout.
"""

import urllib.request
from collections.abc import Mapping
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from llama_jax.errors import MeshError, ProcessError
from llama_jax.runtime import Rules
from llama_jax.sharding import activation_spec, axes_size, partition_spec
from llama_jax.types import Mesh

Launcher = Literal["slurm", "ompi", "gketpu", "gcetpu"]
"""How processes were started; the names of JAX's `cluster_detection_method`."""

HEARTBEAT_TIMEOUT = 100
"""Seconds without a heartbeat after which JAX takes a process for dead."""

_METADATA_TIMEOUT = 2.0


def find_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Decide from the environment whether this process is one of several.

    JAX's own detection also connects single processes: on Kaggle, where
    `TPU_WORKER_HOSTNAMES` is `local`, it looks for that host for five minutes.

    Args:
      environ: environment variables, after `import jax`, which sets
        `TPU_SKIP_MDS_QUERY` on machines without a TPU chip.

    Returns:
      What started the processes, or None if this process runs alone. `"gcetpu"` is a
      TPU virtual machine whose variables do not say how many hosts there are;
      `count_tpu_hosts` asks its metadata server.
    """

    def count(name: str) -> int:
        text = environ.get(name, "")
        return int(text) if text.isdecimal() else 1

    # Only `srun` sets the step's variables; a batch script has none of them.
    if "SLURM_STEP_NODELIST" in environ and count("SLURM_STEP_NUM_TASKS") > 1:
        return "slurm"
    if count("OMPI_COMM_WORLD_SIZE") > 1:
        return "ompi"
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:
        several = "," in hosts or count("MEGASCALE_NUM_SLICES") > 1
        return "gketpu" if several else None
    return None if "TPU_SKIP_MDS_QUERY" in environ else "gcetpu"


def count_tpu_hosts(environ: Mapping[str, str]) -> int:
    """Ask the metadata server of a TPU virtual machine how many hosts its slice has.

    JAX would wait a minute for a server that does not answer; this waits two seconds.

    Returns:
      The number of hosts; 1 if there is no server.
    """
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/"
        "worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    # The server is on the machine's own network, not beyond a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_METADATA_TIMEOUT) as response:
            return int(response.read().count(b",")) + 1
    except OSError:
        return 1


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    launcher: Launcher | None = None,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Connect this process to the others; call it before anything else of JAX.

    Give either the first three arguments or `launcher`. With SLURM and Open MPI, JAX
    gives a process one GPU, that of its number on its machine; otherwise all of them.

    Args:
      coordinator: `host:port` at which process 0 listens.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      launcher: what started the processes (`find_launcher`).
      heartbeat_timeout: seconds after which a silent process counts as dead.

    Raises:
      ProcessError: JAX does not find the other processes, or is in use already.
    """
    # The default of all supported versions, unless it was switched off.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=launcher or "deactivate",
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (RuntimeError, ValueError, KeyError, ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ProcessError(
            f"several processes: JAX cannot connect them ({reason}); give "
            "--coordinator, --num-processes and --process-id to each of them"
        ) from error


def is_main() -> bool:
    """Return whether this is process 0, which prints and writes results."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has called this.

    Args:
      name: the same in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_main(number: int) -> int:
    """Return process 0's number (from 0 to 2^63 - 1) in every process."""
    if jax.process_count() == 1:
        return number
    # Without 64-bit types JAX would cut it.
    halves = np.asarray([number >> 32, number & 0xFFFFFFFF], np.uint32)
    high, low = multihost_utils.broadcast_one_to_all(halves)
    return int(high) << 32 | int(low)


def share_of_rows(mesh: Mesh | None, rules: Rules = Rules()) -> tuple[int, int]:  # noqa: B008  (it is frozen)
    """Return which share of a global batch's rows this process must read.

    Processes that split a model between them read the same rows.

    Returns:
      The index of the share, from 0, and the number of shares.

    Raises:
      MeshError: the rows of a process are not next to each other, or overlap others'.
    """
    if mesh is None:
        return 0, 1
    processes = {device: device.process_index for device in mesh.devices.flat}
    return row_shares(processes, mesh, rules)[jax.process_index()]


def row_shares(
    processes: Mapping[jax.Device, int],
    mesh: Mesh,
    rules: Rules = Rules(),  # noqa: B008
) -> dict[int, tuple[int, int]]:
    """Return `share_of_rows` of every process, given the process of each device."""
    num_blocks = axes_size(mesh, dict(rules.activations)["B"])
    rows = NamedSharding(mesh, partition_spec("B", rules.activations))
    blocks: dict[int, set[int]] = {}
    for device, (index,) in rows.devices_indices_map((num_blocks,)).items():
        own = blocks.setdefault(processes[device], set())
        own.update(range(*index.indices(num_blocks)))
    size = len(next(iter(blocks.values())))
    shares = [set(range(first, first + size)) for first in range(0, num_blocks, size)]
    if any(own not in shares for own in blocks.values()):
        raise MeshError(
            f"mesh {dict(mesh.shape)}: its {len(blocks)} processes cannot share a "
            "batch's rows equally; let the devices of each be a multiple or a divisor "
            "of sequence x tensor"
        )
    return {
        process: (shares.index(own), len(shares)) for process, own in blocks.items()
    }


def from_host_rows(
    rows: PyTree[np.ndarray],
    mesh: Mesh | None,
    rules: Rules = Rules(),  # noqa: B008
) -> PyTree[jax.Array]:
    """Make global arrays from the rows that each process has read.

    Args:
      rows: tree of [B, T], [B] or other [B, ...] arrays, the rows of the global batch
        that `share_of_rows` names, complete in T.
      mesh: mesh of all processes; without one the rows are the batch.
      rules: how B and T are split.

    Returns:
      The same tree of global arrays.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, rows)
    _, num_shares = share_of_rows(mesh, rules)

    def global_array(leaf: np.ndarray) -> jax.Array:
        local = np.asarray(leaf)
        shape = (local.shape[0] * num_shares, *local.shape[1:])
        axes = "B T" if local.ndim == 2 else "B"
        spec = activation_spec(shape[: len(axes.split())], axes, rules, mesh)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(global_array, rows)


def to_host(tree: PyTree) -> PyTree:
    """Return the tree with its complete arrays as NumPy arrays, in every process.

    For small arrays: tokens, metrics. If an array is split over several processes, all
    of them must call this at the same point of the program.
    """

    def is_local(leaf: object) -> bool:
        return not isinstance(leaf, jax.Array) or (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        )

    leaves, treedef = jax.tree.flatten(tree)
    if not all(map(is_local, leaves)):
        split = [leaf for leaf in leaves if not is_local(leaf)]
        replicated = NamedSharding(split[0].sharding.mesh, PartitionSpec())
        gathered = iter(jax.jit(_identity, out_shardings=replicated)(split))
        leaves = [leaf if is_local(leaf) else next(gathered) for leaf in leaves]
    return jax.device_get(jax.tree.unflatten(treedef, leaves))


def _identity(arrays: list[jax.Array]) -> list[jax.Array]:  # one function, one cache
    return arrays
