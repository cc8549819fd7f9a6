"""A report of a run that anyone can open: Markdown, a page, and a picture of the loss.

The curve is drawn here, as SVG, so that the page needs no package and no network. With
matplotlib (`llama-jax[plots]`) there is a PNG too.
"""

import html
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.train.metrics import FILE_NAME, Record, read_metrics
from llama_jax.types import Path

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _EDGE = 720, 360, 56, 40, 16
_MOST_POINTS = 2000


def write_report(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    facts: Mapping[str, Any] | None = None,
    samples: Sequence[Record] = (),
) -> list[pathlib.Path]:
    """Write report.md, report.html, loss.svg and, where it can be drawn, loss.png.

    Args:
      folder: of the run, where its metrics lie.
      settings: that it was made with, by name.
      facts: what came of it besides.
      samples: records `{"step", "samples": [{"prompt", "text"}]}`.

    Returns:
      The files that were written; without matplotlib there is no loss.png.
    """
    folder = pathlib.Path(folder)
    records = read_metrics(folder / FILE_NAME)
    trained = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    held_out = evaluations(records)
    picture = draw(trained, held_out)
    found = dict(summary(records)) | dict(facts or {})
    files = {"loss.svg": picture}
    png = folder / "loss.png"
    drawn = _draw_png(png, trained, held_out)
    image = png.name if drawn else "loss.svg"
    files["report.md"] = _markdown(found, settings, samples, image)
    files["report.html"] = _page(found, settings, samples, picture)
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return [*(folder / name for name in files), *([png] if drawn else [])]


def evaluations(records: Sequence[Record]) -> Points:
    """Step and held-out loss wherever it was measured, 0 being before the first one."""
    found: Points = []
    for record in records:
        if record.get("eval_loss_before") is not None:
            found.append((record["step"] - 1, record["eval_loss_before"]))
        if record.get("eval_loss") is not None:
            found.append((record["step"], record["eval_loss"]))
    return found


def summary(records: Sequence[Record]) -> dict[str, str]:
    """A run in a few numbers, for people."""
    if not records:
        return {"steps": "none"}
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    tenth = max(len(losses) // 10, 1)
    found = {"steps": f"{records[-1]['step']:,}"}
    if losses:
        found["loss, first and last tenth of the steps"] = (
            f"{statistics.fmean(losses[:tenth]):.4f} → "
            f"{statistics.fmean(losses[-tenth:]):.4f}"
        )
    if points := evaluations(records):
        best = min(points, key=lambda point: point[1])
        found["held-out loss, first → last"] = (
            f"{points[0][1]:.4f} → {points[-1][1]:.4f}"
        )
        found["best held-out loss"] = f"{best[1]:.4f} behind step {best[0]:,}"
    seconds = [r["seconds"] for r in records if "seconds" in r]
    if seconds:
        waited = sum(r.get("data_seconds", 0.0) for r in records)
        rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
        found |= {
            "tokens": f"{sum(r.get('tokens', 0) for r in records):,}",
            "tokens/s (median step)": f"{statistics.median(rates):,.0f}",
            "time in steps": f"{sum(seconds):,.1f} s",
            "of that waiting for data": f"{waited / sum(seconds):.2%}",
        }
    mfu = [r["mfu"] for r in records if r.get("mfu") is not None]
    if mfu:
        found["model FLOP utilization (median step)"] = f"{statistics.median(mfu):.1%}"
    found["skipped steps"] = f"{sum(bool(r.get('skipped')) for r in records):,}"
    return found


def draw(trained: Points, held_out: Points) -> str:
    """The curves as an SVG picture; empty axes where there is nothing to draw."""
    points = [*trained, *held_out]
    low = min((y for _, y in points), default=0.0)
    high = max((y for _, y in points), default=1.0)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    last = max((x for x, _ in points), default=1.0) or 1.0

    def place(x: float, y: float) -> str:
        right = _LEFT + (_WIDTH - _LEFT - _EDGE) * x / last
        down = _EDGE + (_HEIGHT - _BOTTOM - _EDGE) * (high - y) / (high - low)
        return f"{right:.1f},{down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12" role="img">',
        "<title>Loss by step</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for part in range(5):
        y = low + (high - low) * part / 4
        _, _, down = place(0, y).partition(",")
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _EDGE}" y1="{down}" y2="{down}" '
            f'stroke="#ddd"/><text x="{_LEFT - 6}" y="{float(down) + 4:.1f}" '
            f'text-anchor="end">{y:.3g}</text>'
        )
        x = last * part / 4
        across, _, _ = place(x, low).partition(",")
        parts.append(
            f'<text x="{across}" y="{_HEIGHT - 18}" text-anchor="middle">{x:.0f}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 3}" text-anchor="middle">step</text>'
    )
    for name, curve, colour in (
        ("training loss", _thinned(trained), "#4878cf"),
        ("held-out loss", held_out, "#d65f5f"),
    ):
        if not curve:
            continue
        line = " ".join(place(x, y) for x, y in curve)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" '
            'stroke-width="1.5"/>'
        )
        across, down = place(*curve[-1]).split(",")
        parts.append(f'<circle cx="{across}" cy="{down}" r="2.5" fill="{colour}"/>')
        row = _EDGE + (14 if name == "training loss" else 30)
        parts.append(
            f'<text x="{_WIDTH - _EDGE - 4}" y="{row}" text-anchor="end" '
            f'fill="{colour}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _thinned(points: Points) -> Points:
    """As many means of neighbours as can be seen."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], statistics.fmean(y for _, y in part)) for part in parts]


def _draw_png(path: pathlib.Path, trained: Points, held_out: Points) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per target)")
    for name, points in (("training", trained), ("held out", held_out)):
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    if trained or held_out:
        axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _markdown(
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    samples: Sequence[Record],
    image: str,
) -> str:
    lines = ["# Training run", "", f"![loss by step]({image})", ""]
    for title, table in (("Results", found), ("Settings", _given(settings))):
        lines += [f"## {title}", "", "| | |", "|---|---|"]
        for name, value in table.items():
            lines.append(f"| {_cell(name)} | {_cell(value)} |")
        lines.append("")
    if samples:
        lines += ["## Samples", ""]
    for record in samples:
        lines += [f"Behind step {record['step']}:", ""]
        for sample in record["samples"]:
            text = f"{sample['prompt']}\n⟶ {sample['text']}"
            lines += [*(f"    {line}" for line in text.splitlines()), ""]
    return "\n".join(lines)


def _page(
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
    samples: Sequence[Record],
    picture: str,
) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<title>Training run</title><style>body{font-family:sans-serif;max-width:48rem;"
        "margin:2rem auto;padding:0 1rem}td{padding:.1rem 1rem .1rem 0;vertical-align:"
        "top}pre{white-space:pre-wrap;background:#f4f4f4;padding:.6rem}</style>",
        f"<h1>Training run</h1>{picture}",
    ]
    for title, table in (("Results", found), ("Settings", _given(settings))):
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(_text(value))}</td></tr>"
            for name, value in table.items()
        )
        parts.append(f"<h2>{title}</h2><table>{rows}</table>")
    if samples:
        parts.append("<h2>Samples</h2>")
    for record in samples:
        parts.append(f"<h3>Behind step {record['step']}</h3>")
        for sample in record["samples"]:
            text = html.escape(f"{sample['prompt']}\n⟶ {sample['text']}")
            parts.append(f"<pre>{text}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace("_", "-"): value
        for name, value in settings.items()
        if value is not None
    }


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(value: Any) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")
