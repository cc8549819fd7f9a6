"""What the real compiler says of a workload on chips that need not be there."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from llama_jax.errors import MeshError
from llama_jax.kernels.dispatch import Implementation
from llama_jax.planning import hlo, hlo_costs, roofline
from llama_jax.planning.compiled import Compiled, CompiledBytes
from llama_jax.planning.gpu_target_config import multiprocessors, target_config
from llama_jax.planning.hlo_costs import Collective
from llama_jax.planning.programs import abstract_gpu, program, shard_bytes_of
from llama_jax.planning.search import Plan
from llama_jax.planning.target_devices import gpu_devices, tpu_devices
from llama_jax.planning.topology import Topology, axis_bandwidths
from llama_jax.runtime import MESH_AXES
from llama_jax.sharding import make_mesh

MOST_COMPILES = 4
"""How many plans are compiled before the last one's answer stands."""

_LESS = 0.95
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_OUT_OF_MEMORY = re.compile(r"Ran out of memory.*?(?:\.(?= [A-Z]|$)|$)")
_EXCEEDED = re.compile(r"Exceeded \w+ capacity by [\d.]+[KMGT]?")
_NEEDED = re.compile(r"(?:Used|temporaries \() ?([\d.]+)([KMGT]?)\)? (?:of|exceeds)")


def devices_of(topology: Topology, *, gpu_config: str | None = None) -> list[Any]:
    """The chips of a topology, as placements for a compiler.

    Args:
      topology: of TPUs or NVIDIA's GPUs.
      gpu_config: a GPU as text (`gpu_devices`); of the table if not given.

    Raises:
      MeshError: the compiler is not installed, or knows no such chips.
    """
    try:
        if topology.chip.links == "torus":
            return tpu_devices(str(topology))
        text = gpu_config or target_config(topology.chip)
        return gpu_devices("x".join(map(str, (1, *topology.shape))), text)
    except ImportError as error:
        raise MeshError(f"--compile for {topology}: {error}") from error


def compile_plan(
    found: Plan,
    devices: Sequence[Any],
    *,
    attention: Implementation | None = None,
) -> Compiled:
    """Ask the compiler of these devices about a plan.

    Args:
      found: work and mesh.
      devices: as many as the mesh has; they need not be there.
      attention: the implementation, if not what would be taken there.

    Raises:
      MeshError: the mesh does not divide the model.
    """
    work, topology = found.work, found.topology
    mesh = make_mesh(found.mesh, devices)
    began = time.perf_counter()
    built = program(work, mesh, attention=attention)
    kinds = {kind: shard_bytes_of(tree) for kind, tree in built.kinds.items()}
    with _lowering_for(topology, devices):
        lowered = built.lower()
    try:
        compiled = lowered.compile(_options(topology))
    except JaxRuntimeError as error:
        said = out_of_memory(str(error))
        if said is None:
            raise
        sentence, needed = said
        seconds = time.perf_counter() - began
        return Compiled(
            seconds=seconds,
            attention=built.attention,
            held=None,
            total=needed,
            limit=topology.chip.limit_bytes,
            out_of_memory=sentence,
            kernels=0,
            collectives=(),
            product_flops=0.0,
            compute_seconds=None,
            collective_seconds=None,
        )
    seconds = time.perf_counter() - began
    held = held_by(kinds, compiled.memory_analysis())
    text = hlo.parse(compiled.as_text())
    sent = hlo_costs.collectives(text, built.mesh)
    flops = hlo_costs.product_flops(text)
    if built.attention != "xla":
        flops += roofline.chip_attention_flops(work, found.mesh)
    peak = topology.chip.flops.get(work.dtype)
    return Compiled(
        seconds=seconds,
        attention=built.attention,
        held=held,
        total=sum(held),
        limit=topology.chip.limit_bytes,
        out_of_memory=None,
        kernels=hlo_costs.kernels(text),
        collectives=sent,
        product_flops=flops,
        compute_seconds=flops / peak if peak else None,
        collective_seconds=_seconds(sent, topology, found.mesh),
    )


def compile_first_that_fits(
    plans: Sequence[Plan], devices: Sequence[Any]
) -> list[tuple[Plan, Compiled]]:
    """Plans as they were tried; the last one fits, if any of the few that are tried.

    Behind one that does not fit those are passed over that hold hardly less by formula.
    """
    tried: list[tuple[Plan, Compiled]] = []
    most = math.inf
    for found in plans:
        if found.held.total > most:
            continue
        answer = compile_plan(found, devices)
        tried.append((found, answer))
        if answer.fits or len(tried) == MOST_COMPILES:
            break
        most = _LESS * found.held.total
    return tried


def held_by(kinds: Mapping[str, int], found: Any) -> CompiledBytes:
    """A compiler's numbers by kind; an argument that it drops is one of the batch's."""
    arguments = int(found.argument_size_in_bytes)
    more = arguments - sum(kinds.values())
    batch = kinds.get("batch", 0) + min(more, 0)
    return CompiledBytes(
        **{kind: kinds.get(kind, 0) for kind in ("weights", "optimizer", "cache")},
        batch=batch,
        padding=max(more, 0),
        temporaries=int(found.temp_size_in_bytes),
        outputs=max(
            int(found.output_size_in_bytes) - int(found.alias_size_in_bytes), 0
        ),
        code=int(found.generated_code_size_in_bytes),
    )


def _lowering_for(
    topology: Topology, devices: Sequence[Any]
) -> AbstractContextManager[Any]:
    if devices[0].platform not in ("cuda", "gpu") or devices[0] in jax.devices():
        return nullcontext()
    return abstract_gpu(devices[0].device_kind, multiprocessors(topology.chip).cores)


def _options(topology: Topology) -> dict[str, Any] | None:
    """What the compiler is told."""
    if topology.chip.links != "host":
        return None
    # Its time grows with the third power of unrolled layers (40 layers of 70B: 69 of
    # 103 s); bytes hardly change without it (24 layers: not at all).
    return {"xla_disable_hlo_passes": "multi_output_fusion"}


def out_of_memory(error: str) -> tuple[str, int | None] | None:
    """The compiler's sentence, and the bytes that it says it needed; None if it is of
    something else.
    """
    text = " ".join(error.split())
    found = _OUT_OF_MEMORY.search(text)
    if found is None:
        return None
    exceeded = _EXCEEDED.search(text, found.start())
    end = exceeded.end() if exceeded else found.end()
    sentence = text[found.start() : end].removesuffix(".")
    needed = _NEEDED.search(sentence)
    size = int(float(needed[1]) * _UNITS[needed[2]]) if needed else None
    return f"{sentence}.", size


def _seconds(
    sent: Sequence[Collective], topology: Topology, mesh: Mapping[str, int]
) -> float | None:
    """At the rate of the links; over several axes at that of the slowest."""
    rates = axis_bandwidths(topology, mesh)
    total = 0.0
    for one in sent:
        axes = [axis for axis in one.axes.split("+") if axis in MESH_AXES]
        rate = min((rates[axis] for axis in axes), default=0.0)
        if one.nbytes and not rate:
            return None
        total += one.nbytes / rate if rate else 0.0
    return total
