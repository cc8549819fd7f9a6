"""What fits where: every preset on common hardware."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from llama_jax.config import LlamaConfig
from llama_jax.model.presets import PRESETS
from llama_jax.planning.search import can_fit
from llama_jax.planning.topology import Topology, parse_topology
from llama_jax.planning.workload import Quantization, Task, Workload

COMMON_HARDWARE = {
    "v5e:1x1": "Colab",
    "v5e:2x4": "Kaggle",
    "t4": "",
    "a100-40": "",
    "h100": "",
    "v5p:2x2x1": "v5p-8 cores",
    "v5p:2x2x2": "",
    "v5e:4x4": "",
    "v5e:16x16": "",
}
"""Topologies of the table, with the services that offer them or other names."""

DEFAULT_SEQ = 4096
"""Tokens per row by default, if the model's context is not shorter."""


class Row(TypedDict):
    """A model, and by topology the widest weights and the fullest training that fit."""

    model: str
    fits: dict[str, dict[str, str | None]]


def what_fits(seq: int | None) -> list[Row]:
    """Find what fits where, for every preset on common hardware.

    Args:
      seq: tokens per row; by default 4096, or the model's context if that is shorter.
    """
    known: dict[LlamaConfig, dict[str, dict[str, str | None]]] = {}
    rows: list[Row] = []
    for name, config in PRESETS.items():
        if config not in known:
            known[config] = {
                text: _widest(config, parse_topology(text), seq)
                for text in COMMON_HARDWARE
            }
        rows.append({"model": name, "fits": known[config]})
    return rows


def _widest(
    config: LlamaConfig, topology: Topology, seq: int | None
) -> dict[str, str | None]:
    work = Workload(
        config=config,
        task="decode",
        batch=1,
        seq=seq or min(config.max_seq_len, DEFAULT_SEQ),
        dtype=topology.chip.dtype,
        flash=topology.chip.flash,
        gpu=topology.chip.is_gpu,
    )
    weights: tuple[Quantization, ...] = ("none", "int8", "int4")
    decode = next(
        (
            topology.chip.dtype if quantize == "none" else quantize
            for quantize in weights
            if can_fit(work.replace(quantize=quantize), topology)
        ),
        None,
    )
    tasks: tuple[Task, ...] = ("train", "lora", "qlora")
    train = next(
        (
            task
            for task in tasks
            if can_fit(
                work.replace(task=task, quantize="int4" if task == "qlora" else "none"),
                topology,
            )
        ),
        None,
    )
    return {"decode": decode, "train": train}


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Format the table in Markdown."""
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

    def cell(fits: Mapping[str, str | None]) -> str:
        decode, train = fits["decode"] or "–", fits["train"] or "–"
        return "–" if decode == train else f"{short.get(decode, decode)} · {train}"

    heads = [f"{text} ({a})" if a else text for text, a in COMMON_HARDWARE.items()]
    cells = [["", *heads]]
    for row in rows:
        cells.append([row["model"], *map(cell, row["fits"].values())])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [
        *("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells),
        "",
        "Each cell: the widest weights with which one row of 4,096 tokens (or the "
        "model's context,",
        "or --seq) decodes, and the fullest training (train, lora, qlora) of one row "
        "per chip. By formula.",
    ]
