"""Plans in the documentation compile, and need the memory that the formula says.

Each takes minutes, with the oldest compilers several times as many; the formula is
compared with the newest ones.
"""

from typing import Any, NamedTuple

import jax
import pytest
from support.programs import needs_tpu_compiler

from llama_jax.errors import MeshError
from llama_jax.model.presets import preset
from llama_jax.planning.compiled import CompiledPlan
from llama_jax.planning.compiler import compile_plan
from llama_jax.planning.search import make_plan
from llama_jax.planning.target_devices import target_devices
from llama_jax.planning.topology import parse_topology
from llama_jax.planning.workload import Workload
from llama_jax.sharding import parse_mesh

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="compared with the newest compilers only"
)

COMPILER = 0.1
"""Relative tolerance of the formula's bytes to the compiler's."""


class Case(NamedTuple):
    """A workload on chips."""

    model: str
    topology: str
    mesh: str
    task: Any
    batch: int
    seq: int
    quantize: Any = "none"
    layers: int | None = None
    cache_dtype: Any = None

    def __str__(self) -> str:
        return f"{self.model} {self.task} {self.quantize} {self.topology} {self.mesh}"


DECODING = (
    Case("llama2-7b", "v5e:1x1", "data=1", "decode", 1, 2048),
    Case("llama2-7b", "v5e:1x1", "data=1", "decode", 8, 4096, "int8", None, "int8"),
    Case("llama2-13b", "v5e:2x4", "tensor=8", "decode", 32, 4096),
    Case("llama2-70b", "v5e:4x4", "tensor=16", "decode", 16, 4096),
)
TRAINING = (
    Case("llama2-70b", "v5e:16x16", "fsdp=256", "train", 256, 4096),
    Case("llama2-70b", "v5p:4x4x4", "fsdp=64", "train", 256, 4096),
)
LONG = (
    Case("codellama-34b", "v5e:4x4", "sequence=2,tensor=8", "prefill", 1, 98304),
    Case("codellama-34b", "v5p:2x2x2", "sequence=8", "train", 1, 98304),
)
ON_GPUS = (
    Case("llama2-7b", "h100:8", "fsdp=8", "lora", 8, 4096),
    Case("llama2-70b", "h100:8", "tensor=8", "decode", 16, 4096),
)


def compile_case(case: Case) -> CompiledPlan:
    """Compile the plan of a case; skip if the compiler is not installed."""
    config, topology = preset(case.model), parse_topology(case.topology)
    if case.layers:
        config = config.replace(num_layers=case.layers)
    work = Workload(
        config=config,
        task=case.task,
        batch=case.batch,
        seq=case.seq,
        quantize=case.quantize,
        cache_dtype=case.cache_dtype,
        remat="block" if case.task in ("train", "lora", "qlora") else "none",
        flash=topology.chip.flash,
        gpu=topology.chip.is_gpu,
    )
    plan = make_plan(work, topology, parse_mesh(case.mesh))
    try:
        devices = target_devices(topology)
    except MeshError as error:
        pytest.skip(str(error))
    return compile_plan(plan, devices)


def assert_fits_as_the_formula_says(case: Case) -> CompiledPlan:
    compiled = compile_case(case)
    formula = compiled.plan.footprint
    assert compiled.out_of_memory is None
    assert compiled.fits
    assert compiled.footprint is not None
    assert compiled.footprint.weights == formula.weights
    assert formula.total == pytest.approx(compiled.total, rel=COMPILER)
    return compiled


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", DECODING, ids=str)
def test_decoding_fits_as_the_formula_says(case: Case) -> None:
    assert_fits_as_the_formula_says(case)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_training_fits_as_the_formula_says(case: Case) -> None:
    assert case.batch * case.seq >= 1 << 20
    compiled = assert_fits_as_the_formula_says(case)
    if case.topology == "v5e:16x16":
        # The best published MFU of another library there, without any overlap.
        mfu = compiled.mfu(overlap=False)
        assert mfu is not None
        assert mfu >= 0.57


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_rows_fit_as_the_formula_says(case: Case) -> None:
    assert_fits_as_the_formula_says(case)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_eighty_layers_compile_in_twice_the_time_of_two() -> None:
    deep = Case("llama2-7b", "v5p:2x2x1", "fsdp=4", "train", 4, 1024)
    # The first compilation of a process also starts the compiler.
    compile_case(Case("llama2-7b", "v5p:2x2x1", "fsdp=4", "decode", 4, 256, layers=1))
    few, many = (compile_case(deep._replace(layers=layers)) for layers in (2, 80))
    assert many.footprint is not None
    assert many.seconds <= 2 * few.seconds


@pytest.mark.gpu_compile
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", ON_GPUS, ids=str)
def test_gpu_plans_fit_as_the_formula_says(case: Case) -> None:
    assert_fits_as_the_formula_says(case)


ADAPTERS = (
    Case("llama2-7b", "v5e:1x1", "data=1", "lora", 1, 2048),
    Case("llama2-13b", "v5e:1x1", "data=1", "qlora", 1, 2048, "int4"),
)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_adapters_of_large_models_train_on_one_small_chip(case: Case) -> None:
    compiled = assert_fits_as_the_formula_says(case)
    formula, total = compiled.plan.footprint, compiled.total
    assert compiled.plan.topology.chips == 1
    assert total is not None
    # The weights exist once: the rest has no room for a copy of them in any dtype.
    rest = total - formula.weights - formula.optimizer
    assert rest < formula.weights / 2
