"""Programs of plans, and what is read from the compiler's result."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
from typing import Any

import jax
import pytest
from support.commands import run_command
from support.models import TINY
from support.workloads import eight_devices, workload

from llama_jax import plan
from llama_jax.model.presets import parse_model
from llama_jax.planning import compiler
from llama_jax.planning.chips import CHIPS
from llama_jax.planning.compiled import CompiledFootprint, CompiledPlan
from llama_jax.planning.gpu_target_config import target_config
from llama_jax.planning.memory import footprint
from llama_jax.planning.programs import make_program, shard_bytes
from llama_jax.planning.search import Plan, make_plan
from llama_jax.planning.topology import local_topology, parse_topology
from llama_jax.sharding import make_mesh, parse_mesh

QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
SHALLOW = TINY.replace(num_layers=1)
run = functools.partial(run_command, plan.main)


@eight_devices
@pytest.mark.parametrize(
    ("task", "axes"),
    [
        ("train", "fsdp=2,sequence=2,tensor=2"),
        ("prefill", "fsdp=2,sequence=2,tensor=2"),
        ("decode", "data=2,tensor=4"),  # slots over `tensor`, which K does not divide
    ],
)
def test_arguments_and_outputs_equal_the_formula(task: Any, axes: str) -> None:
    mesh = make_mesh(parse_mesh(axes), jax.devices()[:8])
    remat = "block" if task == "train" else "none"
    settings: dict[str, Any] = {"seq": 32, "dtype": "float32", "flash": False}
    work = workload(SHALLOW, task=task, remat=remat, **settings)
    program = make_program(work, mesh)
    formula = footprint(work, dict(mesh.shape))
    kinds = {kind: shard_bytes(tree) for kind, tree in program.kinds.items()}
    assert kinds["weights"] == formula.weights
    if task == "train":
        counters = 2 * 4  # step counts of AdamW and of the schedule
        assert kinds["optimizer"] == formula.optimizer + counters
    if task == "decode":
        assert kinds["cache"] == formula.cache
    compiled = program.lower().compile(compiler_options=QUICKLY)
    memory = compiler.compiled_footprint(kinds, compiled)
    assert memory.padding <= 64
    arguments = memory.weights + memory.optimizer + memory.cache + memory.batch
    size = compiled.memory_analysis().argument_size_in_bytes
    assert arguments + memory.padding == size
    if task == "prefill":
        assert memory.outputs >= formula.cache
    else:  # donated arguments are updated in place
        assert memory.outputs < 0.2 * (formula.weights + formula.cache)


QUANTIZED = [("decode", "int8"), ("decode", "int4"), ("qlora", "nf4"), ("lora", "none")]


@eight_devices
@pytest.mark.parametrize(("task", "quantize"), QUANTIZED)
def test_arguments_of_quantized_and_adapted_programs_equal_the_formula(
    task: Any, quantize: Any
) -> None:
    mesh = make_mesh(parse_mesh("fsdp=2,tensor=2,data=2"), jax.devices()[:8])
    config = parse_model("L2,D128,N4,K2,F256,V96", 64)
    settings: dict[str, Any] = {"seq": 32, "dtype": "float32", "remat": "none"}
    work = workload(config, task=task, quantize=quantize, rank=4, **settings)
    program = make_program(work, mesh)
    formula = footprint(work, dict(mesh.shape))
    assert shard_bytes(program.kinds["weights"]) == formula.weights
    if work.trains:
        assert shard_bytes(program.kinds["optimizer"]) == formula.optimizer + 2 * 4
    assert program.lower().as_text()


def plan_of(total: int) -> Plan:
    """A plan whose footprint has this total."""
    plan = make_plan(workload(SHALLOW, seq=32), local_topology(), {"data": -1})
    others = plan.footprint.total - plan.footprint.temporaries
    memory = plan.footprint._replace(temporaries=total - others)
    return plan._replace(footprint=memory)


def compiled_plan(
    plan: Plan, total: int | None, limit: int, message: str | None = None
) -> CompiledPlan:
    """A compiled plan of this total on chips with this limit."""
    topology = plan.topology
    chip = dataclasses.replace(topology.chip, limit_bytes=limit)
    topology = dataclasses.replace(topology, chip=chip)
    return CompiledPlan(
        plan=plan._replace(topology=topology),
        seconds=1.0,
        attention="xla",
        footprint=None if message else CompiledFootprint(temporaries=total or 0),
        total=total,
        out_of_memory=message,
        compute_seconds=2.0,
        collective_seconds=1.0,
    )


def test_after_a_plan_that_does_not_fit_smaller_ones_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mega = 1 << 20
    plans = [plan_of(size * mega) for size in (100, 99, 120, 80, 60)]

    def compile_plan(plan: Plan, _: Any) -> CompiledPlan:
        total = plan.footprint.total
        message = None if total <= 70 * mega else "Ran out."
        return compiled_plan(plan, total, 70 * mega, message)

    monkeypatch.setattr(compiler, "compile_plan", compile_plan)
    tried = compiler.compile_first_that_fits(plans, ())
    assert [one.plan.footprint.total // mega for one in tried] == [100, 80, 60]
    assert [one.fits for one in tried] == [False, False, True]


def test_a_program_larger_than_the_limit_does_not_fit() -> None:
    plan = plan_of(1 << 20)
    assert compiled_plan(plan, 10, 10).fits
    assert not compiled_plan(plan, 11, 10).fits
    assert not compiled_plan(plan, 5, 10, "Ran out of memory").fits


def test_mfu_does_not_count_recomputation() -> None:
    work = workload(SHALLOW, seq=32)
    plan = make_plan(work, parse_topology("v5e:2x4"), {"data": 8})
    plan = plan._replace(bound=plan.bound._replace(model_flops=8 * 197e12))
    compiled = compiled_plan(plan, 1, 1)
    assert compiled.mfu(overlap=True) == pytest.approx(1 / 2)
    assert compiled.mfu(overlap=False) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("error", "sentence", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
            "the total memory required for HLO temporaries (18.69G) exceeds available "
            "HBM (15.75G). HLO module: jit__step.\nSee https://openxla.org/xla/errors",
            "Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(18.69G) exceeds available HBM (15.75G).",
            18.69,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 20.10G of 15.75G hbm. Exceeded hbm capacity by "
            "4.35G.\n\nTotal hbm usage >= 20.35G:\n    reserved        258.00M",
            "Ran out of memory in memory space hbm. Used 20.10G of 15.75G hbm. "
            "Exceeded hbm capacity by 4.35G.",
            20.10,
        ),
    ],
)
def test_the_compilers_message_and_number_are_read(
    error: str, sentence: str, needed: float
) -> None:
    parsed = compiler.parse_out_of_memory(error)
    assert parsed == (sentence, int(needed * (1 << 30)))


def test_other_errors_are_not_out_of_memory() -> None:
    error = "INTERNAL: Mosaic failed to compile"
    assert compiler.parse_out_of_memory(error) is None


def fields_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+): (\"[^\"]*\"|[\d.]+)", text))


def test_the_description_of_an_h100_equals_xlas(assets: pathlib.Path) -> None:
    text = (assets / "gpu" / "h100.target_config.textproto").read_text("utf-8")
    xla, ours = fields_of(text), fields_of(target_config(CHIPS["h100"]))
    assert ours.pop("minor") in ("0", "8")  # of both versions
    xla.pop("minor")
    for name, tolerance in (("memory_bandwidth", 1e-3), ("device_memory_size", 1e-4)):
        number = float(xla.pop(name))
        assert float(ours.pop(name)) == pytest.approx(number, rel=tolerance)
    assert ours == xla


def test_every_gpu_has_a_description() -> None:
    for chip in filter(lambda chip: chip.is_gpu, CHIPS.values()):
        described = fields_of(target_config(chip))
        assert int(described["device_memory_size"]) == chip.hbm_bytes


SMALL = ("--model", "L1,D32,N8,F48,V96", "--seq", "16", "--batch", "8", "--compile")


@eight_devices
def test_a_plan_is_compiled_for_this_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = (*SMALL, "--task", "prefill", "--mesh", "data=2,tensor=4")
    status, out, _ = run(capsys, *flags, "--json")
    report = json.loads(out)
    assert (status, report["fits"], report["advice"]) == (0, True, None)
    compiled = report["compiled"]
    assert compiled["seconds"] > 0
    assert compiled["out_of_memory"] is None
    assert sum(compiled["bytes_per_chip"].values()) == compiled["total_bytes_per_chip"]
    assert compiled["bytes_per_chip"]["weights"] == report["bytes_per_chip"]["weights"]
    assert compiled["limit_bytes"] == report["limit_bytes"]
    assert compiled["formula_over_compiler"] > 0
    assert compiled["product_flops_per_chip"] > 0
    kinds = {(c["kind"], c["axes"]) for c in compiled["collectives"]}
    assert ("all-reduce", "tensor") in kinds or ("reduce-scatter", "tensor") in kinds
    assert all(c["bytes"] > 0 < c["count"] for c in compiled["collectives"])
    assert len(compiled["tried"]) == 1
    assert compiled["mfu_overlap"] is compiled["mfu_no_overlap"] is None


@eight_devices
def test_the_report_compares_formula_and_compiler(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = run(capsys, *SMALL, "--task", "decode", "--mesh", "data=8")
    assert status == 0
    assert re.search(r"compiled in \d+ s \(attention xla\): fits", out)
    assert re.search(r"GB per chip +formula +compiler +ratio", out)
    assert re.search(r"weights +0\.00 +0\.00 +1\.000", out)
    assert "nothing was compiled" not in out


@pytest.mark.parametrize(
    ("topology", "remedy"),
    [("v5e:2x2", "pip install libtpu"), ("h100:8", "jax-cuda13-pjrt")],
)
def test_a_missing_compiler_is_named_with_its_installation(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    topology: str,
    remedy: str,
) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        missing = name == "libtpu" or name.startswith("jax_plugins")
        return None if missing else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    flags = ("--model", "llama2-7b", "--topology", topology, "--batch", "1")
    status, out, err = run(capsys, *flags, "--seq", "2048", "--compile")
    assert (status, out) == (2, "")
    assert f"--compile for {topology}: " in err
    assert remedy in err
    assert err.count("\n") == 1


def test_a_missing_gpu_target_config_is_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--topology", "h100:8", "--gpu-target-config", "./nothing.textproto")
    status, _, err = run(capsys, *SMALL, *flags)
    assert status == 2
    assert "nothing.textproto" in err
