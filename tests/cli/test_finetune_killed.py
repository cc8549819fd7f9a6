"""A run that is killed, or asked to stop, goes on as if nothing had happened."""

import signal
import time
from typing import Any

import pytest
from support.runs import (
    SECONDS,
    STEPS,
    Runs,
    check_visits,
    kill_and_resume,
    losses,
    make_runs,
)
from support.tolerances import EQUAL_FORWARD


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs: Runs) -> list[Any]:
    """The records of a run that nothing happened to."""
    return runs.finish("whole")


def test_a_run_that_is_killed_twice_has_the_same_losses(
    runs: Runs, whole: list[Any]
) -> None:
    assert [record["step"] for record in whole] == list(range(1, STEPS + 1))
    kill_and_resume(runs, "killed", 2, steps=STEPS, pause=0.05)
    found = runs.finish("killed")
    assert losses(found) == losses(whole)
    check_visits(runs, "killed")
    check_visits(runs, "whole")
    assert (runs.folder / "killed" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_status_0(runs: Runs, whole: list[Any]) -> None:
    process = runs.start("asked", pause=0.1, delay=-1)
    try:
        until = time.monotonic() + SECONDS
        while len(runs.metrics("asked")) < 7 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    done = len(runs.metrics("asked"))
    assert 7 <= done < STEPS
    assert f"stopped after step {done}; resume with: python -m" in err
    assert not (runs.folder / "asked" / "model").exists()
    found = runs.finish("asked")
    assert losses(found) == losses(whole)
    check_visits(runs, "asked")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_is_killed_five_times_has_the_same_losses(runs: Runs) -> None:
    epochs = 40
    wanted = runs.finish("long", epochs=epochs)
    assert len(wanted) == 300
    kill_and_resume(runs, "mown", 5, steps=300, pause=0.02, epochs=epochs)
    assert losses(runs.finish("mown", epochs=epochs)) == losses(wanted)
    check_visits(runs, "mown", epochs)


@pytest.mark.slow
def test_a_run_is_resumed_on_another_mesh(runs: Runs, whole: list[Any]) -> None:
    runs.folder.joinpath("moved.log").unlink(missing_ok=True)
    mesh = ("--mesh", "data=2,fsdp=2")
    kill_and_resume(runs, "moved", 1, steps=STEPS, pause=0.1)
    before = len(runs.metrics("moved"))
    found = runs.finish("moved", *mesh, devices=4)
    assert before < len(found) == len(whole)
    for one, other in zip(found, whole, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=EQUAL_FORWARD)
    check_visits(runs, "moved")
