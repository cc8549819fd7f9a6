"""The benchmark of training: what it counts, and what it refuses."""

import json
from typing import Any

import pytest

from llama_jax.bench import __main__ as entry
from llama_jax.bench import train
from llama_jax.bench.machine import MatmulRate
from llama_jax.bench.tables import train_rows
from llama_jax.params import count_params, param_shapes
from llama_jax.planning.flops import train_flops
from llama_jax.presets import parse_model

SHAPE = "L2,D32,N4,K2,F48,V96"
ASKED = ["train", "--model", SHAPE, "--batch", "2", "--seq", "8", "--steps", "3"]


@pytest.fixture(autouse=True)
def quick_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = MatmulRate(gflops=10.0, size="8,8,8")
    monkeypatch.setattr(train, "matmul_rate", lambda *_: rate)


def test_a_training_benchmark_reports_a_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert entry.main([*ASKED, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = parse_model(SHAPE, 8)
    asked = ("benchmark", "model", "batch", "seq", "steps", "remat", "mesh")
    assert [found[name] for name in asked] == ["train", SHAPE, 2, 8, 3, "none", None]
    assert found["params"] == count_params(param_shapes(config))
    assert found["flops"] == train_flops(config, 2, 8)
    assert 0 < found["best_seconds"] <= found["seconds"]
    assert found["tokens_per_s"] == pytest.approx(16 / found["seconds"])
    rate = found["flops"] / found["seconds"] / 1e9
    assert found["gflops_per_s"] == pytest.approx(rate)
    assert found["ratio"] == pytest.approx(rate / 10)
    assert found["mfu"] is None
    assert found["peer"] is None


def test_steps_are_taken_in_turns_with_another_library(
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
    assert train_rows(report)["times as fast"] == f"{report.peer.speedup:.2f}"


def test_a_library_that_is_missing_is_named_with_its_installation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(train.importlib, "import_module", refuse)
    assert entry.main([*ASKED, "--against", "torch"]) == 2
    said = capsys.readouterr().err
    assert "torch is not installed; pip install torch transformers" in said


@pytest.mark.parametrize("name", ["batch", "seq", "steps"])
def test_a_number_that_makes_no_sense_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([*ASKED, f"--{name}", "0"]) == 2
    assert f"--{name} is 0; it must be at least 1" in capsys.readouterr().err
