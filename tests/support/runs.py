"""Runs of `finetune` in processes of their own, some of which end badly."""

import collections
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from support.models import TALKING, random_params, tiny_tokenizer
from support.ports import free_port

from llama_jax.checkpoint.model_folder import save_params
from llama_jax.train.metrics import read_metrics

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 200
RECORDS, BATCH, EPOCHS = 30, 4, 4
STEPS = math.ceil(RECORDS * EPOCHS / BATCH)
QUICK = "--xla_backend_optimization_level=0"


class Runs(NamedTuple):
    """A folder with a model, records and runs."""

    folder: pathlib.Path

    def log(self, name: str, index: int = 0) -> pathlib.Path:
        """The log of the batches that a process read."""
        return self.folder / (f"{name}-{index}.log" if index else f"{name}.log")

    def command(
        self,
        name: str,
        *flags: str,
        index: int = 0,
        epochs: int = EPOCHS,
        pause: float,
        delay: float,
    ) -> list[str]:
        """The command of a run; `--resume` starts a new run if there is none."""
        return [
            sys.executable, str(HERE / "killed.py"), str(self.log(name, index)),
            str(pause), str(delay), "--checkpoint", str(self.folder / "base"),
            "--data", str(self.folder / "records.jsonl"), "--seed", "7",
            "--output", str(self.folder / name), "--resume", "--batch-size", f"{BATCH}",
            "--epochs", f"{epochs}", "--packing", "pad", "--save-every", "5",
            "--learning-rate", "1e-2", *flags,
        ]  # fmt: skip

    def start(self, *args: Any, devices: int = 1, **kwargs: Any) -> Any:
        """The process of a run."""
        count = f"--xla_force_host_platform_device_count={devices}"
        return subprocess.Popen(
            self.command(*args, **kwargs),
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{count} {QUICK}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_all(
        self, name: str, *flags: str, count: int, delays: Sequence[float], **kwargs: Any
    ) -> list[Any]:
        """The processes of a run, each of which may be killed."""
        together = ("--coordinator", f"localhost:{free_port()}")
        together += ("--num-processes", f"{count}")
        return [
            self.start(
                name, *flags, *together, "--process-id", f"{i}",
                index=i, delay=delays[i], **kwargs,
            )
            for i in range(count)
        ]  # fmt: skip

    def run(self, *args: Any, **kwargs: Any) -> tuple[int, str]:
        """Status and standard error of a run."""
        [(status, _, err)] = ended([self.start(*args, **kwargs)])
        return status, err

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
        visits: collections.Counter[str] = collections.Counter()
        for file in (self.log(name), *self.folder.glob(f"{name}-*.log")):
            lines = map(json.loads, file.read_text().splitlines())
            # A batch that was taken again after a kill is the same one.
            batches = {one["rows"]: one["own"] for one in lines}
            visits.update(str(row) for own in batches.values() for row in own if row)
        return visits


def ended(running: Sequence[Any]) -> list[tuple[int, str, str]]:
    """Status, output and errors of processes; all are killed in the end."""
    try:
        said = [process.communicate(timeout=SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [
        (process.returncode, out, err)
        for process, (out, err) in zip(running, said, strict=True)
    ]


def make_runs(folder: pathlib.Path, *, broken: bool = False) -> Runs:
    """A random model, whose loss may be no number, and records that differ."""
    params = random_params(TALKING)
    if broken:  # All weights are numbers, but the logits overflow.
        norm = params["transformer"]["final_norm"]
        norm["scale"] = jnp.full_like(norm["scale"], 3e38)
    save_params(folder / "base", params, TALKING, tokenizer=tiny_tokenizer())
    with (folder / "records.jsonl").open("w") as file:
        for number in range(RECORDS):
            text = f"{number} cats" + " all day" * (number % 4)
            file.write(json.dumps({"text": text}) + "\n")
    return Runs(folder)


def losses(records: list[Any]) -> list[tuple[int, float, float, float]]:
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(record[name] for name in names) for record in records]  # type: ignore[misc]


def check_visits(runs: Runs, name: str, epochs: int = EPOCHS) -> None:
    visits = runs.visits(name)
    assert len(visits) == RECORDS
    assert set(visits.values()) == {epochs}


def kill_and_resume(
    runs: Runs, name: str, kills: int, *, steps: int, pause: float, **kwargs: Any
) -> None:
    """Kill a run at random moments, the kills being about equally far apart."""
    rng = random.Random(name)
    for _ in range(kills):
        delay = rng.uniform(0.2, 1.8) * pause * steps / (kills + 1)
        status, err = runs.run(name, pause=pause, delay=delay, **kwargs)
        assert status == -signal.SIGKILL, err[-3000:]
