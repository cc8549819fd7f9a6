"""What a cluster says of the processes that it has started: which, and how many."""

import re
import urllib.request
from collections.abc import Mapping
from typing import Literal, NamedTuple

from llama_jax.errors import ProcessError

PORT = 8476
"""Where process 0 listens, where nothing says else."""

_METADATA_SECONDS = 2.0


class Cluster(NamedTuple):
    """The place of a process in a run.

    Attributes:
      coordinator: host and port of process 0.
      num_processes: of the run.
      process_id: of this process.
      kind: who says so; `"flags"` where the caller did.
    """

    coordinator: str
    num_processes: int
    process_id: int
    kind: Literal["flags", "slurm", "tpu"]


def find_cluster(environ: Mapping[str, str]) -> Cluster | None:
    """What the environment says of this process, or None where it runs alone.

    Steps that `srun` has started, and hosts of a TPU pod. A machine that is not one
    (Colab, Kaggle, a single TPU host) is never waited for: the only question that goes
    over the network has two seconds, and is asked on machines with TPU chips alone.
    JAX's own search waits five minutes for a host that Kaggle calls `local`.

    Raises:
      ProcessError: what it says makes no sense.
    """
    try:
        found = _slurm(environ) or _tpu_pod(environ)
    except (ValueError, KeyError, IndexError) as error:
        raise ProcessError(
            f"the cluster's environment is not understood ({error}); say it with "
            "--coordinator, --num-processes and --process-id"
        ) from error
    return found if found is not None and found.num_processes > 1 else None


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    # Only `srun` sets these; in a batch script without it there is one process.
    if not {"SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"} <= environ.keys():
        return None
    return Cluster(
        # Two jobs that share a machine should not share a port.
        f"{first_host(environ['SLURM_STEP_NODELIST'])}:"
        f"{61440 + int(environ['SLURM_JOB_ID']) % 4096}",
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_PROCID"]),
        "slurm",
    )


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts: of `node[007-011,020],login`, `node007`."""
    found = re.match(r"([^,\[\]]+)(?:\[(\w+)[^\]]*\]([^,\[\]]*))?", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}")
    return "".join(part or "" for part in found.groups())


def _tpu_pod(environ: Mapping[str, str]) -> Cluster | None:
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if names is not None:
        own = environ.get("TPU_WORKER_ID", environ.get("CLOUD_TPU_TASK_ID", "0"))
    elif "TPU_SKIP_MDS_QUERY" in environ:  # JAX sets it where there is no chip
        return None
    else:
        # A host of a Cloud TPU; elsewhere nobody answers.
        try:
            names = _metadata(environ, "worker-network-endpoints")
            own = _metadata(environ, "agent-worker-number")
        except OSError:
            return None
    # `name:number:address`, or an address (and perhaps a port) alone.
    parts = [name.strip().split(":") for name in names.split(",")]
    hosts = [part[2] if len(part) == 3 else part[0] for part in parts]
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
    first = hosts[0]
    if slices > 1:
        first = environ["MEGASCALE_COORDINATOR_ADDRESS"].partition(":")[0]
    place = int(environ.get("MEGASCALE_SLICE_ID") or 0) * len(hosts) + int(own)
    return Cluster(f"{first}:{PORT}", slices * len(hosts), place, "tpu")


def _metadata(environ: Mapping[str, str], key: str) -> str:
    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    # It is on the machine's own network, whatever proxy leads out of that.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_METADATA_SECONDS) as answer:
        return str(answer.read(1 << 16), "utf-8")
