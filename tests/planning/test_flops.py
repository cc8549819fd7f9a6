"""FLOPs and traffic equal XLA's counts and counts by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.models import TINY
from support.workloads import GROUPED, ONE_CHIP, workload

from llama_jax.model.presets import parse_model, preset
from llama_jax.model.transformer import Llama, apply
from llama_jax.params import count_params, param_shapes
from llama_jax.planning.flops import (
    chip_flops,
    forward_flops,
    prefill_flops,
    train_flops,
)
from llama_jax.planning.roofline import interconnect_bytes
from llama_jax.planning.search import make_plan
from llama_jax.planning.topology import parse_topology
from llama_jax.runtime import Remat, Runtime

COST_ANALYSIS = 0.02
"""Relative tolerance to XLA's FLOPs, which include norms, softmax and rotations."""


def xla_flops(function: Any, *arguments: Any) -> float:
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def test_forward_flops_equal_xlas() -> None:
    config = parse_model("L2,D512,N8,K4,F1408,V2048", 256)
    model = Llama(config, Runtime(attention="xla"))
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    xla = xla_flops(lambda *args: apply(model, *args), param_shapes(config), tokens)
    formula = forward_flops(config, 2, 256, causal=False)
    assert formula == pytest.approx(xla, rel=COST_ANALYSIS)
    assert train_flops(config, 2, 256) == 3 * forward_flops(config, 2, 256)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_train_flops_of_a_chip_equal_xlas(remat: Remat) -> None:
    config = parse_model("L3,D512,N8,K4,F1408,V512", 128)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    # Unrolled, since XLA counts the body of a loop once. The loss has one chunk here.
    model = Llama(config, Runtime(attention="xla", remat=remat))

    def loss(params: Any, tokens: Any) -> Any:
        return jnp.sum(apply(model, params, tokens, tokens, method="losses"))

    xla = xla_flops(jax.grad(loss), param_shapes(config), tokens)
    # XLA's attention computes all pairs of tokens, the formula counts half of them.
    forward = forward_flops(config, 2, 128, causal=False)
    masked = forward - forward_flops(config, 2, 128)
    work = workload(config, batch=2, seq=128, remat=remat)
    formula = chip_flops(work, ONE_CHIP) + (3 if remat == "none" else 4) * masked
    if remat == "none":
        head = 2 * 2 * 128 * 512 * 512  # the loss's backward pass recomputes logits
        assert formula == pytest.approx(3 * forward + head)
    else:  # the result of down_proj is not needed again
        formula -= 2 * 2 * 128 * config.num_layers * 1408 * 512
    assert formula == pytest.approx(xla, rel=COST_ANALYSIS)


def test_prefill_flops_count_each_visible_product_twice() -> None:
    products = 0
    for query in range(5):
        products += 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
        products += 2 * 4 * 8 * 2 * (query + 1)
    products += 32 * 96
    assert prefill_flops(TINY, 1, 5) == 2 * products
    assert prefill_flops(TINY, 3, 5) == 3 * 2 * products


def test_chips_share_the_flops_that_a_mesh_divides() -> None:
    work = workload(batch=8, remat="none")
    alone = chip_flops(work, ONE_CHIP)
    logits = 2 * 8 * 64 * 512 * 2048  # recomputed
    assert alone == train_flops(GROUPED, 8, 64) + logits
    mesh = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 4}
    assert chip_flops(work, mesh) == alone / 32
    # Each of eight chips computes a batch of one.
    alone = chip_flops(workload(batch=1), ONE_CHIP)
    assert chip_flops(workload(batch=1), {"data": 8}) == alone


def test_decoding_one_row_is_limited_by_memory_bandwidth() -> None:
    work = workload(preset("llama2-7b"), task="decode", batch=1, seq=2048)
    plan = make_plan(work, parse_topology("v5e:1x1"), {})
    assert plan.bound.limited_by == "memory bandwidth"
    read = plan.footprint.weights + plan.footprint.cache - 2 * 32000 * 4096
    assert plan.bound.seconds == pytest.approx(read / 819e9)
    assert plan.bound.interconnect_seconds == 0


def test_traffic_between_chips_is_what_the_mesh_splits() -> None:
    params = count_params(param_shapes(GROUPED))
    work = workload(remat="none", batch=8)
    for axis, nbytes in {
        "data": 2 * 3 / 4 * 4 * params,
        "fsdp": 3 / 4 * 3 * 2 * params,
        "tensor": 2 * 3 / 4 * (4 * 2 + 1) * 8 * 64 * 512 * 2,
    }.items():
        received = interconnect_bytes(work, {axis: 4})
        assert {name: n for name, n in received.items() if n} == {axis: nbytes}
