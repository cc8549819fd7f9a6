"""Host memory of this process, without the page cache."""

import contextlib
import dataclasses
import pathlib
import sys
import threading
from collections.abc import Iterator

_STATUS = pathlib.Path("/proc/self/status")
_POLL_SECONDS = 0.01


@dataclasses.dataclass
class PeakMemory:
    """Largest memory seen so far, in bytes; None if the system does not report it."""

    bytes: int | None


def anonymous_bytes() -> int | None:
    """Return the bytes of the process's anonymous memory (`RssAnon` on Linux).

    Mapped files do not count: the system reclaims their pages when it needs them.
    Other systems report only the peak of all resident memory; Windows nothing.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def track_peak_memory() -> Iterator[PeakMemory]:
    """Poll the memory a hundred times a second; the result is final at the end."""
    peak = PeakMemory(anonymous_bytes())
    if peak.bytes is None:
        yield peak
        return
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(_POLL_SECONDS):
            peak.bytes = max(peak.bytes or 0, anonymous_bytes() or 0)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
