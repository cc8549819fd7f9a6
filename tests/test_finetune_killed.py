"""A run that is killed, or asked to stop, goes on as if nothing had happened."""

import collections
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import pytest
from models import TALKING, random_params, tiny_tokenizer
from tolerances import EQUAL_FORWARD

from llama_jax.checkpoint import save_params
from llama_jax.train.metrics import read_metrics

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 200
RECORDS, BATCH, EPOCHS = 30, 4, 4
STEPS = math.ceil(RECORDS * EPOCHS / BATCH)


class Place(NamedTuple):
    """Where a model and records are."""

    folder: pathlib.Path

    def command(
        self, name: str, *flags: str, epochs: int = EPOCHS, pause: float, delay: float
    ) -> list[str]:
        """The command of a run; `--resume` begins anew where nothing is there."""
        return [
            sys.executable, str(HERE / "killed.py"), str(self.folder / f"{name}.log"),
            str(pause), str(delay), "--checkpoint", str(self.folder / "base"),
            "--data", str(self.folder / "records.jsonl"), "--seed", "7",
            "--output", str(self.folder / name), "--resume", "--batch-size", f"{BATCH}",
            "--epochs", f"{epochs}", "--packing", "pad", "--save-every", "5",
            "--learning-rate", "1e-2", *flags,
        ]  # fmt: skip

    def start(self, *args: Any, devices: int = 1, **kwargs: Any) -> Any:
        """The process of a run."""
        environ = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        return subprocess.Popen(
            self.command(*args, **kwargs),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args: Any, **kwargs: Any) -> tuple[int, str]:
        """Status and standard error of a run."""
        process = self.start(*args, **kwargs)
        try:
            _, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        return process.returncode, err

    def finish(self, *args: Any, pause: float = 0.0, **kwargs: Any) -> list[Any]:
        """Run to the end, and give the records."""
        status, err = self.run(*args, pause=pause, delay=-1, **kwargs)
        assert status == 0, err[-3000:]
        return self.metrics(args[0])

    def metrics(self, name: str) -> list[Any]:
        """The records of a run."""
        return read_metrics(self.folder / name / "metrics.jsonl")

    def visits(self, name: str) -> collections.Counter[str]:
        """How often each record was in a batch, of those that count."""
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        # A batch that was taken again after a kill is the same one.
        batches = {one["rows"]: one["own"] for one in map(json.loads, lines)}
        rows = [tuple(row) for own in batches.values() for row in own if row]
        return collections.Counter(map(str, rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("runs")
    save_params(
        folder / "base", random_params(TALKING), TALKING, tokenizer=tiny_tokenizer()
    )
    with (folder / "records.jsonl").open("w") as file:
        for number in range(RECORDS):
            text = f"{number} cats" + " all day" * (number % 4)
            file.write(json.dumps({"text": text}) + "\n")
    return Place(folder)


@pytest.fixture(scope="module")
def whole(place: Place) -> list[Any]:
    """The records of a run that nothing happened to."""
    return place.finish("whole")


def losses(records: list[Any]) -> list[tuple[int, float, float, float]]:
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(record[name] for name in names) for record in records]  # type: ignore[misc]


def check_visits(place: Place, name: str, epochs: int = EPOCHS) -> None:
    visits = place.visits(name)
    assert len(visits) == RECORDS
    assert set(visits.values()) == {epochs}


def kill_and_resume(
    place: Place, name: str, kills: int, *, steps: int, pause: float, **kwargs: Any
) -> None:
    """Kill a run at random moments, the kills being about equally far apart."""
    rng = random.Random(name)
    for _ in range(kills):
        delay = rng.uniform(0.2, 1.8) * pause * steps / (kills + 1)
        status, err = place.run(name, pause=pause, delay=delay, **kwargs)
        assert status == -signal.SIGKILL, err[-3000:]


def test_a_run_that_is_killed_twice_has_the_same_losses(
    place: Place, whole: list[Any]
) -> None:
    assert [record["step"] for record in whole] == list(range(1, STEPS + 1))
    kill_and_resume(place, "killed", 2, steps=STEPS, pause=0.05)
    found = place.finish("killed")
    assert losses(found) == losses(whole)
    check_visits(place, "killed")
    check_visits(place, "whole")
    assert (place.folder / "killed" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_sigterm_from_outside_saves_and_ends_well(
    place: Place, whole: list[Any]
) -> None:
    process = place.start("asked", pause=0.1, delay=-1)
    try:
        until = time.monotonic() + SECONDS
        while len(place.metrics("asked")) < 7 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    done = len(place.metrics("asked"))
    assert 7 <= done < STEPS
    assert f"stopped behind step {done}; resume with: python -m" in err
    assert not (place.folder / "asked" / "model").exists()
    found = place.finish("asked")
    assert losses(found) == losses(whole)
    check_visits(place, "asked")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_is_killed_five_times_has_the_same_losses(place: Place) -> None:
    epochs = 40
    wanted = place.finish("long", epochs=epochs)
    assert len(wanted) == 300
    kill_and_resume(place, "mown", 5, steps=300, pause=0.02, epochs=epochs)
    assert losses(place.finish("mown", epochs=epochs)) == losses(wanted)
    check_visits(place, "mown", epochs)


@pytest.mark.slow
def test_a_run_is_resumed_on_another_mesh(place: Place, whole: list[Any]) -> None:
    place.folder.joinpath("moved.log").unlink(missing_ok=True)
    mesh = ("--mesh", "data=2,fsdp=2")
    kill_and_resume(place, "moved", 1, steps=STEPS, pause=0.1)
    before = len(place.metrics("moved"))
    found = place.finish("moved", *mesh, devices=4)
    assert before < len(found) == len(whole)
    for one, other in zip(found, whole, strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=EQUAL_FORWARD)
    check_visits(place, "moved")
