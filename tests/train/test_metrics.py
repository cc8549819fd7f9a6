"""Records on disk: each step once, whatever happened; and what is made of them."""

import importlib.util
import json
import pathlib
import sys
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.errors import TrainError
from llama_jax.train.metrics import (
    MetricsFile,
    TensorBoard,
    WeightsAndBiases,
    read_metrics,
)
from llama_jax.train.report import (
    held_out_losses,
    loss_table,
    summary,
    write_report,
)


def record(step: int, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    rate = {"learning_rate": 1e-3, "tokens_per_second": 100.0 * step}
    return {"step": step, "loss": loss, **rate, **more}


def steps(path: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_is_a_line_of_json(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with MetricsFile(file) as metrics:
        metrics.write(record(1))
        metrics.write(record(2, float("nan")))
        assert steps(file) == [1, 2]  # before it is closed
        metrics.sync()
    lines = file.read_text().splitlines()
    assert json.loads(lines[0]) == record(1)
    assert json.loads(lines[1])["loss"] is None


def test_a_record_of_the_last_step_replaces_its_line(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with MetricsFile(file) as metrics:
        for one in (record(1), record(2), record(2, eval_loss=0.5), record(3)):
            metrics.write(one)
    assert steps(file) == [1, 2, 3]
    assert read_metrics(file)[1]["eval_loss"] == 0.5
    with MetricsFile(file, step=3) as metrics:
        metrics.write(record(3, eval_loss=0.25))
    assert steps(file) == [1, 2, 3]
    assert read_metrics(file)[2]["eval_loss"] == 0.25


def test_lines_after_the_resumed_step_are_dropped(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with MetricsFile(file) as metrics:
        for step in range(1, 8):
            metrics.write(record(step))
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 8, "lo')  # the process was killed here
    with MetricsFile(file, step=4) as metrics:
        assert steps(file) == [1, 2, 3, 4]
        metrics.write(record(5))
    assert steps(file) == [1, 2, 3, 4, 5]
    with MetricsFile(file) as metrics:
        assert steps(file) == []


@given(st.binary(max_size=200), st.integers(0, 9))
def test_a_file_of_any_bytes_can_be_continued(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, step: int
) -> None:
    file = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    good = json.dumps(record(1)).encode()
    file.write_bytes(good + b"\n" + data)
    with MetricsFile(file, step=step) as metrics:
        metrics.write(record(step + 1))
    numbers = steps(file)
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == step + 1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "tensorboard.compat.proto", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainError, match=r'pip install "llama-jax\[tensorboard\]"'):
        TensorBoard("nowhere")
    with pytest.raises(TrainError, match=r'pip install "llama-jax\[wandb\]"'):
        WeightsAndBiases("project", "nowhere", {})


def test_tensorboard_reads_the_events(tmp_path: pathlib.Path) -> None:
    loading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for first in (0, 2):
        board = TensorBoard(tmp_path, step=first)
        for step in range(first + 1, 5):
            board.write(record(step, loss=float(10 * first + step), time=float(step)))
        board.close()
    events = loading.EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = [(one.step, one.value) for one in events.Scalars("loss")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_weights_and_biases_receives_the_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    calls: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append("end"),
    )
    module: Any = types.ModuleType("wandb")
    module.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    writer = WeightsAndBiases("llamas", tmp_path / "first", {"seed": 1})
    writer.write(record(3, name="not a number"))
    writer.close()
    assert calls[0]["project"] == "llamas"
    assert calls[0]["config"] == {"seed": 1}
    assert calls[1] == (3, {k: v for k, v in record(3).items() if k != "step"})
    assert calls[2] == "end"


RECORDS = [
    record(n, 3.0 / n, seconds=2.0, data_seconds=0.5, tokens=10, eval_loss=4.0 / n)
    if n % 2 == 0
    else record(n, 3.0 / n, seconds=2.0, data_seconds=0.5, tokens=10)
    for n in range(1, 7)
]


def test_a_summary_has_the_numbers() -> None:
    first = [RECORDS[0] | {"eval_loss_before": 9.0}, *RECORDS[1:]]
    assert held_out_losses(first)[:2] == [(0, 9.0), (2, 2.0)]
    results = summary(first)
    assert results["steps"] == "6"
    assert results["tokens"] == "60"
    assert results["of which waiting for data"] == "25.00%"
    assert results["best held-out loss"].startswith("0.6667 after step 6")
    assert summary([]) == {"steps": "none"}


def test_a_report_is_complete_and_safe(tmp_path: pathlib.Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        for one in RECORDS:
            metrics.write(one)
    samples = [{"step": 4, "samples": [{"prompt": "a<b", "text": "c|d\n</pre>"}]}]
    files = write_report(
        tmp_path, {"data": ["x.jsonl", "y"], "clip": None}, samples=samples
    )
    names = {file.name for file in files}
    assert {"report.md", "report.html"} <= names
    page = (tmp_path / "report.html").read_text()
    assert "a&lt;b" in page
    assert "c|d\n&lt;/pre&gt;" in page
    assert page.count("<img") == ("loss.png" in names)
    assert "held-out loss" in page
    text = (tmp_path / "report.md").read_text()
    assert "| data | x.jsonl y |" in text
    assert "clip" not in text


def test_a_report_without_matplotlib_has_a_table_of_losses(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        for one in RECORDS:
            metrics.write(one)
    files = write_report(tmp_path, {})
    assert {file.name for file in files} == {"report.md", "report.html"}
    text = (tmp_path / "report.md").read_text()
    assert "| step | training loss | held-out loss |" in text
    assert "| 6 | 0.5000 | 0.6667 |" in text
    assert "<img" not in (tmp_path / "report.html").read_text()


@given(st.lists(st.floats(-1e6, 1e6), max_size=50))
def test_a_table_of_losses_has_few_rows_and_all_steps(losses: list[float]) -> None:
    records = [record(n, loss) for n, loss in enumerate(losses, start=1)]
    rows = loss_table(records)[1:]
    assert len(rows) <= 10
    assert [row[0] for row in rows[-1:]] == ([len(losses)] if losses else [])


def test_a_report_of_a_policy_has_reward_against_kl(tmp_path: pathlib.Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        for step, reward in enumerate((0.25, float("nan"), 0.5), start=1):
            facts = {"reward": reward, "kl": step / 100, "length": 5.0 * step}
            metrics.write(record(step, 1.0) | facts)
    files = write_report(tmp_path, {})
    text = (tmp_path / "report.md").read_text()
    assert "| step | reward | kl | entropy | clipped | length | truncated |" in text
    assert "| 1 | 0.25 | 0.01 |  |  | 5 |  |" in text
    assert "| 3 | 0.5 | 0.03 |" in text
    assert "| 2 | " not in text.partition("## Reward")[2].partition("##")[0]
    if importlib.util.find_spec("matplotlib"):
        assert tmp_path / "reward.png" in files
        assert "![reward against KL](reward.png)" in text


def test_losses_are_drawn_if_matplotlib_is_installed(
    tmp_path: pathlib.Path,
) -> None:
    pytest.importorskip("matplotlib")
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(RECORDS[0])
    files = write_report(tmp_path, {})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "loss.png" in (tmp_path / "report.md").read_text()
    assert "<img" in (tmp_path / "report.html").read_text()
    assert len(files) == 3
