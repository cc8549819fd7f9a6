"""Lower bounds of step time: FLOPs, memory traffic, and traffic between chips.

No program is faster than its matrix products at the chip's peak rate, its necessary
reads and writes of memory, or its necessary traffic over the links. If all three
overlap, a step takes the longest of them; without overlap, their sum.
"""

from collections.abc import Mapping
from typing import NamedTuple

from llama_jax.params import LAYERS
from llama_jax.planning.flops import chip_flops, step_flops
from llama_jax.planning.memory import Footprint, layer_weight_bytes, num_trained
from llama_jax.planning.topology import Topology, axis_bandwidths
from llama_jax.planning.workload import (
    EMBEDDING,
    Workload,
    layer_shards,
    local_sizes,
    stored_bytes,
    weight_shards,
)
from llama_jax.runtime import MESH_AXES


class Bound(NamedTuple):
    """Lower bound of the time of a step: one batch of training, or one token per row.

    Attributes:
      model_flops: of the step on all chips, without recomputation.
      chip_flops: of one chip, with recomputation.
      compute_seconds: of one chip's FLOPs at its peak; None if that is unknown.
      hbm_seconds: of one chip's memory traffic; None if its bandwidth is unknown.
      interconnect_seconds: of what one chip receives; None if a bandwidth is unknown.
      interconnect_bytes: received by each chip, by mesh axis.
      tokens: of a step.
    """

    model_flops: float
    chip_flops: float
    compute_seconds: float | None
    hbm_seconds: float | None
    interconnect_seconds: float | None
    interconnect_bytes: Mapping[str, float]
    tokens: int

    @property
    def times(self) -> dict[str, float]:
        """Seconds by resource; empty if one of them is unknown."""
        times = {
            "compute": self.compute_seconds,
            "memory bandwidth": self.hbm_seconds,
            "interconnect": self.interconnect_seconds,
        }
        known = {name: time for name, time in times.items() if time is not None}
        return known if len(known) == len(times) else {}

    @property
    def seconds(self) -> float | None:
        """Time of a step in which everything overlaps."""
        return max(self.times.values(), default=None)

    @property
    def seconds_no_overlap(self) -> float | None:
        """Time of a step in which nothing overlaps."""
        return sum(self.times.values()) if self.times else None

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput of all chips if everything overlaps."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def limited_by(self) -> str | None:
        """The resource that takes longest."""
        return max(self.times, key=lambda name: self.times[name], default=None)


def roofline(
    work: Workload, topology: Topology, mesh: Mapping[str, int], footprint: Footprint
) -> Bound:
    """Compute the lower bound of a step's time on these chips.

    Args:
      work: on the whole mesh.
      topology: the chips.
      mesh: sizes by axis.
      footprint: memory of each chip (`memory.footprint`).

    Raises:
      MeshError: a mesh axis does not divide the weight axis that it splits.
    """
    chip = topology.chip
    received = interconnect_bytes(work, mesh)
    bandwidths = axis_bandwidths(topology, mesh)
    interconnect: float | None = 0.0
    for axis, nbytes in received.items():
        if nbytes and interconnect is not None:
            rate = bandwidths[axis]
            interconnect = interconnect + nbytes / rate if rate else None
    peak, hbm = chip.flops.get(work.dtype), chip.hbm_bandwidth
    flops = chip_flops(work, mesh)
    return Bound(
        model_flops=step_flops(work),
        chip_flops=flops,
        compute_seconds=flops / peak if peak else None,
        hbm_seconds=hbm_bytes(work, mesh, footprint) / hbm if hbm else None,
        interconnect_seconds=interconnect,
        interconnect_bytes=received,
        tokens=work.batch * work.queries,
    )


def hbm_bytes(work: Workload, mesh: Mapping[str, int], footprint: Footprint) -> float:
    """Count the bytes that a chip must at least read and write in a step.

    Decoding: the weights (one row of the embedding per token) and the whole cache.
    Training: each layer's weights in every pass, residuals written and read, and the
    optimizer's pass over weights, gradients and moments. Other activations are left
    out: a perfect program would not write them.
    """
    shards = weight_shards(work, mesh)
    gathered = work.config.num_layers * layer_weight_bytes(work, mesh)
    if not work.trains:
        unread = 0
        if not work.config.tied_embeddings:
            unread = stored_bytes(work, shards[EMBEDDING], shards[EMBEDDING].size)
        stored = sum(
            stored_bytes(work, shard, shard.size) for shard in layer_shards(work, mesh)
        )
        # A gathered layer is written once and read once, instead of its own part.
        extra = 2 * gathered - stored if gathered > stored else 0
        return footprint.weights - unread + extra + footprint.cache
    passes = {"none": 2, "dots": 2, "block": 3}[work.remat]
    if work.task == "train":
        passes += 1  # a gradient of each weight is written, as wide
    head = shards[EMBEDDING if work.config.tied_embeddings else "lm_head"].gathered
    read = passes * gathered
    read += (4 if work.task == "train" else 3) * head * work.itemsize
    # Adapters are as wide as their gradients.
    trained = footprint.weights if work.task == "train" else footprint.gradients
    updated = trained + footprint.optimizer + footprint.gradients
    return read + 2 * footprint.activations + 2 * updated


def interconnect_bytes(work: Workload, mesh: Mapping[str, int]) -> dict[str, float]:
    """Count the bytes that each chip receives in a step, by axis; rings of n chips.

    fsdp      weights, in `dtype`, for the forward and again for the backward pass;
              gradients of training, reduce-scattered; (n - 1)/n of the bytes of each
    data      gradients of a chip's shard, all-reduced: 2 (n - 1)/n
    sequence  keys and values of the other tokens in every pass; in training, which
              splits weights over it too, its part of the fsdp traffic
    tensor    the stream, all-reduced after o_proj and down_proj in each pass, and
              after the embedding
    """
    config, width = work.config, work.itemsize
    sizes = {axis: mesh.get(axis, 1) for axis in MESH_AXES}
    shards, local = weight_shards(work, mesh), local_sizes(work, mesh)

    def others(axis: str) -> float:
        return (sizes[axis] - 1) / sizes[axis]

    outside = sum(s.gathered for p, s in shards.items() if not p.startswith(LAYERS))
    gathered = config.num_layers * layer_weight_bytes(work, mesh) + outside * width
    weights = (2 if work.trains else 1) * gathered
    if work.task == "train":
        weights += sum(shard.gathered for shard in shards.values()) * width
    gradients = num_trained(work, mesh) * 4.0 if work.trains else 0.0
    # A recomputed forward pass needs the sum of o_proj, but not that of down_proj.
    sums = config.num_layers * (4 if work.trains else 2) + 1
    if work.trains and work.remat == "block":
        sums += config.num_layers
    kv_passes = 0 if work.task == "decode" else 1
    if work.trains:
        kv_passes = 3 + (work.remat != "none")
    kv = config.num_layers * local.tokens * sizes["sequence"] * 2 * local.k * width
    stream = local.tokens * local.d * width
    over_sequence = 2 * gradients if work.task in ("lora", "qlora") else 0.0
    if "sequence" in dict(work.rules.weights)["D"]:
        over_sequence += weights / sizes["fsdp"]
    return {
        "data": 2 * gradients * others("data"),
        "fsdp": weights * others("fsdp"),
        "sequence": (kv * kv_passes + over_sequence) * others("sequence"),
        "tensor": 2 * sums * stream * others("tensor"),
    }
