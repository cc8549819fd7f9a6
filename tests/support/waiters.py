"""Processes that wait for each other until something happens to one of them.

python tests/support/waiters.py TASK PORT COUNT INDEX FOLDER
"""

import pathlib
import sys
import time

import jax.numpy as jnp
from jax.experimental import multihost_utils

from llama_jax import distributed


def main(task: str, port: str, count: str, index: str, folder: str) -> None:
    """Meet, say so in the folder, and do the task."""
    distributed.initialize(
        f"localhost:{port}", int(count), int(index), timeout=60, silence=3
    )
    multihost_utils.process_allgather(jnp.ones(3))
    distributed.barrier("begin")
    (pathlib.Path(folder) / f"{index}.ready").touch()
    if task == "barrier":
        if int(index) == 1:
            time.sleep(60)
        distributed.barrier("middle", 1.0)
    if task == "raise" and int(index) == 1:
        raise KeyError("no such thing")
    while True:
        multihost_utils.process_allgather(jnp.ones(3))


if __name__ == "__main__":
    main(*sys.argv[1:])
