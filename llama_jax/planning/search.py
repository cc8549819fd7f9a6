"""Search for the fastest plan that fits, and advice if nothing does."""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

from llama_jax.config import LlamaConfig
from llama_jax.errors import MeshError
from llama_jax.planning.chips import DEFAULT_GPU_FRACTION
from llama_jax.planning.memory import Footprint, footprint
from llama_jax.planning.roofline import Bound, roofline
from llama_jax.planning.topology import Topology
from llama_jax.planning.workload import Workload, shards_on
from llama_jax.runtime import MESH_AXES, Remat, Rules

MAX_TRAIN_TOKENS = 4 << 20
"""Largest step when the batch is searched: Llama 2's, 4M (arXiv:2307.09288, 2.2)."""

MAX_DECODE_ROWS = 1024
"""Largest batch of decoding when the batch is searched."""


class Plan(NamedTuple):
    """A workload on a mesh of chips, with its memory and its lower bound of time.

    Attributes:
      work: the workload, with all choices made.
      topology: the chips.
      mesh: sizes by axis.
      footprint: bytes on each chip.
      bound: lower bound of the time of a step.
    """

    work: Workload
    topology: Topology
    mesh: Mapping[str, int]
    footprint: Footprint
    bound: Bound

    @property
    def limit_bytes(self) -> int:
        """Memory of a chip that a program can use."""
        return self.topology.chip.limit_bytes

    @property
    def fits(self) -> bool:
        """Whether the footprint is within the limit."""
        return self.footprint.total <= self.limit_bytes

    @property
    def exceeds_default_fraction(self) -> bool:
        """Whether it needs more of a GPU's memory than jax allocates by default."""
        chip = self.topology.chip
        default = DEFAULT_GPU_FRACTION * chip.hbm_bytes
        return chip.is_gpu and self.footprint.total > default

    @property
    def cost(self) -> tuple[float, float]:
        """Sort key: seconds per token without overlap of communication, then bytes.

        Bytes alone if the chip's rates are unknown.
        """
        times = self.bound.times
        if not times:
            return 0.0, float(self.footprint.total)
        busy = max(times["compute"], times["memory bandwidth"])
        seconds = times["interconnect"] + busy
        return seconds / self.bound.tokens, float(self.footprint.total)

    def mfu(self, seconds: float | None) -> float | None:
        """Model FLOPs utilization of all chips if a step takes so many seconds.

        None if the time or the chip's peak is unknown.
        """
        peak = self.topology.chip.flops.get(self.work.dtype)
        if not peak or not seconds:
            return None
        return self.bound.model_flops / (self.topology.chips * peak * seconds)


def make_plan(work: Workload, topology: Topology, mesh: Mapping[str, int]) -> Plan:
    """Plan a workload on one mesh.

    Args:
      work: the workload, with all choices made.
      topology: the chips.
      mesh: sizes by axis; one may be -1, which takes the remaining chips.

    Raises:
      MeshError: the mesh has another number of chips, or does not divide the model.
    """
    sizes = _mesh_on(topology, mesh)
    return _plan(work, topology, sizes, footprint(work, sizes))


def _mesh_on(topology: Topology, mesh: Mapping[str, int]) -> dict[str, int]:
    """All sizes of a mesh, -1 resolved."""
    sizes = {axis: mesh.get(axis, 1) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(topology.chips // fixed, 1)
    if math.prod(sizes.values()) != topology.chips:
        wanted = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise MeshError(
            f"mesh {wanted} needs {math.prod(sizes.values())} chips, but {topology} "
            f"has {topology.chips}"
        )
    return sizes


def _plan(
    work: Workload, topology: Topology, mesh: Mapping[str, int], memory: Footprint
) -> Plan:
    bound = roofline(work, topology, mesh, memory)
    return Plan(work, topology, mesh, memory, bound)


def meshes(work: Workload, chips: int) -> list[dict[str, int]]:
    """Every mesh of this many chips that divides the model."""
    sizes_of_meshes = _mesh_sizes(work.config, work.rules, chips)
    return [dict(zip(MESH_AXES, sizes, strict=True)) for sizes in sizes_of_meshes]


@functools.lru_cache(maxsize=256)
def _mesh_sizes(config: LlamaConfig, rules: Rules, chips: int) -> list[tuple[int, ...]]:
    divisors = []
    for sizes in _factorizations(chips, len(MESH_AXES)):
        with contextlib.suppress(MeshError):  # it does not divide the model
            shards_on(config, rules, sizes)
            divisors.append(sizes)
    return divisors


def _factorizations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as an ordered product of this many factors."""
    if factors == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorizations(number // first, factors - 1):
                yield (first, *rest)


def remats(work: Workload) -> Sequence[Remat]:
    """Choices of remat; only "none" without a backward pass."""
    return get_args(Remat) if work.trains else ("none",)


def batches(work: Workload) -> list[int]:
    """Batches to try: powers of two, largest first."""
    most = MAX_DECODE_ROWS
    if work.task != "decode":
        most = max(MAX_TRAIN_TOKENS // work.seq, 1)
    return [1 << n for n in reversed(range(most.bit_length()))]


def search(
    work: Workload,
    topology: Topology,
    *,
    batch: int | None = None,
    remat: Remat | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """Find the plan with the least time per token that fits, else the smallest plan.

    Args:
      work: the workload; its batch and remat are replaced.
      topology: the chips.
      batch: rows of the whole mesh; if None, search powers of two.
      remat: if None, search all.
      mesh: sizes by axis; if None, search all.

    Raises:
      MeshError: `mesh` does not match the chips, or no mesh divides the model.

    >>> from llama_jax import preset
    >>> from llama_jax.planning.topology import parse_topology
    >>> work = Workload(config=preset("llama2-7b"), task="train", batch=8, seq=4096)
    >>> plan = search(work, parse_topology("v5e:4x4"), batch=16)
    >>> plan.fits, {axis: size for axis, size in plan.mesh.items() if size > 1}
    (True, {'fsdp': 16})
    """
    rows = batches(work) if batch is None else [batch]
    best: Plan | None = None
    smallest: tuple[int, Workload, Mapping[str, int]] | None = None
    for sizes, policy in itertools.product(
        _meshes_to_try(work, topology, mesh), remats(work) if remat is None else [remat]
    ):
        for count in rows:  # a larger batch never takes longer per token
            candidate = work.replace(batch=count, remat=policy)
            memory = footprint(candidate, sizes)
            if memory.total <= topology.chip.limit_bytes:
                plan = _plan(candidate, topology, sizes, memory)
                if best is None or plan.cost < best.cost:
                    best = plan
                break
        if smallest is None or memory.total < smallest[0]:
            smallest = memory.total, candidate, sizes
    assert smallest is not None
    return best or make_plan(smallest[1], topology, smallest[2])


def ranked_plans(
    work: Workload,
    topology: Topology,
    *,
    batch: int | None = None,
    remat: Remat | None = None,
    mesh: Mapping[str, int] | None = None,
) -> list[Plan]:
    """Return all plans that fit, best first; if none does, the smallest plan.

    Args and raises as `search`.
    """
    best = search(work, topology, batch=batch, remat=remat, mesh=mesh)
    if not best.fits:
        return [best]
    plans = [
        make_plan(work.replace(batch=count, remat=policy), topology, sizes)
        for sizes in _meshes_to_try(work, topology, mesh)
        for policy in (remats(work) if remat is None else [remat])
        for count in (batches(work) if batch is None else [batch])
    ]
    return sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.cost)


def _meshes_to_try(
    work: Workload, topology: Topology, mesh: Mapping[str, int] | None
) -> Sequence[Mapping[str, int]]:
    if mesh is not None:
        return [_mesh_on(topology, mesh)]
    candidates = meshes(work, topology.chips)
    if not candidates:
        raise MeshError(
            f"topology {topology}: no mesh of {topology.chips} chips divides this "
            "model; choose another number of chips"
        )
    return candidates


def can_fit(work: Workload, topology: Topology) -> bool:
    """Whether any mesh and remat fit, with the smallest batch that fills the mesh."""
    for mesh in meshes(work, topology.chips):
        rows = mesh["data"] * mesh["fsdp"] if work.trains else 1
        chosen = work.replace(batch=rows, remat="block" if work.trains else "none")
        if footprint(chosen, mesh).total <= topology.chip.limit_bytes:
            return True
    return False


def advice(work: Workload, topology: Topology, *, batch: int | None = None) -> str:
    """Say in one sentence what to change when nothing fits.

    Args:
      work: the workload that does not fit.
      topology: the chips.
      batch: the required batch; 1 if None.
    """
    rows = batch or 1
    options = []
    for flags, changed in _smaller_variants(work):
        if search(changed, topology, batch=rows).fits:
            options.append(flags)
            break
    if rows > 1 and (fewer := _largest_batch(work, topology, rows)):
        options.append(f"--batch {fewer}")
    for larger in topology.larger():
        if meshes(work, larger.chips) and search(work, larger, batch=rows).fits:
            options.append(f"--topology {larger}, the smallest of its kind that fits")
            break
    if not options:
        return (
            f"No slice of {topology.chip.name} holds this; try a shorter --seq or "
            "a smaller model"
        )
    return "What would fit: " + "; or ".join(options)


def _smaller_variants(work: Workload) -> Iterator[tuple[str, Workload]]:
    """Variants of a workload that take less memory, with their flags."""
    if work.task == "train":
        yield "--task lora", work.replace(task="lora")
    if work.task in ("train", "lora"):
        yield "--task qlora", work.replace(task="qlora", quantize="int4")
    if work.trains:
        return
    stages = ("none", "int8", "int4")
    narrower = {"none": 1, "int8": 2}.get(work.quantize, 3)
    quantized = [
        (f"--quantize {kind}", work.replace(quantize=kind))
        for kind in stages[narrower:]
    ]
    yield from quantized
    if work.cache_dtype is None:
        yield "--cache-dtype int8", work.replace(cache_dtype="int8")
        for flag, changed in quantized:
            yield f"{flag} --cache-dtype int8", changed.replace(cache_dtype="int8")


def _largest_batch(work: Workload, topology: Topology, rows: int) -> int | None:
    """The largest power of two below `rows` that fits."""
    for count in (1 << n for n in reversed(range((rows - 1).bit_length()))):
        if search(work, topology, batch=count).fits:
            return count
    return None
