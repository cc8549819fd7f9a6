"""Compile a plan's program for chips that need not be present."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import jax
from jax.errors import JaxRuntimeError
from jax.stages import Compiled

from llama_jax.kernels import Implementation
from llama_jax.planning import hlo, hlo_costs
from llama_jax.planning.compiled import CompiledFootprint, CompiledPlan
from llama_jax.planning.flops import chip_attention_flops
from llama_jax.planning.gpu_target_config import multiprocessors
from llama_jax.planning.hlo_costs import Collective
from llama_jax.planning.programs import make_program, shard_bytes
from llama_jax.planning.search import Plan
from llama_jax.planning.target_devices import abstract_device
from llama_jax.planning.topology import Topology, axis_bandwidths
from llama_jax.runtime import MESH_AXES
from llama_jax.sharding import make_mesh

MAX_COMPILES = 4
"""Number of plans to compile at most, when none of them fits."""

_SMALLER = 0.95
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_OUT_OF_MEMORY = re.compile(r"Ran out of memory.*?(?:\.(?= [A-Z]|$)|$)")
_EXCEEDED = re.compile(r"Exceeded \w+ capacity by [\d.]+[KMGT]?")
_NEEDED = re.compile(r"(?:Used|temporaries \() ?([\d.]+)([KMGT]?)\)? (?:of|exceeds)")


def compile_plan(
    plan: Plan,
    devices: Sequence[jax.Device],
    *,
    attention: Implementation | None = None,
) -> CompiledPlan:
    """Compile the program of a plan.

    Args:
      plan: workload and mesh.
      devices: as many as the mesh has; they need not be present.
      attention: the implementation; by default what "auto" selects there.

    Raises:
      MeshError: the mesh does not divide the model.
    """
    work, topology = plan.work, plan.topology
    mesh = make_mesh(plan.mesh, devices)
    start = time.perf_counter()
    program = make_program(work, mesh, attention=attention)
    kinds = {kind: shard_bytes(tree) for kind, tree in program.kinds.items()}
    with _lowering_for(topology, devices):
        lowered = program.lower()
    try:
        compiled = lowered.compile(_compiler_options(topology))
    except JaxRuntimeError as error:
        out_of_memory = parse_out_of_memory(str(error))
        if out_of_memory is None:
            raise
        message, needed = out_of_memory
        seconds = time.perf_counter() - start
        return CompiledPlan(
            plan, seconds, program.attention, None, needed, out_of_memory=message
        )
    seconds = time.perf_counter() - start
    footprint = compiled_footprint(kinds, compiled)
    text = hlo.parse(compiled.as_text() or "")
    collectives = hlo_costs.collectives(text, program.mesh)
    flops = hlo_costs.product_flops(text)
    if program.attention != "xla":
        flops += chip_attention_flops(work, plan.mesh)
    peak = topology.chip.flops.get(work.dtype)
    return CompiledPlan(
        plan=plan,
        seconds=seconds,
        attention=program.attention,
        footprint=footprint,
        total=sum(footprint),
        kernels=hlo_costs.kernel_calls(text),
        collectives=collectives,
        product_flops=flops,
        compute_seconds=flops / peak if peak else None,
        collective_seconds=_collective_seconds(collectives, topology, plan.mesh),
    )


def compile_first_that_fits(
    plans: Sequence[Plan], devices: Sequence[jax.Device]
) -> list[CompiledPlan]:
    """Compile plans in order until one fits, at most `MAX_COMPILES`.

    After a plan that does not fit, skip plans that are hardly smaller by formula.

    Returns:
      All compiled plans; the last one fits, if any does.
    """
    tried: list[CompiledPlan] = []
    limit = math.inf
    for plan in plans:
        if plan.footprint.total > limit:
            continue
        tried.append(compile_plan(plan, devices))
        if tried[-1].fits or len(tried) == MAX_COMPILES:
            break
        limit = _SMALLER * plan.footprint.total
    return tried


def compiled_footprint(
    kinds: Mapping[str, int], compiled: Compiled
) -> CompiledFootprint:
    """Split the compiler's memory analysis by kind.

    Args:
      kinds: bytes of the program's arguments by kind.
      compiled: the program. Arguments that the compiler dropped are subtracted from
        those of the batch.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    extra = int(memory.argument_size_in_bytes) - sum(kinds.values())
    outputs = int(memory.output_size_in_bytes) - int(memory.alias_size_in_bytes)
    return CompiledFootprint(
        **{kind: kinds.get(kind, 0) for kind in ("weights", "optimizer", "cache")},
        batch=kinds.get("batch", 0) + min(extra, 0),
        padding=max(extra, 0),
        temporaries=int(memory.temp_size_in_bytes),
        outputs=max(outputs, 0),
        code=int(memory.generated_code_size_in_bytes),
    )


def _lowering_for(
    topology: Topology, devices: Sequence[jax.Device]
) -> AbstractContextManager[object]:
    if devices[0].platform not in ("cuda", "gpu") or devices[0] in jax.devices():
        return nullcontext()
    return abstract_device(
        devices[0].device_kind,
        num_cores=multiprocessors(topology.chip).cores,
        platform="cuda",
    )


def _compiler_options(topology: Topology) -> dict[str, str | bool] | None:
    if topology.chip.links != "host":
        return None
    # Its time grows with the third power of unrolled layers (40 layers of 70B: 69 of
    # 103 s); bytes hardly change without it (24 layers: not at all).
    return {"xla_disable_hlo_passes": "multi_output_fusion"}


def parse_out_of_memory(error: str) -> tuple[str, int | None] | None:
    """Extract the compiler's sentence and the bytes it needed, if it names them.

    None if the error has another cause.
    """
    text = " ".join(error.split())
    match = _OUT_OF_MEMORY.search(text)
    if match is None:
        return None
    exceeded = _EXCEEDED.search(text, match.start())
    end = exceeded.end() if exceeded else match.end()
    sentence = text[match.start() : end].removesuffix(".")
    needed = _NEEDED.search(sentence)
    size = int(float(needed[1]) * _UNITS[needed[2]]) if needed else None
    return f"{sentence}.", size


def _collective_seconds(
    collectives: Sequence[Collective], topology: Topology, mesh: Mapping[str, int]
) -> float | None:
    """Time without overlap; several axes run at the bandwidth of the slowest."""
    bandwidths = axis_bandwidths(topology, mesh)
    total = 0.0
    for collective in collectives:
        axes = [axis for axis in collective.axes.split("+") if axis in MESH_AXES]
        rate = min((bandwidths[axis] for axis in axes), default=0.0)
        if collective.nbytes and not rate:
            return None
        total += collective.nbytes / rate if rate else 0.0
    return total
