"""Ports for processes that tests start."""

import socket


def free_port() -> int:
    """Return a port of this machine that is free at the moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
