"""Plans of policy optimization: what its models store, and that a 7B recipe fits."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from support.commands import run_command
from support.programs import needs_tpu_compiler

from llama_jax import plan
from llama_jax.model.presets import preset
from llama_jax.planning.policy import PolicyWork, plan_policy, search_policy
from llama_jax.planning.policy_compiler import compile_policy
from llama_jax.planning.target_devices import target_devices
from llama_jax.planning.topology import parse_topology
from llama_jax.planning.workload import Workload
from llama_jax.rlhf.policy_config import PolicyConfig
from llama_jax.sharding import make_mesh
from llama_jax.train.state import state_shapes

run = functools.partial(run_command, plan.main)


@pytest.mark.parametrize(
    ("task", "topology", "models"),
    [
        ("ppo-lora", "v5e:2x4", {"base", "optimizer"}),
        ("ppo", "v5p:2x2x2", {"optimizer"}),
    ],
)
def test_seven_billion_parameters_fit_and_each_model_is_named(
    capsys: pytest.CaptureFixture[str], task: str, topology: str, models: set[str]
) -> None:
    flags = ("--task", task, "--topology", topology, "--batch", "64", "--json")
    status, out, _ = run(capsys, *flags)
    report = json.loads(out)
    assert (status, report["fits"], report["chips"]) == (0, True, 8)
    stored = report["bytes_per_chip_by_model"]
    four = {"policy", "reference", "critic", "reward model"}
    assert stored.keys() == four | models
    assert report["seconds_bound"].keys() == {"sample", "score", "update"}
    assert report["bytes_per_chip_by_phase"].keys() == {"sample", "score", "update"}
    if task == "ppo-lora":
        # The base once, in two bytes a number; the models besides are small.
        assert stored["base"] == pytest.approx(2 * 6.74e9 / 8, rel=0.01)
        assert sum(stored[name] for name in four) < stored["base"] / 4
    else:
        assert stored["policy"] == pytest.approx(4 * 6.74e9 / 8, rel=0.01)
        assert stored["optimizer"] == 2 * (stored["policy"] + stored["critic"])


def test_what_contradicts_an_iteration_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--task", "ppo", "--topology", "v5e:2x4")
    for more, words in (
        (("--max-new-tokens", "1024"), "leaves no room for a prompt"),
        (("--batch", "48"), "micro-batches must divide"),
    ):
        status, _, err = run(capsys, *flags, *more)
        assert status == 2
        assert words in err


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_the_moments_of_policy_and_critic_are_sharded_as_their_weights(
    estimator: str,
) -> None:
    mesh = make_mesh({"fsdp": len(jax.devices())})
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    leaf = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=split)
    names = ("policy", "critic") if estimator == "gae" else ("policy",)
    config = PolicyConfig(steps=1, num_samples=2, estimator=estimator)
    shapes = {name: {"x": leaf} for name in names}
    state = state_shapes(shapes, config.make_optimizer(1), mesh)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(names)
    assert all(moment.sharding == split for moment in moments)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_adapters_of_seven_billion_parameters_compile_on_eight_small_chips() -> None:
    update = Workload(config=preset("llama2-7b"), task="lora", batch=64, seq=1024)
    work = PolicyWork(update=update, sampled_rows=128)
    topology = parse_topology("v5e:2x4")
    planned = plan_policy(work, topology, {"tensor": 8})
    assert planned.fits
    assert search_policy(work, topology).total <= planned.limit_bytes
    compiled = compile_policy(planned, target_devices(topology))
    assert compiled.fits
    for name, nbytes in planned.stored.items():
        assert compiled.stored[name] == pytest.approx(nbytes, rel=0.01), name
    # The update needs no copy of the base.
    assert compiled.temporary["update"] == pytest.approx(
        planned.temporary["update"], rel=0.1
    )
