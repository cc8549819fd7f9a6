"""What the benchmarks found, as rows of a table: names and figures with their units."""

from llama_jax.bench.conversion import ConversionReport
from llama_jax.bench.data import DataReport
from llama_jax.bench.decode import DecodeReport
from llama_jax.bench.prefill import PrefillReport
from llama_jax.bench.train import TrainReport


def conversion_rows(report: ConversionReport) -> dict[str, str]:
    """What converting took."""
    before, after = report.copy_seconds
    return {
        "parameters": f"{report.params:,}",
        "source": f"{report.source_bytes / 1e9:,.2f} GB",
        "conversion": f"{report.seconds:,.1f} s ({report.gb_per_s:,.2f} GB/s)",
        "copies before, after": f"{before:,.1f} s, {after:,.1f} s",
        "part of a copy's speed": f"{report.ratio:.0%}",
        "host memory before": f"{report.base_bytes / 1e6:,.0f} MB",
        "host memory at most": f"{report.peak_bytes / 1e6:,.0f} MB (mapped files and "
        "page cache not counted)",
        "predicted": f"{report.predicted_bytes / 1e6:,.0f} MB",
    }


def data_rows(report: DataReport) -> dict[str, str]:
    """What loading took."""
    return {
        "records": f"{report.records:,}",
        "tokens": f"{report.tokens:,} ({report.fill_rate:.1%} of the slots)",
        "opening": f"{report.open_seconds:.2f} s",
        "loader": f"{report.tokens_per_s:,.0f} tokens/s",
        "reading alone": f"{report.read_tokens_per_s:,.0f} tokens/s",
        "tokenizing alone": f"{report.encode_tokens_per_s:,.0f} tokens/s",
        "packing alone": f"{report.pack_tokens_per_s:,.0f} tokens/s",
    }


def decode_rows(report: DecodeReport) -> dict[str, str]:
    """How fast tokens are written."""
    limits = report.bandwidth
    return {
        "parameters": f"{report.params:,}",
        "weights read per step": f"{report.weight_bytes / 1e6:,.1f} MB",
        "cache slots per row": str(report.cache_slots),
        "decoding": f"{report.tokens_per_s:,.1f} tokens/s "
        f"(median {report.median_tokens_per_s:,.1f})",
        "weights streamed": f"{report.gb_per_s:,.1f} GB/s",
        "1 GiB reduction": f"{limits.reduction:,.1f} GB/s",
        "1 GiB matrix-vector": f"{limits.matvec:,.1f} GB/s",
        "1 GiB copy (both ways)": f"{limits.copy:,.1f} GB/s",
        "part of the highest": f"{report.ratio:.0%}",
    }


def prefill_rows(report: PrefillReport) -> dict[str, str]:
    """How fast prompts are read."""
    return {
        "parameters": f"{report.params:,}",
        "work per prefill": f"{report.flops / 1e9:,.1f} GFLOP",
        "prefill": f"{report.tokens_per_s:,.1f} tokens/s "
        f"(median {report.median_tokens_per_s:,.1f})",
        "rate": f"{report.gflops_per_s:,.1f} GFLOP/s",
        "matrix product": f"{report.matmul.gflops:,.1f} GFLOP/s "
        f"(size {report.matmul.size})",
        "part of it": f"{report.ratio:.0%}",
    }


def train_rows(report: TrainReport) -> dict[str, str]:
    """How fast steps are taken."""
    rows = {
        "parameters": f"{report.params:,}",
        "work per step": f"{report.flops / 1e9:,.1f} GFLOP",
        "compiling": f"{report.compile_seconds:,.1f} s",
        "step": f"{report.seconds * 1e3:,.1f} ms "
        f"(fastest {report.best_seconds * 1e3:,.1f})",
        "training": f"{report.tokens_per_s:,.1f} tokens/s",
        "rate": f"{report.gflops_per_s:,.1f} GFLOP/s",
        "matrix product": f"{report.matmul.gflops:,.1f} GFLOP/s "
        f"(size {report.matmul.size})",
        "part of it": f"{report.ratio:.0%}",
    }
    if report.mfu is not None:
        rows["part of the chip's peak"] = f"{report.mfu:.0%}"
    if report.peer is not None:
        rows[report.peer.name] = (
            f"{report.peer.seconds * 1e3:,.1f} ms "
            f"({report.peer.tokens_per_s:,.1f} tokens/s)"
        )
        rows["times as fast"] = f"{report.peer.speedup:.2f}"
    return rows
