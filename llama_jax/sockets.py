"""Messages and bytes between processes, over plain sockets."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

Address = tuple[str, int]

_LONGEST = 1 << 16  # bytes of a message


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Line:
    """Messages to and from one process."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self._reader = connection.makefile("rb")
        self._lock = threading.Lock()

    def tell(self, message: dict[str, Any]) -> None:
        """Send it; that the other one is gone is noticed where it is listened to."""
        with contextlib.suppress(OSError), self._lock:
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def next(self) -> dict[str, Any] | None:
        """The next message; None when there will be none."""
        line = self._reader.readline(_LONGEST)
        if not line.endswith(b"\n"):
            return None
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("not a message")
        return found


def listen_at(host: str, port: int) -> socket.socket:
    """A socket that listens: at all of this machine's addresses where none is given."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True
        )
    return socket.create_server((host, port))


def connect_when_there(address: Address, seconds: float) -> socket.socket:
    """A connection to a server of this machine that may not have been started yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(address, seconds)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def pump(source: socket.socket, sink: socket.socket, close: bool) -> None:
    """Bytes from one socket to another, until one of them is closed."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    if close:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


def start_thread(run: Callable[..., None], *args: Any) -> None:
    """Run something beside all else, for no longer than the program."""
    threading.Thread(target=run, args=args, daemon=True).start()
