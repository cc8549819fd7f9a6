"""The command `plan`: its answers, its table and its errors."""

import functools
import json
import math

import jax
import pytest
from support.commands import run_command

from llama_jax import plan
from llama_jax.loading import bundled
from llama_jax.model.presets import PRESETS
from llama_jax.planning import table
from llama_jax.planning.memory import Footprint
from llama_jax.planning.table import COMMON_HARDWARE

run = functools.partial(run_command, plan.main)


def test_json_describes_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "llama2-70b", "--topology", "v5e:16x16", "--task", "train")
    flags = (*flags, "--batch", "256", "--remat", "block")
    status, out, _ = run(capsys, *flags, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["fits"] is True
    assert set(report["bytes_per_chip"]) == set(Footprint._fields)
    assert sum(report["bytes_per_chip"].values()) == report["total_bytes_per_chip"]
    assert report["total_bytes_per_chip"] <= report["limit_bytes"]
    assert math.prod(report["mesh"].values()) == report["chips"] == 256
    assert report["compiled"] is None
    tokens = report["tokens_per_second_bound"] * report["step_seconds_bound"]
    assert tokens == pytest.approx(report["batch"] * report["seq"])
    assert 0 < report["mfu_bound"] <= 1
    status, out, _ = run(capsys, *flags, "--mesh", "fsdp=256")
    assert "fits: " in out
    assert "limited by" in out


@pytest.mark.parametrize("task", ["train", "lora", "qlora", "decode"])
def test_every_task_is_planned_on_tpus_and_gpus(
    capsys: pytest.CaptureFixture[str], task: str
) -> None:
    for topology in ("v5p:2x2x1", "l4:2"):
        flags = ("--topology", topology, "--task", task, "--json")
        status, out, _ = run(capsys, *flags)
        report = json.loads(out)
        assert (status, report["task"], report["topology"]) == (0, task, topology)
        assert report["quantize"] == ("int4" if task == "qlora" else "none")
        assert (report["advice"] is None) == report["fits"]


def test_a_plan_that_does_not_fit_comes_with_advice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--model", "llama2-70b", "--topology", "v5e:2x4", "--batch", "1")
    status, out, _ = run(capsys, *flags, "--seq", "2048")
    assert status == 0
    assert "DOES NOT FIT" in out
    assert "--quantize int8; or --topology v5e:4x4, the smallest" in out


def test_the_default_topology_is_this_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = run(capsys, "--model", "L2,D32,N8,F48,V96", "--json")
    assert status == 0
    assert json.loads(out)["chips"] == len(jax.devices())


def test_a_checkpoints_configuration_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(bundled())
    status, out, _ = run(capsys, "--model", folder, "--topology", "t4", "--json")
    assert status == 0
    assert json.loads(out)["seq"] == plan.read_model(folder, None).max_seq_len


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model", "llama2-7"), "did you mean 'llama2-7b'"),
        (("--model", "L2,D32"), "lacks N, F, V"),
        (("--model", "./nothing/here"), "no such file or folder"),
        (("--topology", "v9:2x2"), "no chip is called 'v9'"),
        (("--topology", "v5e:2x4", "--mesh", "tensor=3"), "v5e:2x4 has 8"),
        (("--topology", "v5e:2x4", "--mesh", "data=3,fsdp=-1"), "v5e:2x4 has 8"),
        (("--topology", "v5e:2x4", "--mesh", "model=8"), "'model' is not an axis"),
        (
            ("--model", "llama1-33b", "--topology", "v5e:2x4", "--mesh", "tensor=8"),
            "NH of 52 is not divisible by mesh axis tensor of 8",
        ),
        (
            ("--task", "train", "--quantize", "int8"),
            "--quantize: has no effect without --task qlora, prefill, decode or",
        ),
        (("--task", "qlora", "--quantize", "none"), "lora"),
        (("--remat", "block"), "without --task train, lora, qlora, ppo or ppo-lora"),
    ],
)
def test_invalid_arguments_are_rejected_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], reason: str
) -> None:
    status, out, err = run(capsys, *flags)
    assert (status, out) == (2, "")
    assert reason in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_table_has_every_preset_and_topology(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    presets = {name: PRESETS[name] for name in ("llama2-7b", "llama2-70b")}
    monkeypatch.setattr(table, "PRESETS", presets)
    status, out, _ = run(capsys, "--table")
    assert status == 0
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    rows = {row[0]: row[1:] for row in cells[2:]}
    assert list(rows) == list(presets)
    heads = [head.split()[0] for head in cells[0][1:]]
    assert heads == list(COMMON_HARDWARE)
    fits_7b = dict(zip(heads, rows["llama2-7b"], strict=True))
    assert fits_7b["v5e:1x1"].startswith("bf16")
    assert fits_7b["t4"].startswith("int8")
    assert rows["llama2-70b"][heads.index("v5e:16x16")] == "bf16 · train"
