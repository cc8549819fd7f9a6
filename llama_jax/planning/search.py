"""Whether work fits chips, on which mesh it is fastest, and what to change if not."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

from llama_jax.config import LlamaConfig
from llama_jax.errors import MeshError
from llama_jax.planning.chips import DEFAULT_GPU_FRACTION
from llama_jax.planning.memory import Footprint, Workload, footprint, shards
from llama_jax.planning.roofline import Bound, bound
from llama_jax.planning.topology import Topology
from llama_jax.runtime import MESH_AXES, Remat, Rules

MOST_TRAINED_TOKENS = 4 << 20
"""Of a step whose batch is searched for: Llama 2's, 4M (arXiv:2307.09288, 2.2)."""

MOST_ROWS = 1024
"""Of decoding whose batch is searched for."""


class Plan(NamedTuple):
    """Work on a mesh of chips: what it takes and how fast it could be.

    Attributes:
      work: all choices made.
      topology: the chips.
      mesh: sizes by axis.
      held: bytes on each chip.
      bound: the least time of a step.
    """

    work: Workload
    topology: Topology
    mesh: Mapping[str, int]
    held: Footprint
    bound: Bound

    @property
    def limit_bytes(self) -> int:
        """What a chip can hold."""
        return self.topology.chip.limit_bytes

    @property
    def fits(self) -> bool:
        """Whether each chip holds its part."""
        return self.held.total <= self.limit_bytes

    @property
    def raises_fraction(self) -> bool:
        """Whether jax must be told to take more of a GPU than it does by itself."""
        chip = self.topology.chip
        return chip.is_gpu and self.held.total > DEFAULT_GPU_FRACTION * chip.hbm_bytes

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: seconds per token if links wait for the rest, then bytes.

        Where a chip's speed is not known bytes alone decide.
        """
        times = self.bound.known
        if not times:
            return 0.0, float(self.held.total)
        links = times["interconnect"]
        busy = max(times["compute"], times["memory bandwidth"])
        return (links + busy) / self.bound.tokens, float(self.held.total)


def plan(work: Workload, topology: Topology, mesh: Mapping[str, int]) -> Plan:
    """What the work takes on this mesh.

    Args:
      work: all choices made.
      topology: the chips.
      mesh: sizes by axis; one may be -1, for the chips that are left.

    Raises:
      MeshError: the mesh has another number of chips, or does not divide the model.
    """
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
    held = footprint(work, sizes)
    return Plan(work, topology, sizes, held, bound(work, topology, sizes, held))


def meshes(config: LlamaConfig, rules: Rules, chips: int) -> list[dict[str, int]]:
    """Every mesh of so many chips that divides the model."""
    return [dict(zip(MESH_AXES, s, strict=True)) for s in _meshes(config, rules, chips)]


@functools.lru_cache(maxsize=256)
def _meshes(
    config: LlamaConfig, rules: Rules, chips: int
) -> tuple[tuple[int, ...], ...]:
    found = []
    for sizes in _factors(chips, len(MESH_AXES)):
        try:
            shards(config, rules, sizes)
        except MeshError:
            continue
        found.append(sizes)
    return tuple(found)


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many."""
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, parts - 1):
                yield (first, *rest)


def remats(work: Workload) -> Sequence[Remat]:
    """What there is to choose from: nothing where nothing is differentiated."""
    return get_args(Remat) if work.trains else ("none",)


def batches(work: Workload) -> list[int]:
    """Batches to try, largest first."""
    most = MOST_ROWS
    if work.task != "decode":
        most = max(MOST_TRAINED_TOKENS // work.seq, 1)
    return [1 << n for n in reversed(range(most.bit_length()))]


def search(
    work: Workload,
    topology: Topology,
    *,
    batch: int | None = None,
    remat: Remat | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """The plan with the least time per token that fits, or the nearest to fitting.

    Args:
      work: whose batch and remat stand for what is not searched.
      topology: the chips.
      batch: rows of the whole mesh; the best power of two where not given.
      remat: the best where not given.
      mesh: sizes by axis; the best where not given.

    Raises:
      MeshError: the given mesh is not one of these chips, or no mesh of so many chips
        divides the model.
    """
    if mesh is None:
        tried = meshes(work.config, work.rules, topology.chips)
    else:
        tried = [dict(mesh)]
    if not tried:
        raise MeshError(f"no mesh of {topology.chips} chips divides this model")
    rows = batches(work) if batch is None else [batch]
    best: Plan | None = None
    nearest: Plan | None = None
    for sizes in tried:
        for kept in remats(work) if remat is None else [remat]:
            for count in rows:  # a larger batch never takes longer per token
                chosen = work.replace(batch=count, remat=kept)
                found = plan(chosen, topology, sizes)
                if found.fits:
                    if best is None or found.rank < best.rank:
                        best = found
                    break
            if nearest is None or found.held.total < nearest.held.total:
                nearest = found
    assert nearest is not None
    return best or nearest


def ranked(
    work: Workload,
    topology: Topology,
    *,
    batch: int | None = None,
    remat: Remat | None = None,
    mesh: Mapping[str, int] | None = None,
) -> list[Plan]:
    """All plans that fit, best first; the nearest to fitting where none does.

    Args:
      work: as of `search`, and all that follows.
      topology: the chips.
      batch: rows of the whole mesh, if there is no choice.
      remat: if there is no choice.
      mesh: sizes by axis, if there is no choice.

    Raises:
      MeshError: as `search`.
    """
    best = search(work, topology, batch=batch, remat=remat, mesh=mesh)
    if not best.fits:
        return [best]
    tried = meshes(work.config, work.rules, topology.chips) if mesh is None else [mesh]
    plans = [
        plan(work.replace(batch=count, remat=kept), topology, sizes)
        for sizes in tried
        for kept in (remats(work) if remat is None else [remat])
        for count in (batches(work) if batch is None else [batch])
    ]
    return sorted((p for p in plans if p.fits), key=lambda found: found.rank)


def fits_somehow(work: Workload, topology: Topology) -> bool:
    """Whether any mesh and remat fit, at the smallest batch that fills the mesh."""
    for mesh in meshes(work.config, work.rules, topology.chips):
        rows = mesh["data"] * mesh["fsdp"] if work.trains else 1
        chosen = work.replace(batch=rows, remat="block" if work.trains else "none")
        if footprint(chosen, mesh).total <= topology.chip.limit_bytes:
            return True
    return False


def advice(work: Workload, topology: Topology, *, batch: int | None = None) -> str:
    """A sentence that says what to change where nothing fits.

    Args:
      work: that does not fit.
      topology: these chips.
      batch: rows that were asked for; the fewest where any would do.
    """
    rows = batch or 1
    changes: list[tuple[str, Workload]] = []
    if not work.trains:
        stages = ("none", "int8", "int4")
        narrower = {"none": 1, "int8": 2}.get(work.quantize, 3)
        for kind in stages[narrower:]:
            changes.append((f"--quantize {kind}", work.replace(quantize=kind)))
        if work.cache_dtype is None:
            small = work.replace(cache_dtype="int8")
            both = [
                (f"{flag} --cache-dtype int8", changed.replace(cache_dtype="int8"))
                for flag, changed in changes
            ]
            changes += [("--cache-dtype int8", small), *both]
    if work.task == "train":
        changes.append(("--task lora", work.replace(task="lora")))
    if work.task in ("train", "lora"):
        small = work.replace(task="qlora", quantize="int4")
        changes.append(("--task qlora", small))
    options = []
    for flag, changed in changes:
        if search(changed, topology, batch=rows).fits:
            options.append(flag)
            break
    if rows > 1 and (fewer := _most_rows(work, topology, rows)):
        options.append(f"--batch {fewer}")
    for larger in topology.larger():
        if not meshes(work.config, work.rules, larger.chips):
            continue
        if search(work, larger, batch=rows).fits:
            options.append(f"--topology {larger}, the smallest of its kind that fits")
            break
    if not options:
        return (
            f"No slice of {topology.chip.name} holds this; try a shorter --seq or "
            "a smaller model"
        )
    return "What would fit: " + "; or ".join(options)


def _most_rows(work: Workload, topology: Topology, rows: int) -> int | None:
    """The largest power of two below the asked batch that fits."""
    for count in (1 << n for n in reversed(range((rows - 1).bit_length()))):
        if search(work, topology, batch=count).fits:
            return count
    return None
