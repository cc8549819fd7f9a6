"""A report of a run, as Markdown and as a page: numbers, settings, samples, curves.

Curves of the losses, and of reward against KL where records have them, are drawn with
matplotlib (`llama-jax[plots]`). Tables of the same numbers are always there.
"""

import base64
import html
import pathlib
import statistics
from collections.abc import Mapping, Sequence

import jax

from llama_jax.train.metrics import FILE_NAME, Record, read_metrics
from llama_jax.types import Path

Points = list[tuple[float, float]]
Table = Sequence[Sequence[object]]

_TABLE_ROWS = 10


def write_report(
    folder: Path,
    settings: Mapping[str, object],
    *,
    facts: Mapping[str, object] | None = None,
    tables: Mapping[str, Table] | None = None,
    samples: Sequence[Record] = (),
) -> list[pathlib.Path]:
    """Write report.md, report.html and, if matplotlib is installed, its pictures.

    They are loss.png, and reward.png for records with rewards.

    Args:
      folder: of the run, with its metrics.jsonl.
      settings: of the run, by name.
      facts: more results, by name.
      tables: more tables, by title; the first row has the names of the columns.
      samples: records `{"step", "samples": [{"prompt", "text"}]}`.

    Returns:
      The files that were written.
    """
    folder = pathlib.Path(folder)
    records = read_metrics(folder / FILE_NAME)
    results = {**summary(records), **(facts or {})}
    tables = {
        "Results": [("", ""), *results.items()],
        "Loss": loss_table(records),
        **({"Reward": reward_table(records)} if rewards(records) else {}),
        **(tables or {}),
        "Settings": [("", ""), *_changed(settings).items()],
    }
    pictures: dict[str, pathlib.Path] = {}
    if draw_losses(folder / "loss.png", records):
        pictures["loss by step"] = folder / "loss.png"
    if rewards(records) and draw_rewards(folder / "reward.png", records):
        pictures["reward against KL"] = folder / "reward.png"
    files = list(pictures.values())
    for name, write in (("report.html", _page), ("report.md", _markdown)):
        (folder / name).write_text(write(tables, samples, pictures), "utf-8")
        files.insert(0, folder / name)
    return files


def training_losses(records: Sequence[Record]) -> Points:
    """The step and the training loss of each record."""
    return [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]


def held_out_losses(records: Sequence[Record]) -> Points:
    """The step and the held-out loss of each evaluation; step 0 is before training."""
    points: Points = []
    for record in records:
        if record.get("eval_loss_before") is not None:
            points.append((record["step"] - 1, record["eval_loss_before"]))
        if record.get("eval_loss") is not None:
            points.append((record["step"], record["eval_loss"]))
    return points


def summary(records: Sequence[Record]) -> dict[str, str]:
    """Describe a run in a few numbers."""
    if not records:
        return {"steps": "none"}
    losses = [loss for _, loss in training_losses(records)]
    tenth = max(len(losses) // 10, 1)
    results = {"steps": f"{records[-1]['step']:,}"}
    if losses:
        results["loss, first and last tenth of the steps"] = (
            f"{statistics.fmean(losses[:tenth]):.4f} → "
            f"{statistics.fmean(losses[-tenth:]):.4f}"
        )
    if points := held_out_losses(records):
        step, loss = min(points, key=lambda point: point[1])
        results["held-out loss, first → last"] = (
            f"{points[0][1]:.4f} → {points[-1][1]:.4f}"
        )
        results["best held-out loss"] = f"{loss:.4f} after step {step:,}"
    seconds = [r["seconds"] for r in records if "seconds" in r]
    if seconds:
        waited = sum(r.get("data_seconds", 0.0) for r in records)
        rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
        results |= {
            "tokens": f"{sum(r.get('tokens', 0) for r in records):,}",
            "tokens/s (median step)": f"{statistics.median(rates):,.0f}",
            "time in steps": f"{sum(seconds):,.1f} s",
            "of which waiting for data": f"{waited / sum(seconds):.2%}",
        }
    mfu = [r["mfu"] for r in records if r.get("mfu") is not None]
    if mfu:
        results["model FLOP utilization (median step)"] = (
            f"{statistics.median(mfu):.1%}"
        )
    results["skipped steps"] = f"{sum(bool(r.get('skipped')) for r in records):,}"
    return results


def loss_table(records: Sequence[Record]) -> Table:
    """Rows of step, mean training loss since the row above, and last held-out loss."""
    trained, held_out = training_losses(records), held_out_losses(records)
    rows: list[Sequence[object]] = [("step", "training loss", "held-out loss")]
    if held_out and held_out[0][0] == 0:
        rows.append((0, "", f"{held_out[0][1]:.4f}"))
    size = max(-(-len(trained) // _TABLE_ROWS), 1)
    for start in range(0, len(trained), size):
        part = trained[start : start + size]
        first, last = part[0][0], part[-1][0]
        evaluated = [loss for step, loss in held_out if first <= step <= last]
        rows.append(
            (
                last,
                f"{statistics.fmean(loss for _, loss in part):.4f}",
                f"{evaluated[-1]:.4f}" if evaluated else "",
            )
        )
    return rows


def rewards(records: Sequence[Record]) -> Sequence[Record]:
    """The records of policy optimization, with finite `reward` and `kl`."""
    names = ("reward", "kl")
    return [r for r in records if all(r.get(name) is not None for name in names)]


def reward_table(records: Sequence[Record]) -> Table:
    """Rows of step, and means of rewards and others since the row above."""
    names = ("reward", "kl", "entropy", "clipped", "length", "truncated")
    measured = rewards(records)
    rows: list[Sequence[object]] = [("step", *names)]
    size = max(-(-len(measured) // _TABLE_ROWS), 1)
    for start in range(0, len(measured), size):
        part = measured[start : start + size]
        row: list[object] = [part[-1]["step"]]
        for name in names:
            values = [r[name] for r in part if r.get(name) is not None]
            row.append(f"{statistics.fmean(values):.4g}" if values else "")
        rows.append(row)
    return rows


def draw_rewards(path: pathlib.Path, records: Sequence[Record]) -> bool:
    """Draw reward against KL as a PNG; return false if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    measured = rewards(records)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="KL(policy ‖ reference) per token, estimate k3")
    axes.set_ylabel("reward")
    kl, steps = [r["kl"] for r in measured], [r["step"] for r in measured]
    points = axes.scatter(kl, [r["reward"] for r in measured], c=steps)
    figure.colorbar(points, label="step")
    figure.savefig(path, dpi=120)
    return True


def draw_losses(path: pathlib.Path, records: Sequence[Record]) -> bool:
    """Draw the loss curves as a PNG; return false if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    curves = (
        ("training", training_losses(records)),
        ("held out", held_out_losses(records)),
    )
    for name, points in curves:
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    if any(points for _, points in curves):
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def peak_memory_bytes() -> int:
    """The peak memory in use on any local device; 0 if devices do not report it."""
    peak = 0
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        peak = max(peak, (stats or {}).get("peak_bytes_in_use", 0))
    return peak


def _markdown(
    tables: Mapping[str, Table],
    samples: Sequence[Record],
    pictures: Mapping[str, pathlib.Path],
) -> str:
    lines = ["# Training run", ""]
    for title, picture in pictures.items():
        lines += [f"![{title}]({picture.name})", ""]
    for title, table in tables.items():
        lines += [f"## {title}", ""]
        for number, row in enumerate(table):
            lines.append(f"| {' | '.join(map(_cell, row))} |")
            if number == 0:
                lines.append("|" + "---|" * len(row))
        lines.append("")
    if samples:
        lines += ["## Samples", ""]
    for record in samples:
        lines += [f"After step {record['step']}:", ""]
        for sample in record["samples"]:
            text = f"{sample['prompt']}\n⟶ {sample['text']}"
            lines += [*(f"    {line}" for line in text.splitlines()), ""]
    return "\n".join(lines)


def _page(
    tables: Mapping[str, Table],
    samples: Sequence[Record],
    pictures: Mapping[str, pathlib.Path],
) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<title>Training run</title><style>body{font-family:sans-serif;max-width:48rem;"
        "margin:2rem auto;padding:0 1rem}td{padding:.1rem 1rem .1rem 0;vertical-align:"
        "top}pre{white-space:pre-wrap;background:#f4f4f4;padding:.6rem}"
        "img{max-width:100%}</style>",
        "<h1>Training run</h1>",
    ]
    for title, picture in pictures.items():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f"<img alt='{title}' src='data:image/png;base64,{data}'>")
    for title, table in tables.items():
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(_text(cell))}</td>" for cell in row)
            + "</tr>"
            for row in table
        )
        parts.append(f"<h2>{title}</h2><table>{rows}</table>")
    if samples:
        parts.append("<h2>Samples</h2>")
    for record in samples:
        parts.append(f"<h3>After step {record['step']}</h3>")
        for sample in record["samples"]:
            text = html.escape(f"{sample['prompt']}\n⟶ {sample['text']}")
            parts.append(f"<pre>{text}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def _changed(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that are given, named as flags are."""
    return {
        name.replace("_", "-"): value
        for name, value in settings.items()
        if value is not None and value is not False
    }


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(value: object) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")
