"""A compiler's answer about a plan: bytes, exchanges between chips, products."""

from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.kernels.dispatch import Implementation
from llama_jax.planning.hlo_costs import Collective
from llama_jax.planning.search import Plan


class CompiledBytes(NamedTuple):
    """Bytes on each chip by kind: arguments, and what a program takes besides.

    Attributes:
      weights: that are arguments.
      optimizer: its arrays.
      cache: an argument of decoding.
      batch: tokens, settings and counters.
      padding: that the compiler's layouts add to all of these.
      temporaries: gradients and activations too.
      outputs: that do not take the place of a donated argument.
      code: the program itself.
    """

    weights: int = 0
    optimizer: int = 0
    cache: int = 0
    batch: int = 0
    padding: int = 0
    temporaries: int = 0
    outputs: int = 0
    code: int = 0


class Compiled(NamedTuple):
    """A compiler's answer.

    Attributes:
      seconds: that tracing, lowering and compiling took here.
      attention: the implementation that the program calls.
      held: bytes by kind; None where the compiler gave up for want of memory.
      total: bytes of all kinds; where the compiler gave up what it says it needed, and
        None where it does not say.
      limit: bytes that a program can have.
      out_of_memory: the compiler's own sentence, where it gave up.
      kernels: Pallas kernels that the program calls, each place once.
      collectives: exchanges between chips in a step, largest first.
      product_flops: of matrix products, on one chip in a step; attention's kernels,
        into which no text looks, by formula.
      compute_seconds: of those at the chip's peak; None where that is not known.
      collective_seconds: of what the links bring; None where they are not known.
    """

    seconds: float
    attention: Implementation
    held: CompiledBytes | None
    total: int | None
    limit: int
    out_of_memory: str | None
    kernels: int
    collectives: Sequence[Collective]
    product_flops: float
    compute_seconds: float | None
    collective_seconds: float | None

    @property
    def fits(self) -> bool:
        """Whether the compiler took it, and it is within the limit."""
        return self.held is not None and (self.total or 0) <= self.limit

    def mfu(self, found: Plan, *, overlap: bool) -> float | None:
        """Part of the peak that the work takes, if links work meanwhile or apart.

        None where a rate is not known, the program was not compiled, or it decodes.
        """
        if found.work.task == "decode":
            return None  # memory decides, which products and links say nothing of
        peak = found.topology.chip.flops.get(found.work.dtype)
        if not peak or self.compute_seconds is None or self.collective_seconds is None:
            return None
        both = self.compute_seconds, self.collective_seconds
        seconds = max(both) if overlap else sum(both)
        if not seconds or self.held is None:
            return None
        return found.bound.model_flops / (found.topology.chips * peak * seconds)
