"""`Batch`: what a training step eats."""

from typing import NamedTuple

from llama_jax.types import Array, Float, Int


class Batch(NamedTuple):
    """Rows of tokens, what follows each, and which of that is learnt.

    Attributes:
      tokens: ids; any id where nothing is.
      targets: the token that follows each; any id where the mask is 0.
      loss_mask: the weight of each target's loss; 0 where nothing is learnt.
      segment_ids: which of a row's packed records a token belongs to, from 1; 0 where
        nothing is. Tokens of other segments are not seen.
      positions: of rotary embedding; they restart in each segment.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    loss_mask: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
