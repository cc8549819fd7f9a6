"""Reports of a plan: lines of text, and an object for JSON."""

from collections.abc import Sequence

from llama_jax.params import count_params, param_shapes
from llama_jax.planning.compiled import CompiledPlan
from llama_jax.planning.search import Plan

MAX_COLLECTIVES = 12
"""Number of collectives in the text report; the JSON object has all."""


def describe(
    model: str,
    plan: Plan,
    advice: str | None,
    compiled: Sequence[CompiledPlan] = (),
) -> dict[str, object]:
    """Describe a plan as an object for JSON; unknown times and rates are null.

    Args:
      model: its name.
      plan: the plan.
      advice: what to change if nothing fits.
      compiled: compiled plans in the order in which they were tried; the last one is
        `plan`.
    """
    work, bound = plan.work, plan.bound
    return {
        "model": model,
        "params": count_params(param_shapes(work.config, "stacked")),
        "task": work.task,
        "topology": str(plan.topology),
        "chips": plan.topology.chips,
        "mesh": dict(plan.mesh),
        "batch": work.batch,
        "seq": work.seq,
        "dtype": work.dtype,
        "cache_dtype": None if work.trains else work.cache_dtype or work.dtype,
        "param_dtype": work.param_dtype if work.trains else work.dtype,
        "quantize": work.quantize,
        "remat": work.remat if work.trains else None,
        "fits": compiled[-1].fits if compiled else plan.fits,
        "fits_by_formula": plan.fits,
        "bytes_per_chip": plan.footprint._asdict(),
        "total_bytes_per_chip": plan.footprint.total,
        "limit_bytes": plan.limit_bytes,
        "flops_per_step": bound.model_flops,
        "flops_per_chip": bound.chip_flops,
        "tokens_per_step": bound.tokens,
        "compute_seconds": bound.compute_seconds,
        "hbm_seconds": bound.hbm_seconds,
        "interconnect_seconds": bound.interconnect_seconds,
        "interconnect_bytes": dict(bound.interconnect_bytes),
        "step_seconds_bound": bound.seconds,
        "step_seconds_no_overlap": bound.seconds_no_overlap,
        "tokens_per_second_bound": bound.tokens_per_second,
        "mfu_bound": plan.mfu(bound.seconds),
        "limited_by": bound.limited_by,
        "advice": advice,
        "compiled": _describe_compiled(compiled) if compiled else None,
    }


def _describe_compiled(compiled: Sequence[CompiledPlan]) -> dict[str, object]:
    last = compiled[-1]
    return {
        "seconds": last.seconds,
        "attention": last.attention,
        "kernels": last.kernels,
        "fits": last.fits,
        "bytes_per_chip": last.footprint._asdict() if last.footprint else None,
        "total_bytes_per_chip": last.total,
        "limit_bytes": last.plan.limit_bytes,
        "out_of_memory": last.out_of_memory,
        "formula_over_compiler": last.formula_ratio,
        "collectives": [
            {
                "kind": collective.kind,
                "axes": collective.axes,
                "dtype": collective.dtype,
                "count": collective.times,
                "bytes": collective.nbytes,
            }
            for collective in last.collectives
        ],
        "product_flops_per_chip": last.product_flops,
        "compute_seconds": last.compute_seconds,
        "collective_seconds": last.collective_seconds,
        "mfu_overlap": last.mfu(overlap=True),
        "mfu_no_overlap": last.mfu(overlap=False),
        "tried": [
            {
                "mesh": dict(other.plan.mesh),
                "batch": other.plan.work.batch,
                "remat": other.plan.work.remat if other.plan.work.trains else None,
                "fits": other.fits,
                "total_bytes_per_chip": other.total,
                "out_of_memory": other.out_of_memory,
            }
            for other in compiled
        ],
    }


def report_lines(
    model: str,
    plan: Plan,
    advice: str | None,
    compiled: Sequence[CompiledPlan] = (),
) -> list[str]:
    """Describe a plan as lines of text; arguments as of `describe`."""
    work, chips = plan.work, plan.topology.chips
    settings = [f"batch {work.batch}", f"{work.seq:,} tokens", work.dtype]
    if work.trains:
        settings.append(f"remat {work.remat}")
    if work.quantize != "none":
        settings.append(f"{work.quantize} weights")
    if work.cache_dtype:
        settings.append(f"{work.cache_dtype} cache")
    lines = [
        f"{model}: {work.task} on {plan.topology} ({_count(chips, 'chip')})",
        f"  {', '.join(settings)}; mesh {_mesh(plan)}",
        "",
        f"  {'fits' if plan.fits else 'DOES NOT FIT'}: "
        f"{_gb(plan.footprint.total)} of {_gb(plan.limit_bytes)} GB on each chip",
    ]
    for kind, nbytes in plan.footprint._asdict().items():
        if nbytes:
            lines.append(f"    {kind:<14}{_gb(nbytes):>8} GB")
    lines += ["", *_time_lines(plan)]
    if plan.fits and plan.exceeds_default_fraction:
        lines += [
            "",
            "  Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9: jax allocates 0.75 of a GPU's "
            "memory by default.",
        ]
    if advice:
        lines += ["", f"  {advice}."]
    if compiled:
        return [*lines, "", *_compiled_lines(compiled)]
    return [*lines, "", "  Computed by formula; nothing was compiled or measured."]


def _rounded(number: float, digits: int) -> str:
    """A number in significant digits, without an exponent if it is large."""
    text = f"{number:.{digits}g}"
    return f"{float(text):,.0f}" if number >= 1000 else text


def _time_lines(plan: Plan) -> list[str]:
    bound = plan.bound
    if bound.seconds is None or bound.seconds_no_overlap is None:
        return [
            f"  the speed of {plan.topology.chip.name} is unknown; a step has",
            f"    {_rounded(bound.model_flops / 1e12, 3)} TFLOP",
        ]
    overlap, no_overlap = (
        plan.mfu(seconds) or 0.0
        for seconds in (bound.seconds, bound.seconds_no_overlap)
    )
    return [
        f"  at most {_rounded(bound.tokens_per_second or 0.0, 4)} tokens/s, limited by "
        f"{bound.limited_by}; a step of {_count(bound.tokens, 'token')} takes",
        *(f"    {name:<17}{_time(time):>11}" for name, time in bound.times.items()),
        f"    {_time(bound.seconds)} with full overlap, "
        f"{_time(bound.seconds_no_overlap)} without: {overlap:.0%} and "
        f"{no_overlap:.0%} of the chips' peak",
    ]


def _compiled_lines(compiled: Sequence[CompiledPlan]) -> list[str]:
    """Formula and compiler side by side, then communication and matrix products."""
    last = compiled[-1]
    lines = []
    for other in compiled[:-1]:
        reason = other.out_of_memory or f"{_gb(other.total or 0)} GB"
        lines.append(
            f"  compiled first, too large: batch {other.plan.work.batch}, mesh "
            f"{_mesh(other.plan)}: {reason}"
        )
    lines.append(
        f"  compiled in {last.seconds:,.0f} s (attention {last.attention}): "
        f"{'fits' if last.fits else 'DOES NOT FIT'}"
    )
    if last.out_of_memory:
        lines.append(f"    {last.out_of_memory}")
    if last.footprint is None:
        return lines
    formula, compiler = last.plan.footprint, last.footprint
    cache = formula.cache if compiler.cache else 0
    others = formula.gradients + formula.activations + formula.temporaries
    rows: list[tuple[str, int, int]] = [
        ("weights", formula.weights, compiler.weights),
        ("optimizer", formula.optimizer, compiler.optimizer),
        ("cache", cache, compiler.cache),
        ("other", others + formula.cache - cache, sum(compiler[3:])),
        ("total", formula.total, last.total or 0),
    ]
    lines.append(f"    {'GB per chip':<14}{'formula':>10}{'compiler':>10}{'ratio':>8}")
    for name, by_formula, by_compiler in rows:
        if by_formula or by_compiler:
            ratio = f"{by_formula / by_compiler:.3f}" if by_compiler else ""
            lines.append(
                f"    {name:<14}{_gb(by_formula):>10}{_gb(by_compiler):>10}{ratio:>8}"
            )
    largest = [c for c in last.collectives if c.nbytes >= 1e4][:MAX_COLLECTIVES]
    if largest:
        lines.append("    each chip receives per step")
    for collective in largest:
        lines.append(
            f"      {_gb(collective.nbytes):>9} GB in {collective.times:,.0f} "
            f"{collective.kind} of {collective.dtype} over {collective.axes}"
        )
    if last.compute_seconds is not None and last.collective_seconds is not None:
        times = (
            f"    matrix products {_time(last.compute_seconds)}, communication "
            f"{_time(last.collective_seconds)}"
        )
        overlap, no_overlap = last.mfu(overlap=True), last.mfu(overlap=False)
        if overlap is not None and no_overlap is not None:
            times += f": {overlap:.0%} of the peak with full overlap, "
            times += f"{no_overlap:.0%} without"
        lines.append(times)
    return lines


def _mesh(plan: Plan) -> str:
    used = (f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
    return ",".join(used) or "data=1"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number > 1 else ''}"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.3g} ms"
