"""`python -m llama_jax.bench decode|prefill`: speed here, beside what is possible."""

import argparse
import datetime
import json
import platform
import re
from collections.abc import Sequence
from typing import Any, get_args

import jax

from llama_jax import __version__, cli
from llama_jax.bench.decode import bench_decode
from llama_jax.bench.prefill import bench_prefill
from llama_jax.config import PRESETS, LlamaConfig, preset
from llama_jax.errors import ConfigError
from llama_jax.model import Llama
from llama_jax.runtime import DType, Runtime

DEFAULT = "L12,D768,N12,F2048,V32000"

_ROWS = {
    "tokens_per_second": ("tokens/s", "{:,.1f}"),
    "milliseconds_per_step": ("milliseconds per step", "{:.2f}"),
    "milliseconds": ("milliseconds", "{:.1f}"),
    "weight_bytes_per_step": ("weight bytes read per step", "{:,}"),
    "cache_slots": ("cache slots", "{:,}"),
    "weights_gb_per_second": ("weights streamed, GB/s", "{:.2f}"),
    "reduction_gb_per_second": ("  1 GiB reduction, GB/s", "{:.2f}"),
    "matvec_gb_per_second": ("  1 GiB matrix-vector product, GB/s", "{:.2f}"),
    "copy_gb_per_second": ("  1 GiB copy (read + write), GB/s", "{:.2f}"),
    "gflops_per_second": ("arithmetic, GFLOP/s", "{:,.1f}"),
    "matmul_gflops_per_second": ("  matrix product, GFLOP/s", "{:,.1f}"),
    "ratio": ("ratio to the highest of the machine's", "{:.2f}"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark and print a table, or with `--json` one object."""
    args = parse(argv)
    config = parse_model(args.model)
    model = Llama(config, Runtime(dtype=args.dtype))
    sizes = {"batch": args.batch, "prompt_length": args.prompt_length}
    if args.what == "decode":
        figures = bench_decode(model, **sizes, steps=args.steps, repeats=args.repeats)
    else:
        figures = bench_prefill(model, **sizes, repeats=args.repeats)
    device = jax.devices()[0]
    facts: dict[str, Any] = {
        "benchmark": args.what,
        "model": args.model,
        "dtype": args.dtype,
        **sizes,
        "device": device.device_kind or device.platform,
        "host": platform.machine(),
        "jax": jax.__version__,
        "llama_jax": __version__,
        "date": datetime.date.today().isoformat(),
    }
    if args.json:
        print(json.dumps(facts | figures))
        return 0
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, value in figures.items():
        label, form = _ROWS[name]
        print(f"{label:<40} {form.format(value):>16}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.bench",
        description="Measure the library on this machine, with random weights, beside "
        "the machine's own limits measured in the same run.",
    )
    parser.add_argument(
        "what",
        choices=("decode", "prefill"),
        help="decode: bytes of weights streamed per second, greedy; prefill: "
        "arithmetic per second of a prompt",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT,
        metavar="NAME|SHAPE",
        help=f"a preset, or a shape such as the default, {DEFAULT} (134M parameters); "
        "K and H may be given too",
    )
    parser.add_argument("--dtype", choices=get_args(DType), default="float32")
    parser.add_argument("--batch", type=cli.positive, default=1, metavar="B")
    parser.add_argument(
        "--prompt-length",
        type=cli.positive,
        metavar="T",
        help="tokens (default: 16 for decode, 512 for prefill)",
    )
    parser.add_argument(
        "--steps", type=cli.positive, default=64, help="of decoding (default: 64)"
    )
    parser.add_argument(
        "--repeats", type=cli.positive, default=5, help="the best of them counts"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.prompt_length is None:
        args.prompt_length = 16 if args.what == "decode" else 512
    return args


def parse_model(text: str) -> LlamaConfig:
    """A preset's name, or letters with sizes: `L12,D768,N12,F2048,V32000`."""
    if text in PRESETS or "," not in text:
        return preset(text)
    letters = dict(re.findall(r"([LDNKHFV])(\d+)(?:,|$)", text))
    if {*"LDNFV"} - letters.keys() or text.count(",") != len(letters) - 1:
        raise ConfigError(
            f"model {text!r}: write a preset, or L, D, N, F and V (K and H if they "
            f"matter), each with its size, as in {DEFAULT}"
        )
    sizes = {letter: int(size) for letter, size in letters.items()}
    return LlamaConfig(
        vocab_size=sizes["V"],
        num_layers=sizes["L"],
        embed_dim=sizes["D"],
        num_heads=sizes["N"],
        num_kv_heads=sizes.get("K", sizes["N"]),
        head_dim=sizes.get("H", sizes["D"] // max(sizes["N"], 1)),
        mlp_dim=sizes["F"],
        max_seq_len=4096,
        rope_theta=1e4,
        norm_eps=1e-5,
        tied_embeddings=False,
    )


if __name__ == "__main__":
    cli.run(main)
