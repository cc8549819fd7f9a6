"""The search finds plans that fit, and the best of them."""

from support.workloads import workload

from llama_jax.model.presets import preset
from llama_jax.planning.search import advice, make_plan, meshes, remats, search
from llama_jax.planning.topology import parse_topology


def test_7b_fits_a_v5e_in_bfloat16_and_a_t4_in_int8() -> None:
    work = workload(preset("llama2-7b"), task="decode", batch=1, seq=2048)
    assert search(work, parse_topology("v5e:1x1"), batch=1).fits
    t4 = parse_topology("t4")
    work = work.replace(dtype="float16", flash=False)
    assert not search(work, t4, batch=1).fits
    hint = advice(work, t4, batch=1)
    assert "--quantize int8" in hint
    assert "t4:2" in hint
    assert search(work.replace(quantize="int8"), t4, batch=1).fits


def test_70b_trains_on_a_v5e_pod() -> None:
    work = workload(preset("llama2-70b"), seq=4096)
    plan = search(work, parse_topology("v5e:16x16"), batch=256, remat="block")
    assert plan.fits
    assert not search(work, parse_topology("v5e:4x4"), batch=16, remat="block").fits


def test_the_search_returns_the_best_plan() -> None:
    work = workload(preset("llama2-13b"), seq=4096)
    topology = parse_topology("v5p:2x2x2")
    best = search(work, topology, batch=16)
    assert best.fits
    for mesh in meshes(work, 8):
        for remat in remats(work):
            plan = make_plan(work.replace(batch=16, remat=remat), topology, mesh)
            assert not plan.fits or best.cost <= plan.cost
