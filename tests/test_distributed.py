"""Several processes on one machine: the results of one, and nobody left hanging."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from support import workers
from support.models import TALKING, talking_model
from support.tolerances import EQUAL_FORWARD

from llama_jax import distributed
from llama_jax.checkpoint.model_folder import load_params, save_params
from llama_jax.errors import MeshError
from llama_jax.params import flatten
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.sockets import free_port

HERE = pathlib.Path(__file__).resolve().parent / "support"
SECONDS = 120  # the most that a process may take
SLOW = pytest.mark.slow  # each starts several processes

# To compile takes longer than all else here.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

Results = list[tuple[int, str, str]]
"""Status, standard output and standard error of each process."""


@contextlib.contextmanager
def started(commands: list[list[str]], devices: int = 1) -> Iterator[list[Any]]:
    """Processes, of which none is left behind."""
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
    }
    running = [
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
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def ended(running: list[Any], but: int | None = None) -> Results:
    """What came of them, of all but one."""
    found = []
    for index, process in enumerate(running):
        if index != but:
            out, err = process.communicate(timeout=SECONDS)
            found.append((process.returncode, out, err))
    return found


def commands(count: int, script: str, *arguments: str, task: str = "") -> Any:
    """The command of each process."""
    port = free_port()
    start = [str(HERE / script), *([task] if task else [])]
    return [[*start, f"{port}", f"{count}", f"{i}", *arguments] for i in range(count)]


def run_all(folder: pathlib.Path, count: int, devices: int, mesh: str) -> list[Any]:
    """What several processes found, each, and last what one with all devices did."""
    alone = folder / "alone"
    alone.mkdir()
    several = commands(count, "workers.py", str(folder), mesh)
    with (
        started(commands(1, "workers.py", str(alone), mesh), count * devices) as one,
        started(several, devices) as others,
    ):
        for status, _, err in ended([*others, *one]):
            assert status == 0, err[-2000:]
    files = [*(folder / f"{index}.json" for index in range(count)), alone / "0.json"]
    return [json.loads(file.read_text()) for file in files]


def check(found: list[Any], rows: list[list[int]], part: float) -> None:
    *several, alone = found
    for one, of_batch in zip(several, rows, strict=True):
        np.testing.assert_allclose(one["metrics"], alone["metrics"], rtol=EQUAL_FORWARD)
        assert one["tokens"] == alone["tokens"]
        assert one["rows"] == of_batch
        assert one["params"]
        assert set(one["params"] + one["opt_state"]) == {part}
        assert one["read"] == part
        assert one["agreed"] == 1 << 40
    losses = [loss for loss, _ in alone["metrics"]]
    assert len(set(losses)) == len(losses) == workers.STEPS
    assert len({tuple(tokens) for tokens in alone["tokens"]}) == len(workers.PROMPTS)


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> Any:
    """What two processes of two devices found, and the folder where they left it."""
    folder = tmp_path_factory.mktemp("two")
    return run_all(folder, 2, 2, "fsdp=2,tensor=2"), folder


def test_two_processes_train_and_write_as_one(two: Any) -> None:
    found, _ = two
    # The first axis is the processes', so each has half of the rows and of the weights.
    check(found, [[0, 4], [4, 8]], 0.5)


def test_weights_of_several_processes_are_saved_whole(two: Any) -> None:
    _, folder = two
    saved = load_params(folder / "saved", workers.CONFIG, runtime=Runtime())
    wanted = load_params(folder / "alone" / "saved", workers.CONFIG, runtime=Runtime())
    for path, leaf in flatten(wanted).items():
        np.testing.assert_allclose(
            flatten(saved)[path], leaf, rtol=EQUAL_FORWARD, atol=EQUAL_FORWARD
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
def test_four_processes_train_and_write_as_one(
    mesh: str, rows: list[list[int]], part: float, tmp_path: pathlib.Path
) -> None:
    check(run_all(tmp_path, 4, 1, mesh), rows, part)


def run_until_ready(running: list[Any], folder: pathlib.Path) -> None:
    end = time.monotonic() + SECONDS
    while len(list(folder.glob("*.ready"))) < len(running):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("victim", "signal_of", "said"),
    [
        (1, signal.SIGKILL, "ended without a word"),
        pytest.param(0, signal.SIGKILL, "ended without a word", marks=SLOW),
        # In the midst of a collective.
        (1, signal.SIGSTOP, "not been heard of for 3 s"),
        pytest.param(0, signal.SIGTERM, "ended without a word", marks=SLOW),
    ],
)
def test_all_others_say_which_process_is_gone_and_end(
    victim: int, signal_of: signal.Signals, said: str, tmp_path: pathlib.Path
) -> None:
    with started(commands(3, "waiters.py", str(tmp_path), task="loop")) as running:
        run_until_ready(running, tmp_path)
        time.sleep(0.2)
        os.kill(running[victim].pid, signal_of)
        began = time.monotonic()
        for status, _, err in ended(running, but=victim):
            assert status == 1
            assert f"error: process {victim} (" in err
            assert said in err
            assert "Check failure stack trace" not in err
        assert time.monotonic() - began < 20


@SLOW
def test_a_barrier_names_who_did_not_come(tmp_path: pathlib.Path) -> None:
    with started(commands(3, "waiters.py", str(tmp_path), task="barrier")) as running:
        for status, _, err in ended(running):
            assert status == 1
            assert "process 1 (" in err
            assert "did not come to 'middle' within 1 s" in err


def test_what_nobody_catches_ends_the_others_too(tmp_path: pathlib.Path) -> None:
    with started(commands(2, "waiters.py", str(tmp_path), task="raise")) as running:
        (status, _, err), (status_1, _, err_1) = ended(running)
    assert status == status_1 == 1
    assert "process 1 (" in err
    assert "has failed: 'no such thing'" in err
    assert "KeyError" in err_1


def sample(*flags: str) -> list[str]:
    return ["-m", "llama_jax.sample", *flags]


def test_only_process_0_prints(tmp_path: pathlib.Path) -> None:
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
    with started([*several, sample(*flags, "--seed", "1")]) as running:
        found = ended(running)
    for status, _, err in found:
        assert status == 0, err
    assert found[1][1] == ""
    assert "tokens/s" in found[0][2]
    assert "tokens/s" not in found[1][2]
    line, wanted = json.loads(found[0][1]), json.loads(found[2][1])
    assert line["token_ids"] == wanted["token_ids"]
    assert line["completion"] == wanted["completion"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--coordinator a:1", "give all three"),
        ("--num-processes 2 --process-id 0", "give all three"),
        ("--coordinator a --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator a:99999 --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator a:1 --num-processes 2 --process-id 2", "numbered from 0"),
        ("--coordinator a:1 --num-processes 0 --process-id 0", "numbered from 0"),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(
    flags: str, said: str, capsys: Any
) -> None:
    from llama_jax import sample
    from llama_jax.cli import command as cli

    with pytest.raises(SystemExit) as exit:
        cli.run(sample.main, flags.split())
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_one_process_meets_nobody() -> None:
    assert not distributed.initialize()
    assert not distributed.initialize(environ={})
    assert not distributed.initialize("localhost:1", 1, 0)
    assert distributed.is_main()
    assert distributed.place() == (0, 1)
    assert distributed.agreed(7) == 7
    distributed.barrier("nobody else", 0.0)
    distributed.fail(ValueError("of no interest to others"))


def test_rows_of_one_process_are_the_batch() -> None:
    rows = workers.rows_of_step(0, slice(None))
    for mesh in (None, make_mesh(parse_mesh("data=2,sequence=4"))):
        batch = distributed.from_host_rows(rows, mesh)
        assert distributed.share_of_rows(mesh) == (0, 1)
        for one, other in zip(distributed.to_host(batch), rows, strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(batch.tokens.sharding.device_set) == 8


def test_rows_that_processes_cannot_share_are_refused() -> None:
    devices = np.asarray(jax.devices()[:3]).reshape(3, 1, 1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "sequence", "tensor"))
    owners = {devices[0, 0, 0, 0]: 0, devices[1, 0, 0, 0]: 1, devices[2, 0, 0, 0]: 0}
    assert distributed.share_of_rows(mesh) == (0, 1)
    with pytest.raises(MeshError, match="cannot share a batch's rows"):
        distributed.blocks_of_rows(owners, mesh)
