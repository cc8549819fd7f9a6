"""Floating-point operations: of a model's passes, and of one chip's part in them.

A multiply-add counts as two. Norms, softmax and rotations are not counted.
"""

import math
from collections.abc import Mapping

from llama_jax.config import LlamaConfig
from llama_jax.params import LAYERS, axes_of, leaf_paths, weight_shape
from llama_jax.planning.workload import (
    EMBEDDING,
    Workload,
    local_sizes,
    weight_shards,
)


def forward_flops(
    config: LlamaConfig, batch: int, seq: int, *, causal: bool = True
) -> float:
    """Count the FLOPs of one forward pass with the logits of all tokens.

    Two per token and weight of a matrix product; four per number of the query heads
    and pair of query and slot.

    Args:
      config: the model.
      batch: B.
      seq: T.
      causal: count only pairs in which the query sees the slot, about half of them.

    >>> from llama_jax import preset
    >>> f"{forward_flops(preset('llama2-7b'), batch=1, seq=4096):.3e}"
    '5.852e+13'
    """
    tokens = batch * seq
    slots = (seq + 1) / 2 if causal else seq
    return 2.0 * tokens * _num_product_weights(config) + _attention_flops(
        config, tokens, slots
    )


def train_flops(config: LlamaConfig, batch: int, seq: int) -> float:
    """Count the FLOPs of a forward and backward pass, without recomputation.

    Three times those of the forward pass, as each product has two gradients.
    """
    return 3 * forward_flops(config, batch, seq)


def prefill_flops(config: LlamaConfig, batch: int, seq: int) -> float:
    """Count the FLOPs of reading prompts of `seq` tokens, with the last token's logits.

    Of attention only what a query sees counts, so computing the rest earns nothing.
    """
    head = config.embed_dim * config.vocab_size
    return forward_flops(config, batch, seq) - 2.0 * batch * (seq - 1) * head


def decode_flops(config: LlamaConfig, batch: int, slots: int) -> float:
    """Count the FLOPs of generating one token per row, the last of `slots`."""
    weights = 2.0 * batch * _num_product_weights(config)
    return weights + _attention_flops(config, batch, slots)


def step_flops(work: Workload) -> float:
    """Count the FLOPs of one step of a workload on all chips, without recomputation."""
    config, batch, seq = work.config, work.batch, work.seq
    if work.task == "decode":
        return decode_flops(config, batch, seq)
    if work.task == "prefill":
        return prefill_flops(config, batch, seq)
    frozen = 0.0 if work.task == "train" else forward_flops(config, batch, seq)
    return train_flops(config, batch, seq) - frozen  # frozen weights have no gradient


def chip_flops(work: Workload, mesh: Mapping[str, int]) -> float:
    """Count the FLOPs of one chip in a step, with what remat recomputes.

    Every chip computes what the mesh does not divide (key heads, a batch of one).
    """
    shards, local = weight_shards(work, mesh), local_sizes(work, mesh)

    def product_weights(*, layers: bool) -> int:
        return sum(
            shard.gathered
            for path, shard in shards.items()
            if path.startswith(LAYERS) == layers and _is_product(path)
        )

    layers = 2.0 * local.tokens * product_weights(layers=True)
    head = product_weights(layers=False)
    if work.config.tied_embeddings:
        head = shards[EMBEDDING].gathered
    # Generation needs the logits of the last token only.
    logits = 2.0 * (local.tokens if work.trains else local.rows) * head
    attention = chip_attention_flops(work, mesh)
    if not work.trains:
        return layers + logits + attention
    # Forward, and the gradients of activations and (if trained) of weights. The
    # backward pass of the loss recomputes the logits.
    passes = 3 if work.task == "train" else 2
    recomputed = layers if work.remat == "block" else 0.0
    return passes * layers + (passes + 1) * logits + attention + recomputed


def chip_attention_flops(work: Workload, mesh: Mapping[str, int]) -> float:
    """The part of `chip_flops` that is attention, whose operands are activations.

    The backward pass has twice the FLOPs of the forward pass; any remat recomputes the
    latter.
    """
    local, config = local_sizes(work, mesh), work.config
    slots = work.seq if work.task == "decode" else (work.seq + 1) / 2
    split = local.n / (config.num_heads * config.head_dim)
    forward = split * _attention_flops(config, local.tokens, slots)
    return forward * ((3 + (work.remat != "none")) if work.trains else 1)


def _is_product(path: str) -> bool:
    return path.endswith("_proj") or path == "lm_head"


def _num_product_weights(config: LlamaConfig) -> int:
    paths = filter(_is_product, leaf_paths(config, "stacked"))
    total = sum(math.prod(weight_shape(config, axes_of(path))) for path in paths)
    if config.tied_embeddings:
        total += config.vocab_size * config.embed_dim
    return total


def _attention_flops(config: LlamaConfig, tokens: float, slots: float) -> float:
    heads = config.num_heads * config.head_dim
    return 4.0 * config.num_layers * tokens * slots * heads
