"""The benchmark of training: what it counts, and its errors."""

import json
from typing import Any

import pytest
from support.commands import run_command

from llama_jax.bench import train
from llama_jax.bench.__main__ import main
from llama_jax.bench.machine import MatmulRate
from llama_jax.bench.tables import train_rows
from llama_jax.model.presets import parse_model
from llama_jax.params import count_params, param_shapes
from llama_jax.planning.flops import train_flops

SHAPE = "L2,D32,N4,K2,F48,V96"
FLAGS = ["train", "--model", SHAPE, "--batch", "2", "--seq", "8", "--steps", "3"]


@pytest.fixture(autouse=True)
def no_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = MatmulRate(gflops=10.0, size="8,8,8")
    monkeypatch.setattr(train, "measure_matmul_rate", lambda *_: rate)


def test_a_training_benchmark_reports_a_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*FLAGS, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = parse_model(SHAPE, 8)
    names = ("benchmark", "model", "batch", "seq", "steps", "remat", "mesh")
    assert [report[name] for name in names] == ["train", SHAPE, 2, 8, 3, "none", None]
    assert report["params"] == count_params(param_shapes(config))
    assert report["flops"] == train_flops(config, 2, 8)
    assert 0 < report["best_seconds"] <= report["seconds"]
    assert report["tokens_per_s"] == pytest.approx(16 / report["seconds"])
    rate = report["flops"] / report["seconds"] / 1e9
    assert report["gflops_per_s"] == pytest.approx(rate)
    assert report["ratio"] == pytest.approx(rate / 10)
    assert report["mfu"] is None
    assert report["peer"] is None


def test_steps_alternate_with_those_of_another_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(train, "our_step", lambda *_: (lambda: calls.append("ours"), 5))
    monkeypatch.setattr(
        train, "torch_step", lambda *_: ("Torch", lambda: calls.append("theirs"))
    )
    config = parse_model(SHAPE, 8)
    runtime = train.Runtime()
    options: Any = {"batch": 2, "seq": 8, "steps": 3, "against": "torch"}
    report = train.measure_train(config, runtime, **options)
    assert calls == ["ours"] * 2 + ["theirs"] * 2 + ["ours", "theirs"] * 3
    assert report.peer is not None
    assert report.peer.speedup == pytest.approx(report.peer.seconds / report.seconds)
    assert "Torch" in train_rows(report)
    assert train_rows(report)["speedup"] == f"{report.peer.speedup:.2f}"


def test_a_missing_library_is_named_with_its_installation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(train.importlib, "import_module", refuse)
    status, _, err = run_command(main, capsys, *FLAGS, "--against", "torch")
    assert status == 2
    assert "torch is not installed; pip install torch transformers" in err


@pytest.mark.parametrize("name", ["batch", "seq", "steps"])
def test_numbers_must_be_positive(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run_command(main, capsys, *FLAGS, f"--{name}", "0")
    assert status == 2
    assert f"--{name}: '0' is not a positive integer" in err
