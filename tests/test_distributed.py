"""Several processes on one machine: one process's results, and none left hanging."""

import contextlib
import http.server
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from support import waiters, workers
from support.models import TALKING, talking_model
from support.ports import free_port
from support.tolerances import EQUAL_FORWARD

from llama_jax import distributed
from llama_jax.checkpoint.model_folder import load_params, save_params
from llama_jax.cli import command as cli
from llama_jax.errors import MeshError, ProcessError
from llama_jax.params import flatten
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, parse_mesh

SUPPORT = pathlib.Path(__file__).resolve().parent / "support"
SECONDS = 240  # the longest that a process may run
SLOW = pytest.mark.slow  # each starts several processes

# Compiling takes longer than all else here.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

Results = list[tuple[int, str, str]]
"""Status, standard output and standard error of each process."""


@contextlib.contextmanager
def started(
    commands: list[list[str]], devices: int = 1, **environ: str
) -> Iterator[list[Any]]:
    """Start processes, and kill them in the end."""
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        **environ,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(processes: list[Any]) -> Results:
    """Wait until processes end."""
    results = []
    for process in processes:
        out, err = process.communicate(timeout=SECONDS)
        results.append((process.returncode, out, err))
    return results


def commands(count: int, script: str, *arguments: str, task: str = "") -> Any:
    """Return the command of each process."""
    port = free_port()
    start = [str(SUPPORT / script), *([task] if task else [])]
    return [[*start, f"{port}", f"{count}", f"{i}", *arguments] for i in range(count)]


def run_all(folder: pathlib.Path, count: int, devices: int, mesh: str) -> list[Any]:
    """Return the results of several processes, and last those of one process."""
    alone = folder / "alone"
    alone.mkdir()
    several = commands(count, "workers.py", str(folder), mesh)
    with (
        started(commands(1, "workers.py", str(alone), mesh), count * devices) as one,
        started(several, devices) as others,
    ):
        for status, _, err in wait_for([*others, *one]):
            assert status == 0, err[-2000:]
    files = [*(folder / f"{index}.json" for index in range(count)), alone / "0.json"]
    return [json.loads(file.read_text()) for file in files]


def check(results: list[Any], rows: list[list[int]], part: float) -> None:
    *several, alone = results
    for of_process, own_rows in zip(several, rows, strict=True):
        np.testing.assert_allclose(
            of_process["metrics"], alone["metrics"], rtol=EQUAL_FORWARD
        )
        assert of_process["tokens"] == alone["tokens"]
        assert of_process["rows"] == own_rows
        assert of_process["params"]
        assert set(of_process["params"] + of_process["opt_state"]) == {part}
        assert of_process["read"] == part
        assert of_process["broadcast"] == 1 << 40
    losses = [loss for loss, _ in alone["metrics"]]
    assert len(set(losses)) == len(losses) == workers.STEPS
    assert len({tuple(tokens) for tokens in alone["tokens"]}) == len(workers.PROMPTS)


def test_two_processes_have_the_losses_tokens_and_weights_of_one(
    tmp_path: pathlib.Path,
) -> None:
    results = run_all(tmp_path, 2, 2, "fsdp=2,tensor=2")
    # The first axis is the processes', so each has half of the rows and of the weights.
    check(results, [[0, 4], [4, 8]], 0.5)
    saved, wanted = (
        flatten(load_params(folder / "saved", workers.CONFIG, runtime=Runtime()))
        for folder in (tmp_path, tmp_path / "alone")
    )
    for path, leaf in wanted.items():
        np.testing.assert_allclose(
            saved[path], leaf, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD
        )


@SLOW
@pytest.mark.parametrize(
    ("mesh", "rows", "part"),
    [
        ("data=4", [[0, 2], [2, 4], [4, 6], [6, 8]], 1.0),
        ("data=2,tensor=2", [[0, 4], [0, 4], [4, 8], [4, 8]], 0.5),
        ("fsdp=2,sequence=2", [[0, 4], [0, 4], [4, 8], [4, 8]], 0.5),
    ],
)
def test_four_processes_have_the_losses_and_tokens_of_one(
    mesh: str, rows: list[list[int]], part: float, tmp_path: pathlib.Path
) -> None:
    check(run_all(tmp_path, 4, 1, mesh), rows, part)


def wait_until_ready(processes: list[Any], folder: pathlib.Path) -> None:
    end = time.monotonic() + SECONDS
    while len(list(folder.glob("*.ready"))) < len(processes):
        assert time.monotonic() < end
        time.sleep(0.05)


@SLOW
@pytest.mark.parametrize(
    ("victim", "sent"),
    [
        (1, signal.SIGKILL),
        (0, signal.SIGKILL),
        (1, signal.SIGSTOP),  # in the middle of a collective operation
    ],
)
def test_all_other_processes_end_if_one_dies(
    victim: int, sent: signal.Signals, tmp_path: pathlib.Path
) -> None:
    with started(commands(3, "waiters.py", str(tmp_path), task="loop")) as processes:
        wait_until_ready(processes, tmp_path)
        time.sleep(0.2)
        os.kill(processes[victim].pid, sent)
        killed = time.monotonic()
        others = [process for i, process in enumerate(processes) if i != victim]
        for status, _, err in wait_for(others):
            assert status in (1, -signal.SIGABRT)
            assert "another task died" in err or "a collective operation" in err
        assert time.monotonic() - killed < waiters.HEARTBEAT_TIMEOUT + 10


@SLOW
def test_an_error_in_one_process_is_printed_and_ends_the_others(
    tmp_path: pathlib.Path,
) -> None:
    with started(commands(2, "waiters.py", str(tmp_path), task="raise")) as processes:
        wait_until_ready(processes, tmp_path)
        raised = time.monotonic()
        (status, _, _), (status_1, _, err_1) = wait_for(processes)
        assert time.monotonic() - raised < waiters.HEARTBEAT_TIMEOUT + 10
    assert status in (1, -signal.SIGABRT)
    assert status_1 == 1
    assert "Traceback" in err_1
    assert "KeyError: 'no such thing'" in err_1


def sample(*flags: str) -> list[str]:
    return ["-m", "llama_jax.sample", *flags]


@SLOW
def test_only_the_main_process_prints(tmp_path: pathlib.Path) -> None:
    model = talking_model(TALKING.replace(num_layers=1))
    folder = tmp_path / "model"
    save_params(folder, model.params, model.model.config, tokenizer=model.tokenizer)
    flags = ["--checkpoint", str(folder), "--prompt", "once", "--max-new-tokens", "5"]
    flags += ["--json", "--temperature", "0"]
    port = free_port()
    several = [
        sample(
            *flags, "--mesh", "data=1,tensor=2", "--coordinator", f"localhost:{port}",
            "--num-processes", "2", "--process-id", f"{i}",
        )
        for i in range(2)
    ]  # fmt: skip
    with started([*several, sample(*flags, "--seed", "1")]) as processes:
        results = wait_for(processes)
    for status, _, err in results:
        assert status == 0, err
    assert results[1][1] == ""
    assert (
        "2 processes; if another one dies, this one ends within 110 s"
        in (results[0][2])
    )
    assert "tokens/s" in results[0][2]
    assert "tokens/s" not in results[1][2]
    line, wanted = json.loads(results[0][1]), json.loads(results[2][1])
    assert line["token_ids"] == wanted["token_ids"]
    assert line["completion"] == wanted["completion"]


SLURM = {
    "SLURM_JOB_ID": "5000",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[007-010],other",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@SLOW
def test_processes_that_srun_starts_connect_without_flags(
    tmp_path: pathlib.Path,
) -> None:
    model = talking_model(TALKING.replace(num_layers=1))
    folder = tmp_path / "model"
    save_params(folder, model.params, model.model.config, tokenizer=model.tokenizer)
    flags = ["--checkpoint", str(folder), "--max-new-tokens", "3", "--json"]
    command = sample(*flags, "--mesh", "data=1,tensor=2")
    step = SLURM | {
        # JAX derives the port from the job.
        "SLURM_JOB_ID": f"{os.getpid()}",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    with (
        started([command], **step | {"SLURM_PROCID": "0"}) as first,
        started([command], **step | {"SLURM_PROCID": "1"}) as second,
    ):
        results = wait_for([*first, *second])
    for status, _, err in results:
        assert status == 0, err
    assert "2 processes" in results[0][2]
    assert "completion" in json.loads(results[0][1])
    assert results[1][1] == ""


NO_CHIP = {"TPU_SKIP_MDS_QUERY": "1"}  # JAX sets it on machines without a TPU
POD = {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        pytest.param(NO_CHIP, None, id="plain machine"),
        pytest.param(NO_CHIP | SLURM, "slurm", id="srun with 8 tasks"),
        pytest.param(
            NO_CHIP | SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},
            None,
            id="srun with 1 task",
        ),
        pytest.param(
            NO_CHIP | {"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8"},
            None,
            id="sbatch without srun",
        ),
        pytest.param(
            NO_CHIP | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            "ompi",
            id="mpirun with 2 ranks",
        ),
        pytest.param(
            NO_CHIP | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            None,
            id="mpirun with 1 rank",
        ),
        pytest.param(POD, "gketpu", id="host of a TPU pod"),
        pytest.param(
            {"TPU_PROCESS_ADDRESSES": "10.0.0.1:8476,10.0.0.2:8476"},
            "gketpu",
            id="host of a TPU pod with ports",
        ),
        pytest.param(
            {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
            "gketpu",
            id="two slices of one host",
        ),
        pytest.param(
            {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
            None,
            id="GKE with one host",
        ),
        pytest.param(
            {
                "COLAB_RELEASE_TAG": "release",
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "TPU_WORKER_ID": "0",
            },
            None,
            id="Colab with a TPU",
        ),
        pytest.param(NO_CHIP | {"COLAB_GPU": "1"}, None, id="Colab with a GPU"),
        pytest.param({"TPU_WORKER_HOSTNAMES": "local"}, None, id="Kaggle"),
        pytest.param(
            {"TPU_PROCESS_ADDRESSES": "local", "CLOUD_TPU_TASK_ID": "0"},
            None,
            id="Kaggle, older",
        ),
        pytest.param({}, "gcetpu", id="TPU virtual machine"),
        pytest.param(
            NO_CHIP | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None, id="Kubernetes"
        ),
        pytest.param(
            NO_CHIP | SLURM | {"SLURM_STEP_NUM_TASKS": "many"}, None, id="nonsense"
        ),
    ],
)
def test_the_environment_names_what_started_several_processes(
    environ: dict[str, str], launcher: str | None
) -> None:
    assert distributed.find_launcher(environ) == launcher


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of a TPU virtual machine."""

    endpoints = ""

    def do_GET(self) -> None:
        """Answer with the hosts."""
        assert self.path.endswith("/worker-network-endpoints")
        assert self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.endpoints.encode())

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.mark.parametrize(
    ("endpoints", "count"),
    [
        ("unused:0:10.0.0.5,unused:1:10.0.0.6", 2),
        ("10.0.0.5,10.0.0.6,10.0.0.7", 3),
        ("unused:0:10.0.0.5", 1),
    ],
)
def test_hosts_of_a_tpu_virtual_machine_are_counted(
    endpoints: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Metadata, "endpoints", endpoints)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        assert distributed.count_tpu_hosts({"GCE_METADATA_IP": address}) == count
        server.shutdown()


def test_a_metadata_server_that_does_not_answer_delays_nothing() -> None:
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert distributed.count_tpu_hosts({"GCE_METADATA_IP": address}) == 1
    assert distributed.count_tpu_hosts({"GCE_METADATA_IP": address}) == 1
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coordinator a:1", "give all three"),
        ("--num-processes 2 --process-id 0", "give all three"),
        ("--coordinator a --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator a:99999 --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator a:1 --num-processes 2 --process-id 2", "numbered from 0"),
        ("--coordinator a:1 --num-processes 0 --process-id 0", "numbered from 0"),
        ("--coordinator a:1 --num-processes 2 --process-id 0", "need --mesh"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(
    flags: str, message: str, capsys: Any
) -> None:
    from llama_jax import sample

    with pytest.raises(SystemExit) as exit:
        cli.run(sample.main, flags.split())
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_launcher_that_jax_does_not_find_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ProcessError, match=r"\(coordinator_address .*\); give --coord"):
        distributed.initialize(launcher="ompi")


def test_one_process_waits_for_nobody() -> None:
    assert distributed.is_main()
    assert distributed.broadcast_from_main(7) == 7
    distributed.barrier("nobody else")


def test_rows_of_one_process_are_the_batch() -> None:
    rows = workers.rows_of_step(0, slice(None))
    for mesh in (None, make_mesh(parse_mesh("data=2,sequence=4"))):
        batch: Any = distributed.from_host_rows(rows, mesh)
        assert distributed.share_of_rows(mesh) == (0, 1)
        for leaf, wanted in zip(distributed.to_host(batch), rows, strict=True):
            np.testing.assert_array_equal(leaf, wanted)
    assert len(batch.tokens.sharding.device_set) == 8


def test_rows_that_processes_cannot_share_are_refused() -> None:
    devices = np.asarray(jax.devices()[:3]).reshape(3, 1, 1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "sequence", "tensor"))
    processes = dict(zip(devices.flat, (0, 1, 0), strict=True))
    assert distributed.share_of_rows(mesh) == (0, 1)
    with pytest.raises(MeshError, match="cannot share a batch's rows"):
        distributed.row_shares(processes, mesh)
