"""Commands in several processes: their flags, their start, and what they print."""

import argparse
import os
import signal
import sys

import jax

from llama_jax import distributed
from llama_jax.errors import ProcessError


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `start_processes` reads."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command in each process, with its own --process-id. SLURM "
        "(srun), Open MPI and TPU pods need none of these flags. All need --mesh.",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, as the other processes reach it",
    )
    group.add_argument(
        "--num-processes", type=int, metavar="N", help="number of processes"
    )
    group.add_argument(
        "--process-id", type=int, metavar="I", help="number of this process, from 0"
    )


def start_processes(args: argparse.Namespace, *, resume: str | None = None) -> bool:
    """Connect this process to the others, if flags or environment name several.

    Call it before anything else of JAX. Afterwards `sys.stdout` and `sys.stderr`
    discard what is written in all processes but the main one; `run` reports the errors
    of all.

    Args:
      args: with the flags of `add_process_arguments`, and `mesh`.
      resume: command that continues after a failure, for the message.

    Returns:
      Whether there are several processes.

    Raises:
      ProcessError: the flags are incomplete or wrong, or there is no --mesh.
    """
    flags = (args.coordinator, args.num_processes, args.process_id)
    launcher = None
    if flags != (None, None, None):
        _check_flags(*flags)
        if args.num_processes == 1:
            return False
    else:
        launcher = distributed.find_launcher(os.environ)
        if launcher == "gcetpu" and distributed.count_tpu_hosts(os.environ) == 1:
            return False
        if launcher is None:
            return False
    if args.mesh is None:
        raise ProcessError(
            "several processes need --mesh, which splits the model between them, as in "
            "--mesh fsdp=-1"
        )
    print("connecting to the other processes (at most 300 s)", file=sys.stderr)
    # Libraries in C++ write to file 1, which is for results.
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    timeout = distributed.HEARTBEAT_TIMEOUT
    distributed.initialize(*flags, launcher=launcher, heartbeat_timeout=timeout)
    # JAX catches the signal to announce a preemption; nothing would end the process.
    signal.signal(signal.SIGTERM, on_sigterm)
    if distributed.is_main():
        sys.stdout = os.fdopen(results, "w", encoding="utf-8", errors="replace")
        hint = f"; resume with: {resume}" if resume else ""
        print(
            f"{jax.process_count()} processes; if another one dies, this one ends "
            f"within {timeout + 10} s{hint}",
            file=sys.stderr,
        )
    else:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return True


def _check_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if coordinator is None or num_processes is None or process_id is None:
        raise ProcessError(
            "--coordinator, --num-processes and --process-id belong together; give all "
            "three, or none"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ProcessError(
            f"--coordinator is {coordinator!r}; it must be HOST:PORT, the address of "
            "process 0"
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ProcessError(
            f"--process-id is {process_id} and --num-processes {num_processes}; "
            "processes are numbered from 0 to one less than their number"
        )
