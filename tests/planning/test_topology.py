"""Topologies: parsing, links along mesh axes, and the table of chips."""

import jax
import pytest
from support.models import TINY
from support.workloads import workload

from llama_jax.errors import MeshError
from llama_jax.planning.chips import CHIPS
from llama_jax.planning.search import make_plan
from llama_jax.planning.topology import axis_bandwidths, local_topology, parse_topology


def test_topologies_print_as_they_are_parsed() -> None:
    for text, chips in (("v5e:16x16", 256), ("v5p:4x4x4", 64), ("h100:2x8", 16)):
        assert parse_topology(text).chips == chips
        assert str(parse_topology(text)) == text
    assert parse_topology("h100:8").shape == (1, 8)
    assert parse_topology("t4").chips == parse_topology("v5p").chips == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v5x:2x2", "no chip is called 'v5x', only v4, v5e"),
        ("v5x:2x2", "h200; did you mean 'v5"),
        ("A100", "did you mean 'a100-40' or 'a100-80'?"),
        ("v5e-8", "did you mean 'v5e:2x4'?"),
        ("v5litepod-16", "did you mean 'v5e:4x4'?"),
        ("v5p-8", "did you mean 'v5p:2x2x1'?"),  # eight cores
        ("8xH100", "did you mean 'h100:8'?"),
        ("v5e:4", "'4' is not a shape of v5e; write v5e:4x4"),
        ("v5p:2x2", "write v5p:4x4x4"),
        ("v5e:0x4", "is not a shape"),
        ("h100:", "'' is not a shape of h100; write h100:8, or h100:2x8"),
        ("h100:2x2x2", "is not a shape"),
        ("t4:-1", "is not a shape"),
    ],
)
def test_an_invalid_topology_is_rejected_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(MeshError, match=reason) as caught:
        parse_topology(text)
    assert "\n" not in str(caught.value)


def test_an_axis_that_spans_a_ring_has_two_links() -> None:
    pod = parse_topology("v5e:16x16")
    assert axis_bandwidths(pod, {"fsdp": 16, "tensor": 16}) == {
        "data": 50e9,
        "fsdp": 100e9,
        "sequence": 50e9,
        "tensor": 100e9,
    }
    assert axis_bandwidths(pod, {"fsdp": 256})["fsdp"] == 200e9
    assert axis_bandwidths(pod, {"fsdp": 64, "tensor": 4})["tensor"] == 50e9
    hosts = parse_topology("h100:2x8")
    rates = axis_bandwidths(hosts, {"data": 2, "tensor": 8})
    assert (rates["data"], rates["tensor"]) == (50e9, 450e9)
    assert axis_bandwidths(hosts, {"fsdp": 16})["fsdp"] == 400e9


def test_the_default_dtype_of_a_chip_is_its_fastest() -> None:
    for chip in CHIPS.values():
        assert chip.limit_bytes < chip.hbm_bytes
        assert chip.flops[chip.dtype] == max(chip.flops.values())
    assert CHIPS["t4"].dtype == "float16"
    assert CHIPS["v5e"].dtype == "bfloat16"


def test_the_local_topology_has_all_devices() -> None:
    topology = local_topology()
    assert topology.chips == len(jax.devices())
    if jax.default_backend() == "cpu":
        assert topology.chip.dtype == "float32"
        plan = make_plan(workload(TINY, batch=1), topology, {"data": -1})
        assert plan.bound.seconds is None
