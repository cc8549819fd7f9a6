"""Processes that run collective operations until something happens to one of them.

python tests/support/waiters.py TASK PORT COUNT INDEX FOLDER
"""

import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import multihost_utils

from llama_jax import distributed
from llama_jax.cli import command as cli

HEARTBEAT_TIMEOUT = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Connect, leave a file in the folder, and do the task."""
    assert argv is not None
    task, port, count, index, folder = argv
    distributed.initialize(
        f"localhost:{port}",
        int(count),
        int(index),
        heartbeat_timeout=HEARTBEAT_TIMEOUT,
    )
    distributed.barrier("begin")
    (pathlib.Path(folder) / f"{index}.ready").touch()
    if task == "raise" and int(index) == 1:
        raise KeyError("no such thing")
    while True:
        multihost_utils.process_allgather(jnp.ones(3))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
