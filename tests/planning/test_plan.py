"""The planner: what it counts equals what arrays, tracing and compilers say."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import TINY
from support.programs import compile_decoding, needs_tpu_compiler

from llama_jax import plan
from llama_jax.bench.prefill import prefill_flops
from llama_jax.cli import command as cli
from llama_jax.config import PRESETS, LlamaConfig, parse_model, preset
from llama_jax.errors import MeshError
from llama_jax.model.cache import init_cache
from llama_jax.model.transformer import Llama, Transformer, apply
from llama_jax.params import count_params, flatten, param_shapes
from llama_jax.planning import memory, report, roofline, search
from llama_jax.planning.chips import CHIPS
from llama_jax.planning.memory import Workload, footprint
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.planning.topology import axis_bandwidths, local_topology, parse_topology
from llama_jax.runtime import MESH_AXES, TRAINING_RULES, DType, Remat, Runtime
from llama_jax.sharding import cache_shardings, make_mesh, param_shardings, parse_mesh

ONE = dict.fromkeys(MESH_AXES, 1)
MESHES = (
    "data=8",
    "fsdp=8",
    "data=2,tensor=4",  # two key/value heads for four chips: replicated
    "data=2,fsdp=2,tensor=2",
    "fsdp=2,sequence=2,tensor=2",
)
GROUPED = parse_model("L2,D512,N8,K4,F1408,V2048", 64)
COMPILER = 0.01
"""How far the formula's bytes may lie from the compiler's, which pads and schedules."""
COST_ANALYSIS = 0.02
"""How far XLA's operations may be from the products': norms, softmax, rotations."""

eight_devices = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)


def work(config: LlamaConfig = GROUPED, **choices: Any) -> Workload:
    fields: dict[str, Any] = {"task": "train", "batch": 8, "seq": 64}
    return Workload(config=config, **(fields | choices))


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    with pytest.raises(SystemExit) as exit:
        cli.run(plan.main, argv)
    out, err = capsys.readouterr()
    assert isinstance(exit.value.code, int)
    return exit.value.code, out, err


# Weights and cache.


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("name", PRESETS)
def test_weights_on_one_chip_are_the_parameters(
    name: str, dtype: DType, width: int
) -> None:
    config = preset(name)
    params = count_params(param_shapes(config, "stacked"))
    held = footprint(work(config, task="decode", batch=1, seq=8, dtype=dtype), ONE)
    assert held.weights == width * params
    trained = footprint(work(config, param_dtype=dtype), ONE)
    assert (trained.weights, trained.gradients) == (width * params,) * 2
    assert trained.optimizer == 2 * width * params


@eight_devices
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("changes", [{}, {"vocab_size": 97}, {"tied_embeddings": True}])
def test_weights_on_a_mesh_are_the_shards_that_are_placed(
    text: str, changes: dict[str, Any]
) -> None:
    config = TINY.replace(**changes)
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    shapes = flatten(param_shapes(config))
    training = Runtime(rules=TRAINING_RULES)
    places = flatten(param_shardings(config, training, mesh))
    numbers = sum(
        math.prod(places[path].shard_shape(leaf.shape)) for path, leaf in shapes.items()
    )
    held = footprint(work(config, batch=8, seq=16), dict(mesh.shape))
    assert held.weights == held.gradients == 4 * numbers
    assert held.optimizer == 8 * numbers


@eight_devices
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("batch", [1, 8])
def test_a_cache_is_counted_as_it_lies(text: str, batch: int) -> None:
    mesh = make_mesh(parse_mesh(text), jax.devices()[:8])
    decode = work(TINY, task="decode", batch=batch, seq=32, dtype="float32")
    cache = init_cache(TINY, batch, 32, jnp.float32)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert footprint(decode, ONE).cache == whole
    placed = jax.device_put(cache, cache_shardings(TINY, Runtime(), mesh, batch, 32))
    part = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed)
    )
    assert footprint(decode, dict(mesh.shape)).cache == part


def test_quantized_weights_take_a_byte_or_half_of_one_and_their_scales() -> None:
    decode = work(task="decode", batch=1, seq=8)
    shapes = flatten(param_shapes(GROUPED, "stacked"))
    inside = {p: leaf.shape for p, leaf in shapes.items() if p.endswith("_proj")}
    numbers = sum(map(math.prod, inside.values()))
    columns = sum(shape[0] * shape[2] for shape in inside.values())
    rest = 2 * (count_params(param_shapes(GROUPED)) - numbers)
    eight = footprint(decode.replace(quantize="int8"), ONE).weights
    assert eight == rest + numbers + 4 * columns
    four = footprint(decode.replace(quantize="int4"), ONE).weights
    assert four == rest + numbers // 2 + numbers // memory.INT4_GROUP * 2


def test_adapters_alone_have_gradients_and_moments() -> None:
    full = footprint(work(task="decode"), ONE).weights
    held = footprint(work(task="lora", rank=4), ONE)
    sizes = {"D": 512, "NH": 512, "KH": 256, "F": 1408}
    adapters = 2 * (2 * sizes["D"] + 2 * sizes["NH"])  # q and o
    adapters += 2 * 2 * (sizes["D"] + sizes["KH"])  # k and v
    adapters += 2 * 3 * (sizes["D"] + sizes["F"])
    assert held.gradients == 4 * 4 * adapters
    assert held.optimizer == 2 * held.gradients
    assert held.weights == full + held.gradients


# What the backward pass keeps.


def residual_bytes(config: LlamaConfig, remat: Remat, batch: int, seq: int) -> int:
    """What differentiating the model leaves, less the weights themselves."""
    runtime = Runtime(
        dtype="bfloat16",
        param_dtype="float32",
        layer_layout="stacked",
        remat=remat,
        attention="xla",
    )
    model = Transformer(config, runtime)
    params = param_shapes(config, "stacked")["transformer"]

    def backward(params: Any, tokens: Any) -> Any:
        return jax.vjp(lambda params: apply(model, params, tokens)[0], params)[1]

    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    left = jax.tree.leaves(jax.eval_shape(backward, params, tokens))
    held = {
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params) if leaf.ndim > 1
    }
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in left
        if (leaf.shape, leaf.dtype) not in held
    )


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_what_is_kept_of_a_layer_is_what_differentiation_leaves(remat: Remat) -> None:
    batch, seq = 2, 256
    few, many = GROUPED, GROUPED.replace(num_layers=6)
    found = residual_bytes(many, remat, batch, seq) - residual_bytes(
        few, remat, batch, seq
    )
    asked = work(few, batch=batch, seq=seq, flash=False)
    wanted = 4 * memory.kept_bytes(asked, ONE, remat)
    # Beside the large ones there are scales and sums of one number per token.
    assert wanted <= found <= 1.01 * wanted


def test_each_remat_keeps_less_than_the_last() -> None:
    kept = [memory.kept_bytes(work(), ONE, r) for r in ("none", "dots", "block")]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 8 * 64 * 512 * 2


# Properties.

sizes = st.sampled_from([1, 2, 4])


@given(
    data=sizes, fsdp=sizes, sequence=sizes, tensor=sizes, axis=st.sampled_from("abc")
)
def test_more_chips_never_hold_more_each(
    data: int, fsdp: int, sequence: int, tensor: int, axis: str
) -> None:
    mesh = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    name = {"a": "fsdp", "b": "tensor", "c": "data"}[axis]
    larger = mesh | {name: 2 * mesh[name]}
    for task in ("train", "lora", "decode"):
        asked = work(task=task, batch=64)
        before, after = footprint(asked, mesh), footprint(asked, larger)
        kinds = ["weights", "optimizer", "gradients", "activations"]
        # Key heads that the axis no longer divides are all on every chip.
        if larger["tensor"] <= asked.config.num_kv_heads:
            kinds.append("cache")
        for kind in kinds:
            assert getattr(after, kind) <= getattr(before, kind), (task, kind)


@given(
    seq=st.integers(1, 4096),
    more=st.integers(0, 4096),
    batch=st.integers(1, 64),
    remat=st.sampled_from(["none", "block", "dots"]),
    task=st.sampled_from(["train", "lora", "qlora", "decode"]),
    flash=st.booleans(),
)
def test_longer_rows_never_take_less(
    seq: int, more: int, batch: int, remat: Any, task: Any, flash: bool
) -> None:
    short = work(seq=seq, batch=batch, remat=remat, task=task, flash=flash)
    for kind, before, after in zip(
        memory.Footprint._fields,
        footprint(short, ONE),
        footprint(short.replace(seq=seq + more), ONE),
        strict=True,
    ):
        assert after >= before, kind


# Operations and times.


def test_operations_of_a_forward_pass_are_xlas() -> None:
    config = parse_model("L2,D512,N8,K4,F1408,V2048", 256)
    model = Llama(config, Runtime(attention="xla"))
    params = param_shapes(config)
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    compiled = jax.jit(apply, static_argnums=0).lower(model, params, tokens).compile()
    found = compiled.cost_analysis()
    assert found is not None
    wanted = roofline.forward_flops(config, 2, 256, causal=False)
    assert wanted == pytest.approx(found["flops"], rel=COST_ANALYSIS)
    assert roofline.train_flops(config, 2, 256) == 3 * roofline.forward_flops(
        config, 2, 256
    )


def test_operations_of_a_train_step_are_three_times_those_and_what_is_repeated() -> (
    None
):
    config = parse_model("L3,D512,N8,K4,F1408,V512", 128)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    forward = roofline.forward_flops(config, 2, 128, causal=False)
    head = 2 * 2 * 128 * 512 * 512  # the loss's backward pass computes logits again
    for remat, wanted in (("none", 3 * forward + head), ("block", None)):
        # Unrolled: of a loop's body XLA counts one turn, which the loss has here.
        model = Llama(config, Runtime(attention="xla", remat=remat))  # type: ignore[arg-type]

        def loss(params: Any, tokens: Any, model: Llama = model) -> Any:
            return jnp.sum(apply(model, params, tokens, tokens, method="losses"))

        lowered = jax.jit(jax.grad(loss)).lower(param_shapes(config), tokens)
        found = lowered.compile().cost_analysis()
        assert found is not None
        asked = work(config, batch=2, seq=128, remat=remat)
        # Of all pairs, as XLA's attention computes them, not of half.
        pairs = roofline.forward_flops(config, 2, 128, causal=False)
        pairs -= roofline.forward_flops(config, 2, 128)
        passes = 3 if remat == "none" else 4
        counted = roofline.chip_flops(asked, ONE) + passes * pairs
        assert wanted is None or counted == pytest.approx(wanted)
        # Remat spares down_proj, whose result nobody needs again.
        if remat == "block":
            counted -= 2 * 2 * 128 * config.num_layers * 1408 * 512
        assert counted == pytest.approx(found["flops"], rel=COST_ANALYSIS)


def test_operations_agree_with_the_benchmarks() -> None:
    head = 2 * GROUPED.embed_dim * GROUPED.vocab_size
    all_logits = roofline.forward_flops(GROUPED, 3, 50)
    assert all_logits - 3 * 49 * head == prefill_flops(GROUPED, 3, 50)


def test_chips_share_the_operations_that_a_mesh_divides() -> None:
    asked = work(batch=8, remat="none")
    alone = roofline.chip_flops(asked, ONE)
    logits = 2 * 8 * 64 * 512 * 2048  # computed again
    assert alone == roofline.train_flops(GROUPED, 8, 64) + logits
    mesh = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 4}
    assert roofline.chip_flops(asked, mesh) == alone / 32
    # A row for eight chips is computed by each of them.
    alone = roofline.chip_flops(work(batch=1), ONE)
    assert roofline.chip_flops(work(batch=1), {"data": 8}) == alone


def test_a_batch_of_one_is_limited_by_what_streams_from_memory() -> None:
    topology = parse_topology("v5e:1x1")
    asked = work(preset("llama2-7b"), task="decode", batch=1, seq=2048)
    found = search.plan(asked, topology, {})
    assert found.bound.limited_by == "memory bandwidth"
    read = found.held.weights + found.held.cache - 2 * 32000 * 4096
    assert found.bound.seconds == pytest.approx(read / 819e9)
    assert found.bound.interconnect_seconds == 0


def test_collectives_bring_what_the_mesh_splits() -> None:
    params = count_params(param_shapes(GROUPED))
    asked = work(remat="none", batch=8)
    data = roofline.interconnect_bytes(asked, {"data": 4})
    assert data["data"] == 2 * 3 / 4 * 4 * params
    fsdp = roofline.interconnect_bytes(asked, {"fsdp": 4})
    assert fsdp["fsdp"] == 3 / 4 * 3 * 2 * params
    tensor = roofline.interconnect_bytes(asked, {"tensor": 4})
    assert tensor["tensor"] == 2 * 3 / 4 * (4 * 2 + 1) * 8 * 64 * 512 * 2
    for axis, found in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        assert not any(nbytes for name, nbytes in found.items() if name != axis)


# Chips.


def test_topologies_are_read_and_written_alike() -> None:
    for text, chips in (("v5e:16x16", 256), ("v5p:4x4x4", 64), ("h100:2x8", 16)):
        assert parse_topology(text).chips == chips
        assert str(parse_topology(text)) == text
    assert parse_topology("h100:8").shape == (1, 8)
    assert parse_topology("t4").chips == parse_topology("v5p").chips == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v5x:2x2", "no chip is called 'v5x'; did you mean"),
        ("v5e:4", "'4' is not a shape of v5e; write v5e:4x4"),
        ("v5p:2x2", "write v5p:4x4x4"),
        ("v5e:0x4", "is not a shape"),
        ("h100:", "'' is not a shape of h100; write h100:8, or h100:2x8"),
        ("h100:2x2x2", "is not a shape"),
        ("t4:-1", "is not a shape"),
    ],
)
def test_a_topology_that_cannot_be_read_is_refused(text: str, reason: str) -> None:
    with pytest.raises(MeshError, match=reason) as caught:
        parse_topology(text)
    assert "\n" not in str(caught.value)


def test_an_axis_that_closes_a_ring_has_two_links() -> None:
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


def test_every_chip_says_what_it_is_good_at() -> None:
    for chip in CHIPS.values():
        assert chip.limit_bytes < chip.hbm_bytes
        assert chip.flops[chip.dtype] == max(chip.flops.values())
    assert CHIPS["t4"].dtype == "float16"
    assert CHIPS["v5e"].dtype == "bfloat16"


def test_this_machine_is_a_topology_too() -> None:
    found = local_topology()
    assert found.chips == len(jax.devices())
    if jax.default_backend() == "cpu":
        assert found.chip.dtype == "float32"
        assert (
            search.plan(work(TINY, batch=1), found, {"data": -1}).bound.seconds is None
        )


# What fits.


def test_seven_billion_fit_a_v5e_in_bfloat16_and_a_t4_in_eight_bits() -> None:
    asked = work(preset("llama2-7b"), task="decode", batch=1, seq=2048)
    assert search.search(asked, parse_topology("v5e:1x1"), batch=1).fits
    small = parse_topology("t4")
    asked = asked.replace(dtype="float16", flash=False)
    assert not search.search(asked, small, batch=1).fits
    hint = search.advice(asked, small, batch=1)
    assert "--quantize int8" in hint
    assert "t4:2" in hint
    assert search.search(asked.replace(quantize="int8"), small, batch=1).fits


def test_seventy_billion_train_on_a_v5e_pod() -> None:
    asked = work(preset("llama2-70b"), seq=4096)
    found = search.search(asked, parse_topology("v5e:16x16"))
    assert found.fits
    assert found.work.batch * 4096 >= 1 << 19
    assert not search.search(asked, parse_topology("v5e:4x4"), batch=16).fits


def test_what_is_chosen_is_the_best_of_all_meshes() -> None:
    asked = work(preset("llama2-13b"), seq=4096)
    topology = parse_topology("v5p:2x2x2")
    found = search.search(asked, topology, batch=16)
    assert found.fits
    for mesh in search.meshes(asked.config, asked.rules, 8):
        for remat in search.remats(asked):
            other = search.plan(asked.replace(batch=16, remat=remat), topology, mesh)
            assert not other.fits or found.rank <= other.rank


# The command.


def test_json_says_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "llama2-70b", "--topology", "v5e:16x16", "--task", "train")
    status, out, _ = run(capsys, *flags, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["fits"] is True
    assert set(found["bytes_per_chip"]) == set(memory.Footprint._fields)
    assert sum(found["bytes_per_chip"].values()) == found["total_bytes_per_chip"]
    assert found["total_bytes_per_chip"] <= found["limit_bytes"]
    assert math.prod(found["mesh"].values()) == found["chips"] == 256
    assert found["compiled"] is None
    tokens = found["tokens_per_second_bound"] * found["step_seconds_bound"]
    assert tokens == pytest.approx(found["batch"] * found["seq"])
    assert 0 < found["mfu_bound"] <= 1
    status, out, _ = run(capsys, *flags)
    assert "fits: " in out
    assert "limited by" in out


@pytest.mark.parametrize("task", ["train", "lora", "qlora", "decode"])
def test_every_task_is_planned_on_tpus_and_gpus(
    capsys: pytest.CaptureFixture[str], task: str
) -> None:
    for topology in ("v5e:2x4", "v5p:2x2x1", "h100:2x8", "l4:2"):
        flags = ("--topology", topology, "--task", task, "--json")
        status, out, _ = run(capsys, *flags)
        found = json.loads(out)
        assert (status, found["task"], found["topology"]) == (0, task, topology)
        assert found["quantize"] == ("int4" if task == "qlora" else "none")
        assert (found["advice"] is None) == found["fits"]


def test_what_does_not_fit_comes_with_what_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--model", "llama2-70b", "--topology", "v5e:2x4", "--batch", "1")
    status, out, _ = run(capsys, *flags, "--seq", "2048")
    assert status == 0
    assert "DOES NOT FIT" in out
    assert "--quantize int8; or --topology v5e:4x4, the smallest" in out


def test_without_a_topology_it_is_this_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = run(capsys, "--model", "L2,D32,N8,F48,V96", "--json")
    assert status == 0
    assert json.loads(out)["chips"] == len(jax.devices())


def test_a_checkpoints_own_configuration_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llama_jax.loading import bundled

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
        (("--task", "train", "--quantize", "int8"), "--task qlora"),
        (("--task", "qlora", "--quantize", "none"), "lora"),
        (("--remat", "block"), "no backward pass"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], reason: str
) -> None:
    status, out, err = run(capsys, *flags)
    assert (status, out) == (2, "")
    assert reason in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_table_has_every_preset_and_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = run(capsys, "--table")
    assert status == 0
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    rows = {row[0]: row[1:] for row in cells[2:]}
    assert list(rows) == list(PRESETS)
    heads = [head.split()[0] for head in cells[0][1:]]
    assert heads == [text for _, text in report.COMMON]
    found = dict(zip(heads, rows["llama2-7b"], strict=True))
    assert found["v5e:1x1"].startswith("bf16")
    assert found["t4"].startswith("int8")
    assert rows["llama2-70b"][heads.index("v5e:16x16")] == "bf16 · train"


# By the compiler's word.

# What libtpu 0.0.52 allotted (`memory_analysis`: temporaries, which hold the gradients
# and what is kept too, and arguments) for AdamW's step, bfloat16 on float32 weights,
# remat of blocks; where `tensor` cuts the stream between blocks, and where not.
# A compile takes one to five minutes.
ALLOTTED = (
    ("llama2-7b", 4, 8, "fsdp=8", 2_040_414_208, 0.01),
    ("llama2-7b", 8, 8, "fsdp=8", 2_782_494_720, 0.01),
    ("llama2-70b", 4, 256, "fsdp=16,tensor=16", 7_660_994_560, 0.1),
    ("llama2-70b", 2, 16, "fsdp=4,tensor=4", 3_923_918_848, 0.1),
)


@pytest.mark.parametrize(
    ("name", "layers", "batch", "mesh", "allotted", "near"), ALLOTTED
)
def test_trainings_temporaries_are_near_what_the_compiler_allotted(
    name: str, layers: int, batch: int, mesh: str, allotted: int, near: float
) -> None:
    config = preset(name).replace(num_layers=layers)
    held = footprint(work(config, batch=batch, seq=4096), parse_mesh(mesh))
    found = held.gradients + held.activations + held.temporaries
    assert found == pytest.approx(allotted, rel=near)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
def test_decodings_arguments_are_the_formulas_weights_and_cache() -> None:
    config = preset("llama2-7b").replace(num_layers=2)
    device = tpu_devices("v5e:2x2")[0]
    compiled = compile_decoding(
        "decode_step", config, batch=4, slots=2048, dtype="bfloat16", device=device
    )
    memory_of = compiled.memory_analysis()
    held = footprint(work(config, task="decode", batch=4, seq=2048), ONE)
    wanted = held.weights + held.cache
    assert memory_of.argument_size_in_bytes == pytest.approx(wanted, rel=COMPILER)
    assert memory_of.temp_size_in_bytes < 0.05 * wanted
