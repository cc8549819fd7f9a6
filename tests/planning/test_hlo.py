"""Communication and FLOPs read from a compiled program equal those of its source."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from support.workloads import eight_devices

from llama_jax.planning import hlo, hlo_costs
from llama_jax.runtime import MESH_AXES
from llama_jax.sharding import make_mesh

SIZES = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
TRIPS = 5


def collectives_of(
    function: Any, *shapes: tuple[int, ...]
) -> list[hlo_costs.Collective]:
    """The collectives of a function of local shards."""
    mesh = make_mesh(SIZES, jax.devices()[:8])
    whole = PartitionSpec()
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(whole,) * len(shapes),
        out_specs=whole,
        check_vma=False,
    )
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(mapped).lower(*inputs).compile().as_text()
    return hlo_costs.collectives(hlo.parse(text), SIZES)


def repeated(once: Any) -> Any:
    """A loop around a function, each trip fed from the last one."""

    def run(x: Any) -> Any:
        return jax.lax.scan(lambda x, _: (once(x), None), x, None, length=TRIPS)[0]

    return run


def gather(x: Any, axis: str) -> Any:
    return jnp.sin(jax.lax.all_gather(x, axis, axis=0, tiled=True))[: x.shape[0]]


@eight_devices
@pytest.mark.parametrize(
    ("once", "kind", "axes", "nbytes"),
    [
        (lambda x: jnp.sin(jax.lax.psum(x, "tensor")), "all-reduce", "tensor", 4096),
        (
            lambda x: jnp.sin(jax.lax.psum(x, ("fsdp", "tensor"))),
            "all-reduce",
            "fsdp+tensor",
            2 * 3 * 1024,
        ),
        (functools.partial(gather, axis="fsdp"), "all-gather", "fsdp", 4096),
        (
            lambda x: jnp.sin(jax.lax.ppermute(x, "sequence", [(0, 1), (1, 0)])),
            "collective-permute",
            "sequence",
            4096,
        ),
    ],
    ids=["psum", "psum of two axes", "gather", "ring"],
)
def test_collectives_in_a_loop_count_once_per_trip(
    once: Any, kind: str, axes: str, nbytes: int
) -> None:
    (collective,) = collectives_of(repeated(once), (32, 32))
    assert (collective.kind, collective.axes, collective.dtype) == (kind, axes, "f32")
    assert collective.times == TRIPS
    assert collective.nbytes == TRIPS * nbytes


@eight_devices
def test_a_reduce_scatter_receives_half_of_an_all_reduce() -> None:
    def scattered(x: Any) -> Any:
        return jax.lax.psum_scatter(x, "tensor", scatter_dimension=0, tiled=True)

    (collective,) = collectives_of(scattered, (32, 32))
    assert (collective.kind, collective.axes) == ("reduce-scatter", "tensor")
    assert collective.nbytes == 2048


def test_matrix_products_in_a_loop_count_once_per_trip() -> None:
    def run(x: Any, w: Any) -> Any:
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=TRIPS)[0]

    text = jax.jit(run).lower(jnp.ones((8, 64)), jnp.ones((64, 64))).compile().as_text()
    program = hlo.parse(text)
    assert hlo_costs.product_flops(program) == TRIPS * 2 * 8 * 64 * 64
    assert hlo_costs.kernel_calls(program) == 0


# As for TPUs: the trip count is in the condition only, products are convolutions, and
# an asynchronous collective is in three computations, one of them in an inner loop.
TPU = """HloModule jit_step, is_scheduled=true

%start (p.0: bf16[8,512]) -> (bf16[8,512], bf16[8,8192], u32[]) {
  %p.0 = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[8,8192]{1,0} all-gather(%p.0), channel_id=7, \
replica_groups=[16,16]<=[16,16]T(1,0), dimensions={1}, use_global_device_ids=true
  ROOT %custom-call.1 = (bf16[8,512]{1,0}, bf16[8,8192]{1,0}, u32[]{:S(2)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (p.1: bf16[8,512], p.2: bf16[16,64,32], p.3: bf16[32,8,1]) -> bf16[16,64,8] {
  %p.1 = bf16[8,512]{1,0} parameter(0)
  %p.2 = bf16[16,64,32]{2,1,0} parameter(1)
  %p.3 = bf16[32,8,1]{2,1,0} parameter(2)
  %all-gather.2 = bf16[8,8192]{1,0} all-gather(%p.1), channel_id=7, \
replica_groups=[16,16]<=[16,16]T(1,0), dimensions={1}, use_global_device_ids=true
  ROOT %convolution.1 = bf16[16,64,8]{2,1,0} convolution(%p.2, %p.3), \
window={size=1}, dim_labels=0bf_io0->0bf
}

%inner (w.0: (u32[], bf16[8,512])) -> (u32[], bf16[8,512]) {
  %w.0 = (u32[], bf16[8,512]{1,0}) parameter(0)
  %g.0 = u32[] get-tuple-element(%w.0), index=0
  %two = u32[] constant(2)
  %add.0 = u32[] add(%g.0, %two)
  %g.1 = bf16[8,512]{1,0} get-tuple-element(%w.0), index=1
  %x.0 = bf16[16,64,32]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %w.9 = bf16[32,8,1]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.1 = bf16[16,64,8]{2,1,0} fusion(%g.1, %x.0, %w.9), kind=kOutput, calls=%piece
  ROOT %t.0 = (u32[], /*index=1*/bf16[8,512]{1,0}) tuple(%add.0, %g.1)
}

%inner_condition (w.1: (u32[], bf16[8,512])) -> pred[] {
  %w.1 = (u32[], bf16[8,512]{1,0}) parameter(0)
  %eight = u32[]{:T(128)} constant(8)
  %g.2 = u32[] get-tuple-element(%w.1), index=0
  ROOT %less = pred[] compare(%g.2, %eight), direction=LT
}

%outer (w.2: (s32[], bf16[8,512])) -> (s32[], bf16[8,512]) {
  %w.2 = (s32[], bf16[8,512]{1,0}) parameter(0)
  %g.3 = s32[] get-tuple-element(%w.2), index=0
  %one = s32[] constant(1)
  %add.1 = s32[] add(%g.3, %one)
  %g.4 = bf16[8,512]{1,0} get-tuple-element(%w.2), index=1
  %fusion.2 = (bf16[8,512]{1,0}, bf16[8,8192]{1,0}, u32[]{:S(2)}) fusion(%g.4), \
kind=kCustom, calls=%start
  %zero = u32[] constant(0)
  %t.1 = (u32[], bf16[8,512]{1,0}) tuple(%zero, %g.4)
  %while.1 = (u32[], bf16[8,512]{1,0}) while(%t.1), condition=%inner_condition, \
body=%inner
  ROOT %t.2 = (s32[], bf16[8,512]{1,0}) tuple(%add.1, %g.4)
}

%outer_condition (w.3: (s32[], bf16[8,512])) -> pred[] {
  %w.3 = (s32[], bf16[8,512]{1,0}) parameter(0)
  %eighty = s32[]{:T(128)} constant(80)
  %g.5 = s32[] get-tuple-element(%w.3), index=0
  ROOT %more = pred[] compare(%eighty, %g.5), direction=GT
}

ENTRY %main (a.0: bf16[8,512]) -> bf16[8,512] {
  %a.0 = bf16[8,512]{1,0} parameter(0)
  %none = s32[] constant(0)
  %t.3 = (s32[], bf16[8,512]{1,0}) tuple(%none, %a.0)
  %while.2 = (s32[], bf16[8,512]{1,0}) while(%t.3), condition=%outer_condition, \
body=%outer
  ROOT %out = bf16[8,512]{1,0} get-tuple-element(%while.2), index=1
}
"""
POD = {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 16}


def test_trip_counts_of_a_tpu_program_are_read_from_its_conditions() -> None:
    runs = hlo.parse(TPU).runs()
    assert runs["outer"] == 80
    assert runs["inner"] == runs["piece"] == 80 * 4
    assert runs["start"] == 80


def test_an_asynchronous_collective_counts_once() -> None:
    (collective,) = hlo_costs.collectives(hlo.parse(TPU), POD)
    assert (collective.kind, collective.axes, collective.dtype) == (
        "all-gather",
        "fsdp",
        "bf16",
    )
    assert (collective.times, collective.nbytes) == (80, 80 * 15 * 8 * 512 * 2)


def test_convolution_flops_do_not_count_padding() -> None:
    assert hlo_costs.product_flops(hlo.parse(TPU)) == 80 * 4 * 2 * 16 * 64 * 32 * 8
    # A window padded at both ends: at 7 offsets each of 4 taps meets 4 elements.
    padded = (
        "ENTRY %main (a: bf16[16,4096,2,8192,1]) -> bf16[16,4096,4,128,1] {\n"
        "  %a = bf16[16,4096,2,8192,1]{4,3,2,1,0} parameter(0)\n"
        "  %b = bf16[4,128,2,8192,1]{4,3,2,1,0} parameter(1)\n"
        "  ROOT %c = bf16[16,4096,4,128,1]{4,3,2,1,0} convolution(%a, %b), "
        "window={size=1x4x2 pad=0_0x3_3x0_0 rhs_reversal=0x1x0}, "
        "dim_labels=0b2f1_1o2i0->0b1f2\n}\n"
    )
    expected = 2 * 16 * 4096 * (2 * 8192) * (4 * 128)
    assert hlo_costs.product_flops(hlo.parse(padded)) == expected


@pytest.mark.parametrize(
    ("groups", "size", "axes"),
    [
        ("replica_groups=[16,16]<=[256]", 16, "tensor"),
        ("replica_groups=[16,16]<=[16,16]T(1,0)", 16, "fsdp"),
        ("replica_groups=[1,256]<=[256]", 256, "fsdp+tensor"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4, "tensor"),
        ("replica_groups={{0,16},{1,17}}", 2, "fsdp"),
        ("replica_groups={}", 256, "fsdp+tensor"),
        (
            "replica_groups=mesh['data'=1,'fsdp'=16,'sequence'=1,'tensor'=16] {'fsdp'}",
            16,
            "fsdp",
        ),
    ],
)
def test_replica_groups_are_named_by_their_mesh_axes(
    groups: str, size: int, axes: str
) -> None:
    text = (
        "ENTRY %main (a: f32[16]) -> f32[16] {\n"
        "  %a = f32[16]{0} parameter(0)\n"
        f"  ROOT %r = f32[16]{{0}} all-reduce(%a), channel_id=1, {groups}, "
        "use_global_device_ids=true, to_apply=%add\n}\n"
    )
    (collective,) = hlo_costs.collectives(hlo.parse(text), POD)
    assert collective.axes == axes
    assert collective.nbytes == pytest.approx(2 * 64 * (size - 1) / size)


@eight_devices
def test_a_mesh_has_its_axes_in_the_order_of_replica_groups() -> None:
    mesh = make_mesh(SIZES, jax.devices()[:8])
    assert tuple(mesh.shape) == MESH_AXES == tuple(SIZES)
