"""How fast a chip could be at best: operations, bytes of memory, bytes between chips.

Three times that no program beats: of the products at the chip's peak, of what must be
read from and written to its memory, and of what its links must bring. If all three go
on at once a step takes the longest of them; one after another, their sum.
"""

from collections.abc import Mapping
from typing import NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.params import LAYERS, axes_of, leaf_paths, weight_shape
from llama_jax.planning.memory import (
    Footprint,
    Shard,
    Workload,
    layer_bytes,
    parts,
    shard_bytes,
    shards,
    sizes_of,
    trained_numbers,
)
from llama_jax.planning.topology import Topology, axis_bandwidths
from llama_jax.runtime import MESH_AXES


class Bound(NamedTuple):
    """The least time of a step: a batch forwards and backwards, or a token each.

    Attributes:
      model_flops: operations that the step is about, on all chips together.
      chip_flops: operations of one chip, what is computed twice counted twice.
      compute_seconds: of a chip's products at its peak; None where that is not known.
      hbm_seconds: of a chip's memory; None where its rate is not known.
      interconnect_seconds: of what a chip receives; None where that is not known.
      interconnect_bytes: received by each chip, by axis of the mesh.
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
    def known(self) -> dict[str, float]:
        """The times by what they are of; empty where one of them is not known."""
        times = {
            "compute": self.compute_seconds,
            "memory bandwidth": self.hbm_seconds,
            "interconnect": self.interconnect_seconds,
        }
        found = {name: time for name, time in times.items() if time is not None}
        return found if len(found) == len(times) else {}

    @property
    def seconds(self) -> float | None:
        """Of a step in which everything overlaps."""
        return max(self.known.values(), default=None)

    @property
    def seconds_apart(self) -> float | None:
        """Of a step in which nothing does."""
        return sum(self.known.values()) if self.known else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all chips together, where everything overlaps."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def limited_by(self) -> str | None:
        """What takes the longest."""
        return max(self.known, key=lambda name: self.known[name], default=None)


def forward_flops(
    config: LlamaConfig, batch: int, seq: int, *, causal: bool = True
) -> float:
    """Operations of one forward pass with the logits of all tokens.

    Two per weight of a product and token, four per pair of a query and a slot and
    number of all query heads. Norms, softmax and rotations are not counted.

    Args:
      config: of the model.
      batch: B.
      seq: T.
      causal: count the pairs that a query sees, about half; or all of them.
    """
    tokens = batch * seq
    slots = (seq + 1) / 2 if causal else seq
    weights = _product_weights(config)
    return 2.0 * tokens * weights + _attention_flops(config, tokens, slots)


def train_flops(config: LlamaConfig, batch: int, seq: int) -> float:
    """Operations of a forward and backward pass, nothing being computed again.

    Three times those of the forward one, since each product has two gradients.
    """
    return 3 * forward_flops(config, batch, seq)


def prefill_flops(config: LlamaConfig, batch: int, seq: int) -> float:
    """Operations of reading prompts of `seq` tokens, with the logits of their last."""
    head = config.embed_dim * config.vocab_size
    return forward_flops(config, batch, seq) - 2.0 * batch * (seq - 1) * head


def decode_flops(config: LlamaConfig, batch: int, slots: int) -> float:
    """Operations of a token in each row, behind `slots` - 1 others."""
    weights = _product_weights(config)
    return 2.0 * batch * weights + _attention_flops(config, batch, slots)


def bound(
    work: Workload, topology: Topology, mesh: Mapping[str, int], held: Footprint
) -> Bound:
    """The least time of a step of this work on these chips.

    Args:
      work: on the whole mesh.
      topology: the chips.
      mesh: sizes by axis.
      held: what each chip holds (`memory.footprint`).

    Raises:
      MeshError: a mesh axis does not divide the axis of a weight that it splits.
    """
    chip = topology.chip
    moved = interconnect_bytes(work, mesh)
    rates = axis_bandwidths(topology, mesh)
    links: float | None = 0.0
    for axis, nbytes in moved.items():
        if nbytes and links is not None:
            links = links + nbytes / rates[axis] if rates[axis] else None
    peak = chip.flops.get(work.dtype)
    flops = chip_flops(work, mesh)
    if work.trains:
        model = train_flops(work.config, work.batch, work.seq)
        if work.task != "train":  # weights that stay have no gradient
            model -= forward_flops(work.config, work.batch, work.seq)
        tokens = work.batch * work.seq
    elif work.task == "prefill":
        model = prefill_flops(work.config, work.batch, work.seq)
        tokens = work.batch * work.seq
    else:
        model = decode_flops(work.config, work.batch, work.seq)
        tokens = work.batch
    return Bound(
        model_flops=model,
        chip_flops=flops,
        compute_seconds=flops / peak if peak else None,
        hbm_seconds=(
            hbm_bytes(work, mesh, held) / chip.hbm_bandwidth
            if chip.hbm_bandwidth
            else None
        ),
        interconnect_seconds=links,
        interconnect_bytes=moved,
        tokens=tokens,
    )


def chip_flops(work: Workload, mesh: Mapping[str, int]) -> float:
    """Operations of one chip in a step, with what remat computes again.

    What a mesh does not divide (key heads, a batch of one) every chip computes.
    """
    config, found = work.config, shards(work.config, work.rules, sizes_of(mesh))
    part = parts(work, mesh, queries=work.queries)
    layers = 2.0 * part.tokens * sum(map(_product_numbers, *_items(found, True)))
    # Of a prompt the last token's logits are wanted.
    asked = part.tokens if work.trains else part.rows
    head = 2.0 * asked * sum(map(_product_numbers, *_items(found, False)))
    if config.tied_embeddings:
        head = 2.0 * asked * found["transformer/embedding"].gathered
    attention = chip_attention_flops(work, mesh)
    if not work.trains:
        return layers + head + attention
    # Forwards, and the gradients of activations and (where they learn) of weights. The
    # backward pass of the loss computes the logits again.
    passes = 3 if work.task == "train" else 2
    again = layers if work.remat == "block" else 0.0
    return passes * layers + (passes + 1) * head + attention + again


def chip_attention_flops(work: Workload, mesh: Mapping[str, int]) -> float:
    """Those of `chip_flops` that are attention's, whose operands are activations.

    Backwards they are twice as many as forwards; any remat computes them again.
    """
    part, config = parts(work, mesh, queries=work.queries), work.config
    slots = work.seq if work.task == "decode" else (work.seq + 1) / 2
    split = part.n / (config.num_heads * config.head_dim)
    once = split * _attention_flops(config, part.tokens, slots)
    return once * ((3 + (work.remat != "none")) if work.trains else 1)


def hbm_bytes(work: Workload, mesh: Mapping[str, int], held: Footprint) -> float:
    """What a chip must at least read and write in a step.

    Decoding: the weights, of the embedding a row each, and the whole cache. Training:
    each layer's weights as products need them in every pass, what is kept written and
    read, and the optimizer's pass over weights, gradients and moments. Activations
    that need not be kept are left out: a perfect program would not write them.
    """
    found = shards(work.config, work.rules, sizes_of(mesh))
    table = "transformer/embedding"
    if not work.trains:
        unread = 0
        if not work.config.tied_embeddings:
            unread = shard_bytes(work, table, found[table], found[table].size)
        gathered = work.config.num_layers * layer_bytes(work, mesh)
        own = _layer_bytes(work, found)
        # A gathered layer is written once and read once, instead of its own part.
        more = 2 * gathered - own if gathered > own else 0
        return held.weights - unread + more + held.cache
    passes = {"none": 2, "dots": 2, "block": 3}[work.remat]
    if work.task == "train":
        passes += 1  # a gradient of each weight is written, as wide
    read = passes * work.config.num_layers * layer_bytes(work, mesh)
    head = found[table if work.config.tied_embeddings else "lm_head"].gathered
    read += (4 if work.task == "train" else 3) * head * work.itemsize
    trained = 0
    if work.task == "train":
        trained = held.weights
    elif trained_numbers(work, mesh):
        trained = held.gradients  # adapters are as wide as their gradients
    return read + 2 * held.activations + 2 * (trained + held.optimizer + held.gradients)


def interconnect_bytes(work: Workload, mesh: Mapping[str, int]) -> dict[str, float]:
    """What each chip receives in a step, by axis of the mesh; rings of n chips.

    fsdp      weights, in `dtype`, for the forward and again for the backward pass; of
              training, gradients summed to their parts; all (n - 1)/n of their bytes
    data      gradients of a chip's part, summed for everyone: 2 (n - 1)/n
    sequence  keys and values of the other tokens in every pass; in training, which cuts
              weights over it too, its part of what fsdp brings
    tensor    the stream, summed for everyone behind o_proj and down_proj in each pass,
              and behind the embedding
    """
    config, width = work.config, work.itemsize
    sizes = dict(zip(MESH_AXES, sizes_of(mesh), strict=True))
    found = shards(config, work.rules, sizes_of(mesh))
    part = parts(work, mesh, queries=work.queries)

    def others(axis: str) -> float:
        return (sizes[axis] - 1) / sizes[axis]

    outside = sum(s.gathered for p, s in found.items() if not p.startswith(LAYERS))
    gathered = config.num_layers * layer_bytes(work, mesh) + outside * width
    gathers = 2 if work.trains else 1
    summed = held = 0.0
    if work.task == "train":
        summed = sum(shard.gathered for shard in found.values()) * width
    if work.trains:
        held = trained_numbers(work, mesh) * 4.0
    again = work.trains and work.remat == "block"
    # Of the second forward pass o_proj's sum is needed, down_proj's is not.
    sums = config.num_layers * (4 if work.trains else 2) + 1
    sums += config.num_layers if again else 0
    kv_passes = 0 if work.task == "decode" else 1
    if work.trains:
        kv_passes = 3 + (work.remat != "none")
    kv = config.num_layers * part.tokens * sizes["sequence"] * 2 * part.k * width
    stream = part.tokens * part.d * width
    put_together = gathers * gathered + summed
    both = 0.0 if work.task == "train" or not work.trains else 2 * held
    if "sequence" in dict(work.rules.weights)["D"]:
        both += put_together / sizes["fsdp"]
    return {
        "data": 2 * held * others("data"),
        "fsdp": put_together * others("fsdp"),
        "sequence": (kv * kv_passes + both) * others("sequence"),
        "tensor": 2 * sums * stream * others("tensor"),
    }


def _items(found: Mapping[str, Shard], layers: bool) -> tuple[list[str], list[Shard]]:
    names = [name for name in found if name.startswith(LAYERS) == layers]
    return names, [found[name] for name in names]


def _product_numbers(path: str, shard: Shard) -> int:
    """Numbers of a weight that a token is multiplied with, on one chip."""
    return shard.gathered if _multiplies(path) else 0


def _multiplies(path: str) -> bool:
    return path.endswith("_proj") or path == "lm_head"


def _layer_bytes(work: Workload, found: Mapping[str, Shard]) -> int:
    return sum(
        shard_bytes(work, path, shard, shard.size)
        for path, shard in found.items()
        if path.startswith(LAYERS)
    )


def _product_weights(config: LlamaConfig) -> int:
    total = 0
    for path in leaf_paths(config, "stacked"):
        if _multiplies(path):
            numbers = 1
            for size in weight_shape(config, axes_of(path)):
                numbers *= size
            total += numbers
    if config.tied_embeddings:
        total += config.vocab_size * config.embed_dim
    return total


def _attention_flops(config: LlamaConfig, tokens: float, slots: float) -> float:
    heads = config.num_heads * config.head_dim
    return 4.0 * config.num_layers * tokens * slots * heads
