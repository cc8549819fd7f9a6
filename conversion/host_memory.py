"""The memory that this process takes from the host, page cache not counted."""

import contextlib
import dataclasses
import pathlib
import sys
import threading
from collections.abc import Iterator

_STATUS = pathlib.Path("/proc/self/status")
_SECONDS = 0.01  # between two looks


@dataclasses.dataclass
class Peak:
    """The most that was seen, in bytes; None where the system does not say."""

    bytes: int | None


def anonymous_bytes() -> int | None:
    """What the process holds in memory of its own.

    Mapped files are left out: the system takes their pages back when it needs them.
    Where the system tells no such number it is the most that was ever resident.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def watching() -> Iterator[Peak]:
    """Look at the memory a hundred times a second; the peak is ready at the end."""
    peak = Peak(anonymous_bytes())
    if peak.bytes is None:
        yield peak
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS):
            peak.bytes = max(peak.bytes or 0, anonymous_bytes() or 0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
