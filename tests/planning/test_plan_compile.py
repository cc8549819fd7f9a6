"""What the compiler is asked, and what is made of its answer."""

import importlib.util
import json
import pathlib
import re
from typing import Any

import jax
import pytest
from support.models import TINY

from llama_jax import plan
from llama_jax.cli import command as cli
from llama_jax.config import parse_model
from llama_jax.planning import compiler, gpu_target_config, programs, search
from llama_jax.planning.chips import CHIPS
from llama_jax.planning.compiled import Compiled, CompiledBytes
from llama_jax.planning.memory import Workload, footprint
from llama_jax.planning.topology import local_topology, parse_topology
from llama_jax.sharding import make_mesh, parse_mesh

eight_devices = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)
MESHES = ("data=8", "fsdp=2,sequence=2,tensor=2", "data=2,tensor=4")
TASKS = ("train", "prefill", "decode")
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
SHALLOW = TINY.replace(num_layers=1)


def work(task: Any, **choices: Any) -> Workload:
    fields: dict[str, Any] = {"batch": 8, "seq": 32, "dtype": "float32"}
    fields |= {"flash": False, "remat": "block" if task == "train" else "none"}
    return Workload(config=SHALLOW, task=task, **(fields | choices))


# Programs.


@eight_devices
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("task", TASKS)
def test_programs_take_what_the_formula_counts(task: Any, text: str) -> None:
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    asked = work(task)
    built = programs.program(asked, mesh)
    held = footprint(asked, dict(mesh.shape))
    found = {kind: programs.shard_bytes_of(tree) for kind, tree in built.kinds.items()}
    assert found["weights"] == held.weights
    if task == "train":
        counters = 2 * 4  # AdamW's and the schedule's counts of steps
        assert found["optimizer"] == held.optimizer + counters
    if task == "decode":
        assert found["cache"] == held.cache
    compiled = built.lower().compile(compiler_options=QUICKLY)
    answer = compiler.held_by(found, compiled.memory_analysis())
    assert answer.padding <= 64
    arguments = answer.weights + answer.optimizer + answer.cache + answer.batch
    size = compiled.memory_analysis().argument_size_in_bytes
    assert arguments + answer.padding == size
    if task == "prefill":
        assert answer.outputs >= held.cache
    else:  # what is donated is written in place
        assert answer.outputs < 0.2 * (held.weights + held.cache)


QUANTIZED = [("decode", "int8"), ("decode", "int4"), ("qlora", "nf4"), ("lora", "none")]


@eight_devices
@pytest.mark.parametrize(("task", "quantize"), QUANTIZED)
def test_quantized_and_adapted_programs_take_what_the_formula_counts(
    task: Any, quantize: Any
) -> None:
    mesh = make_mesh(parse_mesh("fsdp=2,tensor=2,data=2"), jax.devices()[:8])
    config = parse_model("L2,D128,N4,K2,F256,V96", 64)
    asked = work(task, quantize=quantize, rank=4).replace(config=config)
    built = programs.program(asked, mesh)
    held = footprint(asked, dict(mesh.shape))
    found = {kind: programs.shard_bytes_of(tree) for kind, tree in built.kinds.items()}
    assert found["weights"] == held.weights
    if asked.trains:
        assert found["optimizer"] == held.optimizer + 2 * 4
    assert built.lower().as_text()


# Answers.


def planned(total: int, **choices: Any) -> search.Plan:
    found = search.plan(work("train", **choices), local_topology(), {"data": -1})
    held = found.held._replace(temporaries=0)
    held = held._replace(temporaries=total - held.total)
    return found._replace(held=held)


def answer(total: int | None, limit: int, said: str | None = None) -> Compiled:
    return Compiled(
        seconds=1.0,
        attention="xla",
        held=None if said else CompiledBytes(temporaries=total or 0),
        total=total,
        limit=limit,
        out_of_memory=said,
        kernels=0,
        collectives=(),
        product_flops=0.0,
        compute_seconds=2.0,
        collective_seconds=1.0,
    )


def test_what_the_compiler_refuses_is_followed_by_smaller_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mega = 1 << 20
    plans = [planned(size * mega) for size in (100, 99, 120, 80, 60)]
    asked = []

    def fake(found: search.Plan, _: Any) -> Compiled:
        asked.append(found.held.total // mega)
        fits = found.held.total <= 70 * mega
        return answer(found.held.total, 70 * mega, None if fits else "Ran out.")

    monkeypatch.setattr(compiler, "compile_plan", fake)
    tried = compiler.compile_first_that_fits(plans, ())
    assert asked == [100, 80, 60]
    assert [one.fits for _, one in tried] == [False, False, True]


def test_a_program_larger_than_the_chip_does_not_fit() -> None:
    assert answer(10, 10).fits
    assert not answer(11, 10).fits
    assert not answer(5, 10, "Ran out of memory").fits


def test_the_part_of_the_peak_is_of_the_work_and_not_of_what_is_done_twice() -> None:
    found = search.plan(
        work("train", dtype="bfloat16"), parse_topology("v5e:2x4"), {"data": 8}
    )
    found = found._replace(bound=found.bound._replace(model_flops=8 * 197e12))
    assert answer(1, 1).mfu(found, overlap=True) == pytest.approx(1 / 2)
    assert answer(1, 1).mfu(found, overlap=False) == pytest.approx(1 / 3)


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
def test_the_compilers_sentence_and_number_are_read(
    error: str, sentence: str, needed: float
) -> None:
    assert compiler.out_of_memory(error) == (sentence, int(needed * (1 << 30)))


def test_another_error_is_no_lack_of_memory() -> None:
    assert compiler.out_of_memory("INTERNAL: Mosaic failed to compile") is None


# GPUs that are not there.


def fields_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+): (\"[^\"]*\"|[\d.]+)", text))


def test_an_h100_is_described_as_xla_describes_a_real_one(
    assets: pathlib.Path,
) -> None:
    real = (assets / "gpu" / "h100.target_config.textproto").read_text("utf-8")
    wanted, found = (
        fields_of(real),
        fields_of(gpu_target_config.target_config(CHIPS["h100"])),
    )
    assert found.pop("minor") in ("0", "8")  # of both versions
    wanted.pop("minor")
    for name, nearly in (("memory_bandwidth", 1e-3), ("device_memory_size", 1e-4)):
        real_number = float(wanted.pop(name))
        assert float(found.pop(name)) == pytest.approx(real_number, rel=nearly)
    assert found == wanted


def test_every_gpu_of_the_table_is_described() -> None:
    for chip in CHIPS.values():
        if chip.links == "host":
            described = fields_of(gpu_target_config.target_config(chip))
            assert int(described["device_memory_size"]) == chip.hbm_bytes


# The command.


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as exit:
        cli.run(plan.main, argv)
    out, err = capsys.readouterr()
    assert isinstance(exit.value.code, int)
    return exit.value.code, out, err


SMALL = ("--model", "L1,D32,N8,F48,V96", "--seq", "16", "--batch", "8", "--compile")


@eight_devices
def test_this_machines_compiler_answers_too(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*SMALL, "--task", "prefill", "--mesh", "data=2,tensor=4")
    status, out, _ = run(capsys, *flags, "--json")
    found = json.loads(out)
    assert (status, found["fits"], found["advice"]) == (0, True, None)
    compiled = found["compiled"]
    assert compiled["seconds"] > 0
    assert compiled["out_of_memory"] is None
    assert sum(compiled["bytes_per_chip"].values()) == compiled["total_bytes_per_chip"]
    assert compiled["bytes_per_chip"]["weights"] == found["bytes_per_chip"]["weights"]
    assert compiled["limit_bytes"] == found["limit_bytes"]
    assert compiled["formula_over_compiler"] > 0
    assert compiled["product_flops_per_chip"] > 0
    kinds = {(one["kind"], one["axes"]) for one in compiled["collectives"]}
    assert ("all-reduce", "tensor") in kinds or ("reduce-scatter", "tensor") in kinds
    assert all(one["bytes"] > 0 < one["count"] for one in compiled["collectives"])
    assert len(compiled["tried"]) == 1
    assert compiled["mfu_overlap"] is compiled["mfu_no_overlap"] is None


@eight_devices
def test_formula_and_compiler_stand_side_by_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = run(capsys, *SMALL, "--task", "decode", "--mesh", "data=8")
    assert status == 0
    assert re.search(r"compiled in \d+ s \(attention xla\): it fits", out)
    assert re.search(r"GB of a chip +formula +compiler +ratio", out)
    assert re.search(r"weights +0\.00 +0\.00 +1\.000", out)
    assert "no compiler was asked" not in out


@pytest.mark.parametrize(
    ("topology", "remedy"),
    [("v5e:2x2", "pip install libtpu"), ("h100:8", "jax-cuda13-pjrt")],
)
def test_a_compiler_that_is_missing_is_named_with_what_installs_it(
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


def test_a_gpus_description_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--topology", "h100:8", "--gpu-target-config", "./nothing.textproto")
    status, _, err = run(capsys, *SMALL, *flags)
    assert status == 2
    assert "nothing.textproto" in err
