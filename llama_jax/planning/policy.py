"""Whether policy optimization fits: four models, and the phases of an iteration.

With adapters, policy, reference, critic and reward model share frozen weights (the
base); each has its own adapters. Without, each has all its weights: policy, reference
and critic in `param_dtype`, the reward model in `dtype`.

    sample    prefill and decoding of the policy, with a copy of its weights in `dtype`
    score     forward passes of policy, reference, critic and reward model
    update    forward and backward pass of policy and critic, micro-batch by micro-batch

What the models store is there in every phase. Times are lower bounds (`roofline`); a
critic counts as its policy.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from llama_jax.errors import ConfigError, MeshError
from llama_jax.planning.memory import num_trained, weight_bytes
from llama_jax.planning.search import make_plan, meshes
from llama_jax.planning.topology import Topology
from llama_jax.planning.workload import Workload

PolicyTask = Literal["ppo", "ppo-lora"]
Phase = Literal["sample", "score", "update"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyWork:
    """Policy optimization with a critic (PPO), independent of the hardware.

    Attributes:
      update: the training of the policy, with the task "train", "lora" or "qlora"; its
        batch is a micro-batch, its `seq` the slots of a prompt with its answer.
      answers: of an iteration.
      mini_batch: answers of an update, which bounds a micro-batch.
      new_tokens: of an answer.
      sampled_rows: answers that are sampled at a time.
    """

    update: Workload
    answers: int = 512
    mini_batch: int = 64
    new_tokens: int = 256
    sampled_rows: int = 64

    def __post_init__(self) -> None:
        if self.new_tokens >= self.update.seq:
            raise ConfigError(
                f"--max-new-tokens {self.new_tokens}: leaves no room for a prompt in "
                f"{self.update.seq} slots; raise --seq"
            )
        if self.answers % self.mini_batch or self.mini_batch % self.update.batch:
            raise ConfigError(
                f"--batch {self.update.batch}: micro-batches must divide mini-batches "
                f"of {self.mini_batch}, and these the {self.answers} answers of an "
                "iteration"
            )

    @property
    def has_adapters(self) -> bool:
        """Whether the models share frozen weights."""
        return self.update.task != "train"

    @property
    def scalar(self) -> Workload:
        """The training of the critic, for counts of its weights."""
        return self.update.replace(config=self.update.config.replace(head="scalar"))

    def inference(self, task: Literal["prefill", "decode"]) -> Workload:
        """The policy when it samples or scores."""
        prompt = self.update.seq - self.new_tokens
        return self.update.replace(
            task=task,
            batch=self.sampled_rows,
            seq=prompt if task == "prefill" else self.update.seq,
            remat="none",
        )


class PolicyPlan(NamedTuple):
    """Policy optimization on a mesh of chips.

    Attributes:
      work: with all choices made.
      topology: the chips.
      mesh: sizes by axis.
      stored: bytes on each chip by model, in every phase: the weights of "base" (if it
        is shared), "policy", "reference", "critic", "reward model", and the
        "optimizer" of policy and critic.
      temporary: bytes on each chip that a phase needs besides.
      seconds: lower bound of each phase of an iteration, in which compute, memory and
        interconnect overlap; empty if a rate is unknown.
      seconds_no_overlap: the same if they do not.
    """

    work: PolicyWork
    topology: Topology
    mesh: Mapping[str, int]
    stored: Mapping[str, int]
    temporary: Mapping[Phase, int]
    seconds: Mapping[Phase, float]
    seconds_no_overlap: Mapping[Phase, float]

    @property
    def total(self) -> int:
        """The largest number of bytes on a chip, over all phases."""
        return sum(self.stored.values()) + max(self.temporary.values())

    @property
    def limit_bytes(self) -> int:
        """Memory of a chip that a program can use."""
        return self.topology.chip.limit_bytes

    @property
    def fits(self) -> bool:
        """Whether every phase is within the limit."""
        return self.total <= self.limit_bytes


def plan_policy(
    work: PolicyWork, topology: Topology, mesh: Mapping[str, int]
) -> PolicyPlan:
    """Plan policy optimization on one mesh.

    Raises:
      MeshError: the mesh has another number of chips, or does not divide the model.
    """
    update = make_plan(work.update, topology, mesh)
    sizes = update.mesh
    plans = {
        task: make_plan(work.inference(task), topology, sizes)
        for task in ("prefill", "decode")
    }
    scoring = work.update.replace(task="prefill", remat="none")
    score = make_plan(scoring, topology, sizes)
    memory = update.footprint
    copy = weight_bytes(work.inference("decode"), sizes)
    cache = plans["decode"].footprint.cache
    widest = max(plan.footprint.temporaries for plan in plans.values())
    temporary: dict[Phase, int] = {
        "sample": copy + cache + widest,
        "score": score.footprint.temporaries,
        "update": 2 * (memory.gradients + memory.activations) + memory.temporaries,
    }
    bounds = plans["prefill"].bound, plans["decode"].bound, score.bound, update.bound
    return PolicyPlan(
        work,
        topology,
        sizes,
        stored_bytes(work, sizes),
        temporary,
        _seconds(work, [bound.seconds for bound in bounds]),
        _seconds(work, [bound.seconds_no_overlap for bound in bounds]),
    )


def _seconds(work: PolicyWork, steps: Sequence[float | None]) -> dict[Phase, float]:
    """Times of the phases, given those of prefill, decoding, scoring and update."""
    known = [time for time in steps if time is not None]
    if len(known) < len(steps):
        return {}
    prefill, decode, forward, update = known
    batches = -(-work.answers // work.sampled_rows)
    parts = work.answers // work.update.batch
    return {
        "sample": batches * (prefill + work.new_tokens * decode),
        "score": 4 * parts * forward,
        "update": 2 * parts * update,
    }


def stored_bytes(work: PolicyWork, mesh: Mapping[str, int]) -> dict[str, int]:
    """Count the bytes on each chip of what each model stores."""
    policy, scalar = work.update, work.scalar
    trained = num_trained(policy, mesh), num_trained(scalar, mesh)
    ours, theirs = (number * policy.param_itemsize for number in trained)
    stored = {}
    if work.has_adapters:
        stored["base"] = weight_bytes(policy, mesh) - ours
        head = 4 * policy.config.embed_dim
        theirs += head
        reward = num_trained(policy, mesh) * 4 + head
    else:
        reward = weight_bytes(scalar.replace(task="prefill"), mesh)
    return stored | {
        "policy": ours,
        "reference": ours,
        "critic": theirs,
        "reward model": reward,
        "optimizer": 2 * (ours + theirs),
    }


def search_policy(
    work: PolicyWork,
    topology: Topology,
    *,
    batch: int | None = None,
    mesh: Mapping[str, int] | None = None,
) -> PolicyPlan:
    """Find the mesh, micro-batch and rows with the fastest iteration that fits.

    Meshes split over the axes `fsdp` and `tensor`.

    Args:
      work: its micro-batch and rows are replaced.
      topology: the chips.
      batch: fixes the micro-batch.
      mesh: fixes the mesh.

    Returns:
      The plan; if none fits, the smallest.

    Raises:
      MeshError: no mesh divides the model.
    """

    def cost(plan: PolicyPlan) -> tuple[bool, float, int]:
        if not plan.fits:
            return True, float(plan.total), 0
        return False, sum(plan.seconds_no_overlap.values()), plan.total

    plans = list(_plans(work, topology, batch, mesh))
    if not plans:
        raise MeshError(
            f"{topology}: no mesh of {topology.chips} chips divides the model; choose "
            "another topology"
        )
    return min(plans, key=cost)


def _plans(
    work: PolicyWork,
    topology: Topology,
    batch: int | None,
    mesh: Mapping[str, int] | None,
) -> Iterator[PolicyPlan]:
    on_both = [
        sizes
        for sizes in meshes(work.update, topology.chips)
        if sizes["data"] == sizes["sequence"] == 1
    ]
    divisors = [n for n in range(1, work.mini_batch + 1) if not work.mini_batch % n]
    powers = [1 << power for power in range(work.answers.bit_length())]
    for sizes in [mesh] if mesh else on_both:
        for rows in [batch] if batch else divisors:
            for sampled in powers:
                changed = dataclasses.replace(
                    work, update=work.update.replace(batch=rows), sampled_rows=sampled
                )
                if mesh:
                    yield plan_policy(changed, topology, sizes)
                    continue
                with contextlib.suppress(MeshError):
                    yield plan_policy(changed, topology, sizes)
