"""How processes find each other, and notice that one of them is gone.

JAX has a coordinator of its own, whose client ends a process with a C++ stack trace if
it is not reached in time, or as soon as process 0 is gone, and never says who is
missing. Nothing public turns that off. So the processes meet here first, over plain
sockets, and JAX's messages go through here too:

* Process 0 listens at the address that everybody was given. The others come with their
  number and the name of their host. Whoever waits too long says who did not come.
* The connections stay. A process that is killed closes its own, and is known at once;
  one whose host or network is gone, or that is stopped, is known by its silence.
  Process 0 tells the others. Each then calls `on_loss` from a thread of its own, so
  that it ends also where it waits in a collective operation for the one that is gone.
* JAX's coordinator listens on process 0's own machine only. The others reach it through
  a port of theirs and the one address that is open between machines. That port stays
  open when process 0 is gone, so that JAX does not notice before `on_loss` is called.

Messages are JSON objects, one a line. Anybody who can reach the address can take part,
as with JAX's own coordinator: it belongs into a network that is trusted.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from llama_jax.errors import ProcessError
from llama_jax.sockets import (
    Address,
    Line,
    connect_when_there,
    free_port,
    listen_at,
    pump,
    start_thread,
)

_JAX, _OURS = b"J", b"L"
_JAX_SECONDS = 60.0
_END = "end"


class Meeting:
    """All processes of a run, as one of them sees them.

    Args:
      address: where process 0 listens, as the others see it.
      index: of this process.
      count: of processes.
      timeout: seconds to wait for the others.
      silence: seconds after which a process that says nothing is taken for gone.
      on_loss: told once, from another thread, in a sentence, that the run is over.
      facts: what must be equal everywhere, such as versions.

    Attributes:
      hosts: the name of each process's machine.
      jax_address: what this process gives JAX as the coordinator's.

    Raises:
      ProcessError: somebody did not come, or is not one of us.
    """

    def __init__(
        self,
        address: Address,
        index: int,
        count: int,
        *,
        timeout: float,
        silence: float,
        on_loss: Callable[[str], None],
        facts: str = "",
    ) -> None:
        self.index, self.count = index, count
        self.hosts = ["?"] * count
        self._address, self._silence, self._on_loss = address, silence, on_loss
        self._facts = facts
        self._at: dict[str, set[int]] = {}  # who has come to what
        self._entered: dict[str, int] = {}  # how often this process has
        self._heard: dict[int, float] = {}
        self._lines: dict[int, Line] = {}
        self._lost: str | None = None
        self._change = threading.Condition()
        self._listener: socket.socket
        deadline = time.monotonic() + timeout
        try:
            if index == 0:
                self._receive_all(deadline, timeout)
            else:
                self._go_there(deadline, timeout)
        except BaseException:
            self.close()
            raise
        for peer, line in self._lines.items():
            self._heard[peer] = time.monotonic()
            line.connection.settimeout(None)
            start_thread(self._listen, peer, line)
        start_thread(self._beat)

    def name(self, index: int) -> str:
        """`process 3 (host-b)`."""
        return f"process {index} ({self.hosts[index]})"

    def names(self, indices: Iterable[int]) -> str:
        """The same of several."""
        return ", ".join(self.name(index) for index in sorted(indices))

    def barrier(self, name: str, timeout: float | None) -> None:
        """Return when every process is here; with no timeout, however long it takes.

        Raises:
          ProcessError: some did not come in time.
        """
        with self._change:
            self._entered[name] = self._entered.get(name, 0) + 1
            key = f"{name} {self._entered[name]}"
        self._tell({"at": key, "by": self.index})
        self._arrived(key, self.index)
        with self._change:
            if self._change.wait_for(lambda: self._all_at(key), timeout):
                del self._at[key]
                return
            missing = set(range(self.count)) - self._at[key]
        raise ProcessError(
            f"{self.names(missing)} did not come to {name!r} within {timeout:g} s; see "
            "there what went wrong"
        )

    def end(self) -> None:
        """Return when every process is at its end; from then on none is missed."""
        self.barrier(_END, None)
        with self._change:
            self._lost = "the run has ended"

    def fail(self, why: str) -> bool:
        """Tell the others that this process ends, and why.

        Returns:
          Whether that is news; not if one of the others is gone already.
        """
        with self._change:
            if self._lost is not None:
                return False
            self._lost = why
        self._tell({"lost": f"{self.name(self.index)} has failed: {why}"})
        self._linger()
        return True

    def close(self) -> None:
        """Leave without a word."""
        for line in self._lines.values():
            line.connection.close()
        if hasattr(self, "_listener"):
            self._listener.close()

    def _receive_all(self, deadline: float, timeout: float) -> None:
        """Process 0: wait for the others, then tell them who everybody is."""
        self.hosts[0] = socket.gethostname()
        host, port = self._address
        try:
            self._listener = listen_at("", port)
        except OSError as error:
            raise ProcessError(
                f"process 0 cannot listen at port {port} ({error.strerror}); name a "
                "free one in --coordinator"
            ) from error
        self.jax_address = f"127.0.0.1:{free_port()}"
        while len(self._lines) < self.count - 1:
            self._listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                missing = set(range(1, self.count)) - self._lines.keys()
                those = ", ".join(f"process {index}" for index in sorted(missing))
                why = (
                    f"{those} of {self.count} did not come to {host}:{port} within "
                    f"{timeout:g} s; start all of them, with the same --coordinator"
                )
                for line in self._lines.values():
                    line.tell({"refused": why})
                raise ProcessError(why) from None
            hello = None
            with contextlib.suppress(Exception):  # whatever strangers send
                connection.settimeout(2.0)
                line = Line(connection)
                if connection.recv(1) == _OURS:
                    hello = _Hello.of(line.next())
            if hello is None:
                connection.close()
            else:
                self._admit(line, hello)
        for line in self._lines.values():
            line.tell({"hosts": self.hosts})
        self._listener.settimeout(None)
        start_thread(self._pass_on_to_jax)

    def _admit(self, line: Line, hello: "_Hello") -> None:
        index, count, facts, host = hello
        why = None
        if count != self.count:
            why = f"process {index} was told of {count} processes, 0 of {self.count}"
        elif not 0 < index < self.count:
            why = f"there is a process with number {index}, of {self.count}"
        elif index in self._lines:
            why = f"there are two processes with number {index}"
        elif facts != self._facts:
            why = f"process {index} has {facts}, process 0 {self._facts}"
        if why is not None:
            why = f"{why}; start all of them alike"
            for other in (line, *self._lines.values()):
                other.tell({"refused": why})
            raise ProcessError(why)
        self.hosts[index] = host
        self._lines[index] = line

    def _go_there(self, deadline: float, timeout: float) -> None:
        """Any other process: find process 0, and wait until all are there."""
        host, port = self._address
        why = "it answers nothing"
        hello = _Hello(self.index, self.count, self._facts, socket.gethostname())
        found: dict[str, Any] | None = None
        while found is None:
            try:
                left = max(deadline - time.monotonic(), 0.001)
                connection = socket.create_connection((host, port), timeout=left)
                self._lines[0] = line = Line(connection)
                connection.sendall(_OURS)
                line.tell(hello._asdict())
                # Process 0 waits as long, and has begun later perhaps.
                connection.settimeout(timeout + 5.0)
                found = line.next()
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or why
            if found is None:
                if time.monotonic() > deadline:
                    raise ProcessError(
                        f"process {self.index} cannot reach process 0 at {host}:{port} "
                        f"within {timeout:g} s ({why}); is process 0 running there, "
                        "and the port open?"
                    )
                time.sleep(0.1)
        if "refused" in found:
            raise ProcessError(str(found["refused"]))
        self.hosts = [str(name) for name in found["hosts"]]
        self._listener = listen_at("127.0.0.1", 0)
        self.jax_address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        start_thread(self._pass_on_to_jax)

    def _pass_on_to_jax(self) -> None:
        """Process 0: from the others to JAX's coordinator; elsewhere: to process 0."""
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                continue
            start_thread(self._connect_jax, near)

    def _connect_jax(self, near: socket.socket) -> None:
        near.settimeout(_JAX_SECONDS)
        try:
            if self.index == 0:
                if near.recv(1) != _JAX:
                    raise OSError("not one of us")
                host, port = self.jax_address.split(":")
                far = connect_when_there((host, int(port)), _JAX_SECONDS)
            else:
                far = socket.create_connection(self._address, _JAX_SECONDS)
                far.sendall(_JAX)
        except OSError:
            near.close()
            return
        near.settimeout(None)
        far.settimeout(None)
        # Elsewhere, JAX must not notice that process 0 is gone: see above.
        start_thread(pump, far, near, self.index == 0)
        start_thread(pump, near, far, True)

    def _listen(self, peer: int, line: Line) -> None:
        """What a peer says, until it is gone."""
        with contextlib.suppress(OSError, ValueError):
            while (message := line.next()) is not None:
                self._heard[peer] = time.monotonic()
                if "at" in message:
                    if self.index == 0:
                        self._tell(message, but=peer)
                    self._arrived(message["at"], message["by"])
                if "lost" in message:
                    self._lose(message["lost"])
        self._lose(
            f"{self.name(peer)} has ended without a word: killed, out of memory, or a "
            "crash"
        )

    def _beat(self) -> None:
        """Tell the others that this process is there, and see that they do."""
        interval = min(self._silence / 4, 5.0)
        while True:
            began = time.monotonic()
            time.sleep(interval)
            self._tell({})
            if time.monotonic() - began > self._silence / 2:
                # This process was stopped, and so could not hear the others.
                self._heard = dict.fromkeys(self._heard, time.monotonic())
            for peer, heard in self._heard.items():
                if time.monotonic() - heard > self._silence:
                    self._lose(
                        f"{self.name(peer)} has not been heard of for "
                        f"{self._silence:g} s: stopped, or its machine or network is "
                        "down"
                    )

    def _arrived(self, key: str, index: int) -> None:
        with self._change:
            self._at.setdefault(key, set()).add(index)
            self._change.notify_all()

    def _all_at(self, key: str) -> bool:
        return len(self._at[key]) == self.count

    def _lose(self, why: str) -> None:
        with self._change:
            if self._lost is not None:
                return
            self._lost = why
        if self.index == 0:
            self._tell({"lost": why})
            self._linger()
        self._on_loss(why)

    def _linger(self) -> None:
        """Until the others have heard it, or a second."""
        if self.index == 0:
            time.sleep(1.0)

    def _tell(self, message: dict[str, Any], but: int | None = None) -> None:
        for peer, line in self._lines.items():
            if peer != but:
                line.tell(message)


class _Hello(NamedTuple):
    """What a process says when it comes."""

    number: int
    processes: int
    facts: str
    host: str

    @classmethod
    def of(cls, said: Any) -> "_Hello":
        """From a message, which may be a stranger's."""
        hello = cls(**said)
        if [type(field) for field in hello] != [int, int, str, str]:
            raise ValueError("not one of us")
        return hello
