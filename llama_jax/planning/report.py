"""A plan, and what fits where, as text for reading and as objects for JSON."""

from collections.abc import Sequence
from typing import Any

from llama_jax.config import PRESETS, LlamaConfig
from llama_jax.params import count_params, param_shapes
from llama_jax.planning.compiled import Compiled
from llama_jax.planning.memory import Quantization, Workload
from llama_jax.planning.search import Plan, fits_somehow
from llama_jax.planning.topology import Topology, parse_topology

COMMON = (
    ("Colab", "v5e:1x1"),
    ("Kaggle", "v5e:2x4"),
    ("", "t4"),
    ("", "a100-40"),
    ("", "h100"),
    ("v5p-8 cores", "v5p:2x2x1"),
    ("", "v5p:2x2x2"),
    ("", "v5e:4x4"),
    ("", "v5e:16x16"),
)
"""What `--table` looks at: a word on where it is met, and the topology."""

MOST_COLLECTIVES = 12
"""Lines on what chips exchange; JSON has all."""

MOST_SEQ = 4096
"""Tokens of a row where nobody says, unless the model's longest is less."""


Tried = Sequence[tuple[Plan, Compiled]]
"""Plans with the compiler's answers; the last one is what is reported."""


def describe(
    model: str, found: Plan, hint: str | None, tried: Tried = ()
) -> dict[str, Any]:
    """A plan as an object for JSON; seconds and rates are null where not known.

    Args:
      model: its name.
      found: the plan.
      hint: what to change where nothing fits.
      tried: what a compiler was asked, if one was; the last answer is of this plan.
    """
    work, bound = found.work, found.bound
    fits = tried[-1][1].fits if tried else found.fits
    return {
        "model": model,
        "params": count_params(param_shapes(work.config, "stacked")),
        "task": work.task,
        "topology": str(found.topology),
        "chips": found.topology.chips,
        "mesh": dict(found.mesh),
        "batch": work.batch,
        "seq": work.seq,
        "dtype": work.dtype,
        "cache_dtype": None if work.trains else work.cache_dtype or work.dtype,
        "param_dtype": work.param_dtype if work.trains else work.dtype,
        "quantize": work.quantize,
        "remat": work.remat if work.trains else None,
        "fits": fits,
        "fits_by_formula": found.fits,
        "bytes_per_chip": found.held._asdict(),
        "total_bytes_per_chip": found.held.total,
        "limit_bytes": found.limit_bytes,
        "flops_per_step": bound.model_flops,
        "flops_per_chip": bound.chip_flops,
        "tokens_per_step": bound.tokens,
        "compute_seconds": bound.compute_seconds,
        "hbm_seconds": bound.hbm_seconds,
        "interconnect_seconds": bound.interconnect_seconds,
        "interconnect_bytes": dict(bound.interconnect_bytes),
        "step_seconds_bound": bound.seconds,
        "step_seconds_no_overlap": bound.seconds_apart,
        "tokens_per_second_bound": bound.tokens_per_second,
        "mfu_bound": mfu(found, bound.seconds),
        "limited_by": bound.limited_by,
        "advice": hint,
        "compiled": describe_compiled(tried) if tried else None,
    }


def mfu(found: Plan, seconds: float | None) -> float | None:
    """Part of the chips' peak that the work itself takes, none of it done twice."""
    chip = found.topology.chip
    peak = chip.flops.get(found.work.dtype)
    if not peak or not seconds:
        return None
    return found.bound.model_flops / (found.topology.chips * peak * seconds)


def describe_compiled(tried: Tried) -> dict[str, Any]:
    """The compiler's last answer as an object for JSON, and how others fell out."""
    found, answer = tried[-1]
    return {
        "seconds": answer.seconds,
        "attention": answer.attention,
        "kernels": answer.kernels,
        "fits": answer.fits,
        "bytes_per_chip": answer.held._asdict() if answer.held else None,
        "total_bytes_per_chip": answer.total,
        "limit_bytes": answer.limit,
        "out_of_memory": answer.out_of_memory,
        "formula_over_compiler": _ratio(found, answer),
        "collectives": [
            {
                "kind": one.kind,
                "axes": one.axes,
                "dtype": one.dtype,
                "count": one.times,
                "bytes": one.nbytes,
            }
            for one in answer.collectives
        ],
        "product_flops_per_chip": answer.product_flops,
        "compute_seconds": answer.compute_seconds,
        "collective_seconds": answer.collective_seconds,
        "mfu_overlap": answer.mfu(found, overlap=True),
        "mfu_no_overlap": answer.mfu(found, overlap=False),
        "tried": [
            {
                "mesh": dict(plan.mesh),
                "batch": plan.work.batch,
                "remat": plan.work.remat if plan.work.trains else None,
                "fits": other.fits,
                "total_bytes_per_chip": other.total,
                "out_of_memory": other.out_of_memory,
            }
            for plan, other in tried
        ],
    }


def _ratio(found: Plan, answer: Compiled) -> float | None:
    return found.held.total / answer.total if answer.total else None


def lines(model: str, found: Plan, hint: str | None, tried: Tried = ()) -> list[str]:
    """A plan for reading; arguments as of `describe`."""
    work, bound, chip = found.work, found.bound, found.topology.chip
    how = [f"batch {work.batch}", f"{work.seq:,} tokens", work.dtype]
    if work.trains:
        how.append(f"remat {work.remat}")
    if work.quantize != "none":
        how.append(work.quantize if work.trains else f"{work.quantize} weights")
    if work.cache_dtype:
        how.append(f"{work.cache_dtype} cache")
    chips = found.topology.chips
    said = [
        f"{model}: {work.task} on {found.topology} "
        f"({chips} chip{'s' if chips > 1 else ''})",
        f"  {', '.join(how)}; mesh {_mesh(found)}",
        "",
        f"  {'fits' if found.fits else 'DOES NOT FIT'}: "
        f"{_gb(found.held.total)} of {_gb(found.limit_bytes)} GB on each chip",
    ]
    for kind, nbytes in found.held._asdict().items():
        if nbytes:
            said.append(f"    {kind:<14}{_gb(nbytes):>8} GB")
    said.append("")
    if bound.seconds is None or bound.seconds_apart is None:
        said.append(f"  how fast {chip.name} is is not known; a step has")
        said.append(f"    {bound.model_flops / 1e12:,.3g} TFLOP")
    else:
        rate = bound.tokens_per_second or 0.0
        said.append(
            f"  at best {rate:,.4g} tokens/s, limited by {bound.limited_by}; a step of "
            f"{bound.tokens:,} token{'s' if bound.tokens > 1 else ''} takes"
        )
        for name, seconds in bound.known.items():
            said.append(f"    {name:<17}{_seconds(seconds):>11}")
        part = mfu(found, bound.seconds) or 0.0
        apart = mfu(found, bound.seconds_apart) or 0.0
        said.append(
            f"    {_seconds(bound.seconds)} if they overlap, "
            f"{_seconds(bound.seconds_apart)} if not: {part:.0%} and {apart:.0%} of "
            "the chips' peak"
        )
    if found.fits and found.raises_fraction:
        said += [
            "",
            "  Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9: jax takes 0.75 of a GPU.",
        ]
    if hint:
        said += ["", f"  {hint}."]
    if tried:
        return [*said, "", *compiled_lines(tried)]
    said += ["", "  By formula: no compiler was asked, no overlap or speed measured."]
    return said


def compiled_lines(tried: Tried) -> list[str]:
    """Formula and compiler side by side, and what the program sends and multiplies."""
    found, answer = tried[-1]
    said = []
    for plan, other in tried[:-1]:
        said.append(
            f"  compiled first, and too large: batch {plan.work.batch}, mesh "
            f"{_mesh(plan)}: {other.out_of_memory or _gb(other.total or 0) + ' GB'}"
        )
    verdict = "it fits" if answer.fits else "IT DOES NOT FIT"
    said.append(
        f"  compiled in {answer.seconds:,.0f} s (attention {answer.attention}): "
        f"{verdict}"
    )
    if answer.out_of_memory:
        said.append(f"    {answer.out_of_memory}")
    if answer.held is None:
        return said
    held, asked = found.held, answer.held
    rest = held.gradients + held.activations + held.temporaries
    cached = held.cache if asked.cache else 0
    rows: list[tuple[str, int | None, int]] = [
        ("weights", held.weights, asked.weights),
        ("optimizer", held.optimizer, asked.optimizer),
        ("cache", cached, asked.cache),
        ("all else", rest + held.cache - cached, sum(asked[3:])),
        ("total", held.total, answer.total or 0),
    ]
    said.append(f"    {'GB of a chip':<14}{'formula':>10}{'compiler':>10}{'ratio':>8}")
    for name, by_formula, by_compiler in rows:
        if by_formula or by_compiler:
            ratio = f"{(by_formula or 0) / by_compiler:.3f}" if by_compiler else ""
            said.append(
                f"    {name:<14}{_gb(by_formula or 0):>10}{_gb(by_compiler):>10}"
                f"{ratio:>8}"
            )
    most = [one for one in answer.collectives if one.nbytes >= 1e4][:MOST_COLLECTIVES]
    if most:
        said.append("    each chip receives in a step")
    for one in most:
        said.append(
            f"      {_gb(one.nbytes):>9} GB in {one.times:,.0f} "
            f"{one.kind} of {one.dtype} over {one.axes}"
        )
    if answer.compute_seconds is not None and answer.collective_seconds is not None:
        times = (
            f"    products {_seconds(answer.compute_seconds)}, links "
            f"{_seconds(answer.collective_seconds)}"
        )
        overlap, apart = (answer.mfu(found, overlap=both) for both in (True, False))
        if overlap is not None and apart is not None:
            times += f": {overlap:.0%} of the peak if they overlap, {apart:.0%} if not"
        said.append(times)
    return said


def _mesh(found: Plan) -> str:
    used = (f"{axis}={size}" for axis, size in found.mesh.items() if size > 1)
    return ",".join(used) or "data=1"


def table(seq: int | None) -> list[dict[str, Any]]:
    """What fits where, of every preset on common hardware.

    Args:
      seq: tokens of a row; 4096, or the model's longest if that is shorter.
    """
    known: dict[LlamaConfig, dict[str, Any]] = {}
    rows = []
    for name, config in PRESETS.items():
        if config not in known:
            known[config] = {
                text: _what_fits(config, parse_topology(text), seq)
                for _, text in COMMON
            }
        rows.append({"model": name, "fits": known[config]})
    return rows


def _what_fits(config: LlamaConfig, topology: Topology, seq: int | None) -> Any:
    work = Workload(
        config=config,
        task="decode",
        batch=1,
        seq=seq or min(config.max_seq_len, MOST_SEQ),
        dtype=topology.chip.dtype,
        flash=topology.chip.flash,
        gpu=topology.chip.links == "host",
    )
    decode: str | None = None
    kinds: tuple[Quantization, ...] = ("none", "int8", "int4")
    for kind in kinds:
        if fits_somehow(work.replace(quantize=kind), topology):
            decode = topology.chip.dtype if kind == "none" else kind
            break
    tuned: str | None = None
    for task in ("train", "lora", "qlora"):
        kind = "int4" if task == "qlora" else "none"
        if fits_somehow(work.replace(task=task, quantize=kind), topology):
            tuned = task
            break
    return {"decode": decode, "train": tuned}


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table for reading, as Markdown has them."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", None: "–"}
    heads = [f"{text} ({met})" if met else text for met, text in COMMON]
    cells = [["", *heads]]
    for row in rows:
        found = [row["fits"][text] for _, text in COMMON]
        cells.append(
            [row["model"]]
            + [
                f"{short.get(f['decode'], f['decode'])} · {f['train'] or '–'}"
                if f["decode"] or f["train"]
                else "–"
                for f in found
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    ruled = [cells[0], ["-" * width for width in widths], *cells[1:]]
    said = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in ruled
    ]
    return [
        *said,
        "",
        "Each cell: the widest weights that decode one row of 4,096 tokens (or the "
        "model's longest,",
        "or --seq), and the fullest training (train, lora, qlora) of a row on each "
        "chip. By formula.",
    ]


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f}"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.3g} ms"
