"""Meetings without JAX: who is missed, who is refused, and what a cluster says."""

import contextlib
import functools
import http.server
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from llama_jax.clusters import PORT, Cluster, find_cluster, first_host
from llama_jax.errors import ProcessError
from llama_jax.meeting import Meeting
from llama_jax.sockets import free_port

SECONDS = 20.0


class Met:
    """Meetings of one test, closed behind it, and what each was told of a loss."""

    def __init__(self) -> None:
        self.port = free_port()
        self.meetings: list[Meeting] = []
        self.lost: dict[int, list[str]] = {}
        self.pool = ThreadPoolExecutor(8)

    def come(self, index: int, count: int, **changes: Any) -> Future[Meeting]:
        """One process comes, in a thread of its own."""
        told = self.lost.setdefault(index, [])
        settings: dict[str, Any] = {"timeout": SECONDS, "silence": SECONDS}

        def meet() -> Meeting:
            address = ("localhost", self.port)
            meeting = Meeting(
                address, index, count, on_loss=told.append, **settings | changes
            )
            self.meetings.append(meeting)
            return meeting

        return self.pool.submit(meet)

    def all(self, count: int, **changes: Any) -> list[Meeting]:
        """All come."""
        coming = [self.come(index, count, **changes) for index in range(count)]
        return [one.result(SECONDS) for one in coming]


@pytest.fixture
def met() -> Iterator[Met]:
    """A place to meet."""
    found = Met()
    yield found
    for meeting in found.meetings:
        meeting.close()
    found.pool.shutdown()


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_all_know_all_hosts_and_pass_barriers(met: Met) -> None:
    meetings = met.all(4)
    for meeting in meetings:
        assert meeting.hosts == [socket.gethostname()] * 4
    for _ in range(3):  # the same name again and again
        waits = [met.pool.submit(m.barrier, "step", SECONDS) for m in meetings]
        for wait in waits:
            wait.result(SECONDS)
    ends = [met.pool.submit(meeting.end) for meeting in meetings]
    for end in ends:
        end.result(SECONDS)
    for meeting in meetings:
        meeting.close()
    time.sleep(0.1)
    assert not any(met.lost.values())


def test_a_barrier_names_those_who_are_missing(met: Met) -> None:
    meetings = met.all(4)
    waits = [met.pool.submit(meetings[i].barrier, "save", 0.2) for i in (0, 2)]
    for wait in waits:
        with pytest.raises(ProcessError, match=r"process 1 \(.*\), process 3 \(.*save"):
            wait.result(SECONDS)


def test_who_does_not_come_is_named_to_all(met: Met) -> None:
    waits = [met.come(0, 4, timeout=0.5), met.come(2, 4)]
    for wait in waits:
        with pytest.raises(ProcessError, match=r"process 1, process 3 of 4 .* 0.5 s"):
            wait.result(SECONDS)


def test_a_process_0_that_is_not_there_is_reported_in_time(met: Met) -> None:
    began = time.monotonic()
    wait = met.come(1, 2, timeout=0.3)
    with pytest.raises(
        ProcessError, match=rf"cannot reach process 0 at localhost:{met.port}.*0.3 s"
    ):
        wait.result(SECONDS)
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ((1, 3, {}), "two processes with number 1"),
        ((2, 4, {}), "process 2 was told of 4 processes"),
        ((2, 3, {"facts": "jax 0.1"}), "process 2 has jax 0.1"),
        ((3, 3, {}), "number 3"),
    ],
)
def test_who_was_started_wrongly_is_refused_and_all_are_told(
    second: tuple[int, int, dict[str, Any]], said: str, met: Met
) -> None:
    waits = [met.come(0, 3), met.come(1, 3)]
    time.sleep(0.3)  # the first of them is there
    index, count, changes = second
    waits.append(met.come(index, count, **changes))
    for wait in waits:
        with pytest.raises(ProcessError, match=said):
            wait.result(SECONDS)


def test_a_port_that_is_taken_is_reported(met: Met) -> None:
    with socket.create_server(("", met.port)):
        wait = met.come(0, 2)
        with pytest.raises(ProcessError, match=f"cannot listen at port {met.port}"):
            wait.result(SECONDS)


@pytest.mark.parametrize("gone", [0, 2])
def test_who_leaves_without_a_word_is_named_to_all(gone: int, met: Met) -> None:
    meetings = met.all(3)
    meetings[gone]._lost = "it says nothing any more"
    for line in meetings[gone]._lines.values():
        line.connection.shutdown(socket.SHUT_RDWR)
    for index in {0, 1, 2} - {gone}:
        until(lambda index=index: met.lost[index])
        assert met.lost[index][0].startswith(f"process {gone} (")
        assert len(met.lost[index]) == 1


def test_who_is_silent_is_named(met: Met) -> None:
    coming = [met.come(0, 2, silence=0.4), met.come(1, 2, silence=60.0)]
    for one in coming:
        one.result(SECONDS)
    until(lambda: met.lost[0])
    assert met.lost[0][0].startswith("process 1 (")
    assert "not been heard of for 0.4 s" in met.lost[0][0]


def test_why_a_process_fails_is_told_to_all(met: Met) -> None:
    meetings = met.all(3)
    meetings[1].fail("there is no such file")
    for index in (0, 2):
        until(lambda index=index: met.lost[index])
        assert met.lost[index][0].endswith("has failed: there is no such file")
    assert not met.lost[1]


def test_what_does_not_belong_here_is_ignored(met: Met) -> None:
    wait = met.come(0, 2)
    rng = random.Random(0)
    greetings = [b"", b"L", b"GET / HTTP/1.1\r\n\r\n", b"Lnull\n", b"L{}\n", b"J"]
    greetings += [b"L" + rng.randbytes(100) + b"\n" for _ in range(20)]
    greetings += [
        b'L{"number": 1e999, "processes": 2, "facts": "", "host": ""}\n',
        b"L" + b"[" * 9999,
    ]
    for greeting in greetings:
        until(functools.partial(can_send, met.port, greeting))
    other = met.come(1, 2).result(SECONDS)
    assert wait.result(SECONDS).hosts == other.hosts
    assert can_send(met.port, b"nothing")
    assert not any(met.lost.values())


def can_send(port: int, text: bytes) -> bool:
    try:
        with socket.create_connection(("localhost", port), timeout=SECONDS) as one:
            one.sendall(text)
    except OSError:
        return False
    return True


SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[007-010],other",
    "SLURM_PROCID": "3",
}
POD = {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, None),
        (SLURM, Cluster("node007:62344", 8, 3, "slurm")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # no srun
        (POD, Cluster(f"10.0.0.1:{PORT}", 2, 1, "tpu")),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_PROCESS_ADDRESSES": "local", "CLOUD_TPU_TASK_ID": "0"}, None),  # Kaggle
        (
            POD
            | {
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
                "MEGASCALE_COORDINATOR_ADDRESS": "10.9.9.9:8080",
            },
            Cluster(f"10.9.9.9:{PORT}", 6, 5, "tpu"),
        ),
    ],
)
def test_a_cluster_says_who_is_who(
    environ: dict[str, str], wanted: Cluster | None
) -> None:
    assert find_cluster({"TPU_SKIP_MDS_QUERY": "1"} | environ) == wanted


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node8", "node7"),
        ("node[007-010]", "node007"),
        ("node[1,4-9],x", "node1"),
        ("gpu-a-[03-04].lab,login", "gpu-a-03.lab"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@hypothesis.given(
    st.dictionaries(
        st.sampled_from([*SLURM, *POD, "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"]),
        st.text(max_size=12),
    )
)
def test_an_environment_without_sense_is_refused_or_ignored(
    environ: dict[str, str],
) -> None:
    found = None
    with contextlib.suppress(ProcessError):
        found = find_cluster({"TPU_SKIP_MDS_QUERY": "1"} | environ)
    assert found is None or found.num_processes > 1


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a host of a Cloud TPU asks for its place."""

    endpoints = "unused:0:10.0.0.5,unused:1:10.0.0.6"

    def do_GET(self) -> None:
        """An attribute of the machine."""
        key = self.path.rpartition("/")[2]
        answers = {
            "worker-network-endpoints": self.endpoints,
            "agent-worker-number": "1",
        }
        assert self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answers[key].encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize("form", ["unused:{}:{}", "{1}"])
def test_a_host_of_a_cloud_tpu_is_asked(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = ",".join(form.format(i, f"10.0.0.{5 + i}") for i in range(2))
    monkeypatch.setattr(Metadata, "endpoints", hosts)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        found = find_cluster({"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"})
        server.shutdown()
    assert found == Cluster(f"10.0.0.5:{PORT}", 2, 1, "tpu")


def test_nobody_is_waited_for_where_there_is_no_pod() -> None:
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        assert find_cluster({"GCE_METADATA_IP": place}) is None
    assert time.monotonic() - began < 5.0
