"""The compiler's report about a plan: memory, communication and matrix products."""

from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.kernels import Implementation
from llama_jax.planning.hlo_costs import Collective
from llama_jax.planning.search import Plan


class CompiledFootprint(NamedTuple):
    """Bytes on each chip, by kind, as the compiler allocates them.

    Attributes:
      weights: arguments.
      optimizer: arguments.
      cache: an argument of decoding.
      batch: tokens, settings and counters.
      padding: what layouts add to these arguments.
      temporaries: including gradients and activations.
      outputs: those that do not reuse a donated argument.
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


class CompiledPlan(NamedTuple):
    """A plan's program as compiled for its chips.

    Attributes:
      plan: the plan.
      seconds: time of tracing, lowering and compiling.
      attention: the attention implementation that the program calls.
      footprint: bytes by kind; None if the compiler ran out of memory.
      total: bytes of all kinds; if the compiler ran out of memory, what it says the
        program needs, or None if it does not say.
      out_of_memory: the compiler's error message if it ran out of memory.
      kernels: number of calls to Pallas kernels in the program text.
      collectives: communication of a step, largest first.
      product_flops: FLOPs of matrix products on one chip in a step; those of attention
        kernels are counted by formula, as the text does not contain them.
      compute_seconds: of these FLOPs at the chip's peak; None if it is unknown.
      collective_seconds: of the collectives; None if a bandwidth is unknown.
    """

    plan: Plan
    seconds: float
    attention: Implementation
    footprint: CompiledFootprint | None
    total: int | None
    out_of_memory: str | None = None
    kernels: int = 0
    collectives: Sequence[Collective] = ()
    product_flops: float = 0.0
    compute_seconds: float | None = None
    collective_seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether it compiled and is within the limit."""
        compiled = self.footprint is not None
        return compiled and (self.total or 0) <= self.plan.limit_bytes

    @property
    def formula_ratio(self) -> float | None:
        """The formula's total bytes divided by the compiler's; None if unknown."""
        return self.plan.footprint.total / self.total if self.total else None

    def mfu(self, *, overlap: bool) -> float | None:
        """Model FLOPs utilization if communication overlaps with compute, or not.

        None if a rate is unknown, the program did not compile, or it decodes (decoding
        is limited by memory, which neither time covers).
        """
        if self.plan.work.task == "decode" or self.footprint is None:
            return None
        if self.compute_seconds is None or self.collective_seconds is None:
            return None
        times = self.compute_seconds, self.collective_seconds
        return self.plan.mfu(max(times) if overlap else sum(times))
