"""A run of `finetune` in a process of its own, which may kill itself; logs its data.

python tests/support/killed.py LOG PAUSE DELAY ARGUMENT...

Every batch waits PAUSE seconds. DELAY seconds after the second one the process is
killed by SIGKILL (never, if it is negative). LOG gets a line for each
batch: how many rows there were up to it, and what its own say.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import jax

from llama_jax import distributed, finetune
from llama_jax.cli import command as cli
from llama_jax.data.loader import Loader


def main(log: str, pause: str, delay: str, *argv: str) -> None:
    """Run the command with what is to happen to it."""
    distributed.HEARTBEAT_TIMEOUT = 10
    cache = pathlib.Path(log).with_name("compiled")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    taken = Loader.__next__
    count = 0

    def watched(loader: Loader) -> Any:
        nonlocal count
        batch = taken(loader)
        if not loader._new_stream.keywords["shuffle"]:  # held-out data
            return batch
        rows = [row[row > 0].tolist() for row in batch.tokens]
        with pathlib.Path(log).open("a", encoding="utf-8") as file:
            line = {"rows": loader.statistics.rows, "own": rows}
            file.write(json.dumps(line) + "\n")
        count += 1
        if count == 2 and float(delay) >= 0:
            kill = (os.getpid(), signal.SIGKILL)
            threading.Timer(float(delay), os.kill, kill).start()
        time.sleep(float(pause))
        return batch

    Loader.__next__ = watched  # type: ignore[method-assign]
    cli.run(finetune.main, argv)


if __name__ == "__main__":
    main(*sys.argv[1:])
