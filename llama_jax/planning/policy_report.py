"""Reports of a plan of policy optimization: lines of text, and an object for JSON."""

from llama_jax.planning.policy import PolicyPlan
from llama_jax.planning.policy_compiler import CompiledPolicy


def describe_policy(
    model: str, plan: PolicyPlan, compiled: CompiledPolicy | None = None
) -> dict[str, object]:
    """Describe a plan as an object for JSON; times are absent if a rate is unknown."""
    work = plan.work
    return {
        "model": model,
        "task": "ppo-lora" if work.has_adapters else "ppo",
        "topology": str(plan.topology),
        "chips": plan.topology.chips,
        "mesh": dict(plan.mesh),
        "answers": work.answers,
        "max_new_tokens": work.new_tokens,
        "seq": work.update.seq,
        "batch": work.update.batch,
        "sampled_rows": work.sampled_rows,
        "dtype": work.update.dtype,
        "param_dtype": work.update.param_dtype,
        "quantize": work.update.quantize,
        "remat": work.update.remat,
        "lora_rank": work.update.rank if work.has_adapters else None,
        "fits": plan.fits if compiled is None else compiled.fits,
        "bytes_per_chip_by_model": dict(plan.stored),
        "bytes_per_chip_by_phase": dict(plan.temporary),
        "total_bytes_per_chip": plan.total,
        "limit_bytes": plan.limit_bytes,
        "seconds_bound": dict(plan.seconds),
        "seconds_no_overlap": dict(plan.seconds_no_overlap),
        "compiled": None if compiled is None else _describe_compiled(compiled),
    }


def _describe_compiled(compiled: CompiledPolicy) -> dict[str, object]:
    return {
        "fits": compiled.fits,
        "bytes_per_chip_by_model": dict(compiled.stored),
        "bytes_per_chip_by_phase": compiled.temporary,
        "total_bytes_per_chip": compiled.total,
        "seconds": {name: phase.seconds for name, phase in compiled.phases.items()},
        "out_of_memory": {
            name: phase.out_of_memory
            for name, phase in compiled.phases.items()
            if phase.out_of_memory
        },
    }


def policy_lines(
    model: str, plan: PolicyPlan, compiled: CompiledPolicy | None = None
) -> list[str]:
    """Describe a plan as lines of text."""
    work, update = plan.work, plan.work.update
    mesh = ",".join(f"{axis}={n}" for axis, n in plan.mesh.items() if n > 1)
    kind = f"adapters of rank {update.rank}" if work.has_adapters else "all weights"
    quantized = "" if update.quantize == "none" else f", {update.quantize} base"
    fits = plan.fits if compiled is None else compiled.fits
    total = plan.total if compiled is None else compiled.total
    answers = f"{work.answers} answers of {work.new_tokens} tokens"
    compiler = "" if compiled is None else f"{'compiler':>10}"
    lines = [
        f"{model}: PPO of {kind} on {plan.topology} ({plan.topology.chips} chips)",
        f"  {answers} in {update.seq:,} slots, {work.sampled_rows} sampled at a time, "
        f"micro-batch {update.batch}",
        f"  {update.dtype}, remat {update.remat}{quantized}; mesh {mesh or 'data=1'}",
        "",
        f"  {'fits' if fits else 'DOES NOT FIT'}: {_gb(total)} of "
        f"{_gb(plan.limit_bytes)} GB on each chip",
        f"    {'GB per chip':<24}{'formula':>9}{compiler}",
    ]

    def row(name: str, formula: int, exact: int | None) -> str:
        last = "" if exact is None else f"{_gb(exact):>10}"
        return f"    {name:<24}{_gb(formula):>9}{last}"

    for name, size in plan.stored.items():
        exact = None if compiled is None else compiled.stored.get(name, 0)
        lines.append(row(name, size, exact))
    for phase, size in plan.temporary.items():
        exact = None if compiled is None else compiled.temporary[phase]
        lines.append(row(f"besides, to {phase}", size, exact))
    if compiled is not None:
        for name, result in compiled.phases.items():
            if result.out_of_memory:
                lines.append(f"    {name}: {result.out_of_memory}")
    if not plan.seconds:
        name = plan.topology.chip.name
        return [*lines, "", f"  The speed of {name} is unknown."]
    exposed = plan.seconds_no_overlap
    lines += [
        "",
        f"  an iteration takes at least {_time(sum(plan.seconds.values()))} with full "
        f"overlap, {_time(sum(exposed.values()))} without",
    ]
    lines += [
        f"    {name:<24}{_time(seconds):>9}{_time(exposed[name]):>10}"
        for name, seconds in plan.seconds.items()
    ]
    return lines


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:,.1f} s"
