"""Runs in several processes have the losses of one; any number of them can resume."""

import pathlib
import signal
import time
from typing import Any

import numpy as np
import pytest
from support.runs import SECONDS, Runs, check_visits, ended, make_runs
from support.tolerances import EQUAL_FORWARD

from llama_jax.conversion.peft import read_peft
from llama_jax.loading import load
from llama_jax.params import flatten
from llama_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow  # each test starts several processes

EPOCHS, STEPS = 2, 15
NEVER = (-1, -1)
ON_TWO = ("--mesh", "fsdp=-1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"))


def all_flags(runs: Runs) -> tuple[str, ...]:
    """Flags of a run that also evaluates and samples."""
    data = str(runs.folder / "records.jsonl")
    return (
        "--eval-data", data, "--eval-every", "6", "--sample-prompt", "12 cats",
        "--sample-every", "7", "--sample-tokens", "4",
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(runs: Runs) -> list[Any]:
    """Records of a run in one process."""
    return runs.finish("alone", *all_flags(runs), epochs=EPOCHS)


def run_two(
    runs: Runs, name: str, *flags: str, pause: float = 0.0, delays: Any = NEVER
) -> list[tuple[int, str, str]]:
    """Run or resume in two processes to the end; return statuses and outputs."""
    running = runs.start_all(
        name, *flags, count=2, delays=delays, pause=pause, epochs=EPOCHS
    )
    return ended(running)


def check(records: list[Any], wanted: list[Any]) -> None:
    """Check that each step has one record, with the numbers of one process."""
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record, other in zip(records, wanted, strict=True):
        for name in ("loss", "grad_norm", "eval_loss", "eval_loss_before"):
            assert (name in record) == (name in other)
            if name in record:
                assert record[name] == pytest.approx(other[name], rel=EQUAL_FORWARD)
        for name in ("tokens", "targets", "records", "epoch", "learning_rate"):
            assert record[name] == other[name]


def check_leaves(params: Any, wanted: Any) -> None:
    wanted = flatten(wanted)
    for path, leaf in flatten(params).items():
        size = np.max(np.abs(wanted[path]))
        # AdamW's update for a gradient near zero depends on its sign alone.
        np.testing.assert_allclose(leaf, wanted[path], atol=1e-3 * size, err_msg=path)


def test_two_processes_train_as_one(runs: Runs, alone: list[Any]) -> None:
    (status, out, err), (status_1, out_1, err_1) = run_two(
        runs, "two", *ON_TWO, *all_flags(runs)
    )
    assert (status, status_1) == (0, 0), err[-2000:] + err_1[-2000:]
    assert (out, out_1) == ("", "")
    assert "held-out loss" in err
    assert "held-out loss" not in err_1
    check(runs.metrics("two"), alone)
    check_visits(runs, "two", EPOCHS)
    folder, other = runs.folder / "two", runs.folder / "alone"
    assert {file.name for file in folder.iterdir()} == {
        file.name for file in other.iterdir()
    }
    name = "samples.jsonl"
    assert read_metrics(folder / name) == read_metrics(other / name)
    check_leaves(load(folder / "model").params, load(other / "model").params)


def wait_for_steps(runs: Runs, name: str, steps: int) -> None:
    end = time.monotonic() + SECONDS
    while len(runs.metrics(name)) < steps and time.monotonic() < end:
        time.sleep(0.02)


def test_sigterm_to_one_of_two_saves_in_both_and_one_process_resumes(
    runs: Runs, alone: list[Any]
) -> None:
    flags = (*ON_TWO, *all_flags(runs))
    running = runs.start_all(
        "asked", *flags, count=2, delays=NEVER, pause=0.2, epochs=EPOCHS
    )
    wait_for_steps(runs, "asked", 4)
    running[1].send_signal(signal.SIGTERM)
    (status, _, err), (status_1, _, err_1) = ended(running)
    assert (status, status_1) == (0, 0), err[-2000:] + err_1[-2000:]
    done = len(runs.metrics("asked"))
    assert 4 <= done < STEPS
    assert f"stopped after step {done}; resume with: python -m" in err
    assert not (runs.folder / "asked" / "model").exists()
    check(runs.finish("asked", epochs=EPOCHS), alone)
    check_visits(runs, "asked", EPOCHS)


def test_two_processes_resume_a_run_of_one(runs: Runs, alone: list[Any]) -> None:
    status, _ = runs.run("grown", *all_flags(runs), epochs=EPOCHS, pause=0.2, delay=1.2)
    assert status == -signal.SIGKILL
    before = len(runs.metrics("grown"))
    [(status, _, err), (status_1, _, err_1)] = run_two(runs, "grown", *ON_TWO)
    assert (status, status_1) == (0, 0), err[-2000:] + err_1[-2000:]
    assert 0 < before < STEPS
    check(runs.metrics("grown"), alone)
    check_visits(runs, "grown", EPOCHS)


def test_if_one_of_two_is_killed_the_other_ends_and_one_process_resumes(
    runs: Runs, alone: list[Any]
) -> None:
    flags = (*ON_TWO, *all_flags(runs))
    [(status, _, err), (status_1, _, _)] = run_two(
        runs, "torn", *flags, pause=0.2, delays=(-1, 1.5)
    )
    assert status_1 == -signal.SIGKILL
    assert status in (1, -signal.SIGABRT)
    folder = runs.folder / "torn"
    assert (
        f"resume with: python -m llama_jax.finetune --resume --output {folder}" in err
    )
    assert 0 < len(runs.metrics("torn")) < STEPS
    check(runs.finish("torn", "--mesh", "fsdp=1", epochs=EPOCHS), alone)


def test_two_processes_save_one_adapter(runs: Runs) -> None:
    flags = ("--method", "lora", "--lora-rank", "2")
    wanted = runs.finish("lora-alone", *flags, epochs=EPOCHS)
    # Replicated adapters are saved without a collective operation.
    (status, _, err), (status_1, _, err_1) = run_two(
        runs, "lora", *flags, "--mesh", "data=2"
    )
    assert (status, status_1) == (0, 0), err[-2000:] + err_1[-2000:]
    check(runs.metrics("lora"), wanted)
    config = load(runs.folder / "base").model.config
    adapters, wanted_adapters = (
        read_peft(runs.folder / name / "adapter", config)[0]
        for name in ("lora", "lora-alone")
    )
    check_leaves(adapters, wanted_adapters)


def test_each_process_saves_its_rows_of_a_skipped_batch(
    tmp_path: pathlib.Path,
) -> None:
    runs = make_runs(tmp_path, broken=True)
    flags = ("--mesh", "data=2", "--max-skipped", "2")
    (status, _, err), (status_1, _, _) = run_two(runs, "skipped", *flags)
    assert (status, status_1) == (2, 2), err
    assert "4 steps had a loss or a gradient that was not finite" in err
    assert (runs.folder / "skipped" / "checkpoints" / "4").is_dir()
    assert "skipped-000001-of-process-*.npz" in err
    for step in (1, 2, 3, 4):
        rows = []
        for index in range(2):
            name = f"skipped-{step:06d}-of-process-{index}.npz"
            with np.load(runs.folder / "skipped" / name) as arrays:
                rows.append(arrays["tokens"])
        assert rows[0].shape == rows[1].shape == (2, rows[0].shape[1])
        assert np.any(rows[0] != rows[1])
