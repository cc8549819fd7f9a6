"""Fine-tuning of large models on one small chip, by the compiler's word."""

import jax
import pytest
from programs import needs_tpu_compiler
from test_plan_chips import Case, assert_fits_as_the_formula_says

from llama_jax.planning.hardware import parse_topology

pytestmark = [
    pytest.mark.skipif(
        jax.__version_info__ < (0, 8), reason="held to the newest compilers"
    ),
    needs_tpu_compiler,
    pytest.mark.tpu_compile,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
]

ADAPTERS = (
    Case("llama2-7b", "v5e:1x1", "data=1", "lora", 1, 2048),
    Case("llama2-13b", "v5e:1x1", "data=1", "qlora", 1, 2048, "int4"),
)


@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_adapters_of_large_models_are_trained_on_one_small_chip(case: Case) -> None:
    found, answer = assert_fits_as_the_formula_says(case)
    assert parse_topology(case.topology).chips == 1
    assert answer.total <= parse_topology(case.topology).chip.limit_bytes
    # Weights are there once: what is neither they nor the optimizer's could not hold a
    # copy of them, in whatever dtype they would be multiplied.
    rest = answer.total - found.held.weights - found.held.optimizer
    assert rest < found.held.weights / 2
