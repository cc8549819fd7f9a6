"""Reports of benchmarks as rows of a table: names, and values with units."""

from collections.abc import Iterable

from llama_jax.bench.conversion import ConversionReport
from llama_jax.bench.data import DataReport
from llama_jax.bench.decode import DecodeReport
from llama_jax.bench.learning import LearningReport
from llama_jax.bench.prefill import PrefillReport
from llama_jax.bench.serve import ServeReport
from llama_jax.bench.train import TrainReport


def conversion_rows(report: ConversionReport) -> dict[str, str]:
    """Rows of a conversion."""
    before, after = report.copy_seconds
    return {
        "parameters": f"{report.params:,}",
        "source": f"{report.source_bytes / 1e9:,.2f} GB",
        "conversion": f"{report.seconds:,.1f} s ({report.gb_per_s:,.2f} GB/s)",
        "copies before, after": f"{before:,.1f} s, {after:,.1f} s",
        "speed of a copy": f"{report.ratio:.0%}",
        "host memory before": f"{report.base_bytes / 1e6:,.0f} MB",
        "peak host memory": f"{report.peak_bytes / 1e6:,.0f} MB (without mapped files "
        "and page cache)",
        "predicted peak": f"{report.predicted_bytes / 1e6:,.0f} MB",
    }


def data_rows(report: DataReport) -> dict[str, str]:
    """Rows of data loading."""
    return {
        "records": f"{report.records:,}",
        "tokens": f"{report.tokens:,} ({report.fill_rate:.1%} of all slots)",
        "indexing": f"{report.open_seconds:.2f} s",
        "loader": f"{report.tokens_per_s:,.0f} tokens/s",
        "reading alone": f"{report.read_tokens_per_s:,.0f} tokens/s",
        "tokenizing alone": f"{report.encode_tokens_per_s:,.0f} tokens/s",
        "packing alone": f"{report.pack_tokens_per_s:,.0f} tokens/s",
    }


def decode_rows(report: DecodeReport) -> dict[str, str]:
    """Rows of decoding."""
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
        "1 GiB copy (read and write)": f"{limits.copy:,.1f} GB/s",
        "fraction of the highest": f"{report.ratio:.0%}",
    }


def serve_rows(report: ServeReport) -> dict[str, str]:
    """Rows of serving."""
    return {
        "compilation": f"{report.compile_seconds:,.1f} s",
        "a client per lane": f"{report.tokens_per_s:,.1f} tokens/s",
        "generate, same batch": f"{report.generate_tokens_per_s:,.1f} tokens/s",
        "ratio": f"{report.ratio:.2f}",
        "one client": f"{report.client_tokens_per_s:,.1f} tokens/s",
        "ratio to generate's row": f"{report.client_ratio:.2f}",
        "generate, one prompt": f"{report.alone_tokens_per_s:,.1f} tokens/s",
    }


def prefill_rows(report: PrefillReport) -> dict[str, str]:
    """Rows of prefill."""
    return {
        "parameters": f"{report.params:,}",
        "FLOPs per prefill": f"{report.flops / 1e9:,.1f} GFLOP",
        "prefill": f"{report.tokens_per_s:,.1f} tokens/s "
        f"(median {report.median_tokens_per_s:,.1f})",
        "rate": f"{report.gflops_per_s:,.1f} GFLOP/s",
        "matrix product": f"{report.matmul.gflops:,.1f} GFLOP/s "
        f"(size {report.matmul.size})",
        "fraction of it": f"{report.ratio:.0%}",
    }


def train_rows(report: TrainReport) -> dict[str, str]:
    """Rows of training."""
    rows = {
        "parameters": f"{report.params:,}",
        "FLOPs per step": f"{report.flops / 1e9:,.1f} GFLOP",
        "compilation": f"{report.compile_seconds:,.1f} s",
        "step": f"{report.seconds * 1e3:,.1f} ms "
        f"(fastest {report.best_seconds * 1e3:,.1f})",
        "training": f"{report.tokens_per_s:,.1f} tokens/s",
        "rate": f"{report.gflops_per_s:,.1f} GFLOP/s",
        "matrix product": f"{report.matmul.gflops:,.1f} GFLOP/s "
        f"(size {report.matmul.size})",
        "fraction of it": f"{report.ratio:.0%}",
    }
    if report.mfu is not None:
        rows["MFU of the chip's peak"] = f"{report.mfu:.0%}"
    if report.peer is not None:
        rows[report.peer.name] = (
            f"{report.peer.seconds * 1e3:,.1f} ms "
            f"({report.peer.tokens_per_s:,.1f} tokens/s)"
        )
        rows["speedup"] = f"{report.peer.speedup:.2f}"
    return rows


def learning_rows(report: LearningReport) -> dict[str, str]:
    """Rows of learning from preferences and rewards."""

    def numbers(values: Iterable[float], form: str) -> str:
        return "  ".join(form.format(value) for value in values)

    rows = {}
    for name, result in report.policy.items():
        rows[name] = (
            f"reward {result.first:.3f} to {result.last:.3f} "
            f"({numbers(result.last_by_seed, '{:.3f}')}), KL {result.kl:.2f} nats"
        )
    for rated in report.ratings:
        rows[f"margins {rated.margins}"] = (
            f"accuracy {numbers(rated.accuracy, '{:.1%}')}, difference of scores "
            f"{numbers(rated.difference, '{:.2f}')}, by rating"
        )
    if report.reward is not None:
        rewards = report.reward
        rows |= {
            "held-out pairs": f"{rewards.pairs:,}",
            "reward model": f"{rewards.accuracy:.1%} ± {rewards.error:.1%}",
            "the shorter dialog": f"{rewards.shorter:.1%}",
            "bag of words": f"{rewards.bag_of_words:.1%}",
            "in training": f"{rewards.training_accuracy:.1%}",
            "score and length": f"correlation {rewards.length_correlation:+.3f}",
            "by quartile": f"{numbers(rewards.by_quartile, '{:.1%}')} (bag of words "
            f"{numbers(rewards.bag_by_quartile, '{:.1%}')})",
        }
    for name, direct in report.dpo.items():
        rows[f"DPO, {name}"] = (
            f"margin {direct.margin:+.3f} ± {direct.error:.3f}, accuracy "
            f"{direct.accuracy:.1%}, chosen {direct.chosen_reward:+.3f}, "
            f"{direct.pairs:,} held-out pairs"
        )
    return rows
