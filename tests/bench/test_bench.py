"""The benchmarks of decoding and prefill run, and count their bytes and FLOPs."""

import json

import pytest
from support.commands import run_command
from support.models import TINY

from llama_jax.bench import decode, machine, prefill
from llama_jax.bench.__main__ import main
from llama_jax.bench.machine import Bandwidth, MatmulRate
from llama_jax.errors import ConfigError
from llama_jax.model.presets import EXAMPLE_MODEL, parse_model, preset
from llama_jax.params import count_params, param_shapes
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, parse_mesh

SHAPE = "L2,D32,N4,K2,F48,V96"


def test_the_default_shape_has_134_million_parameters() -> None:
    assert count_params(param_shapes(parse_model(EXAMPLE_MODEL, 128))) == 134_105_856


def test_a_model_is_a_preset_or_a_shape() -> None:
    assert parse_model("llama2-7b", 128) == preset("llama2-7b")
    assert parse_model(SHAPE, 64) == TINY
    tied = TINY.replace(tied_embeddings=True)
    assert parse_model(f"{SHAPE},tied", 64) == tied


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("llama2-7", "did you mean 'llama2-7b'"),
        ("L2,D32,N4,F48", "lacks V"),
        ("L2,D32,N4,F48,V96,X3", "'X3' is not a letter"),
        ("L2,D32,N4,F48,V96,V97", "'V97' is not a letter"),
        ("L2,D32,N3,K2,F48,V96", "not a multiple"),
        ("L2,D32,N0,F48,V96", "num_heads is 0"),
    ],
)
def test_an_invalid_model_is_an_error(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_model(text, 64)


def test_a_step_reads_all_weights_but_the_embedding() -> None:
    layer = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    read = 2 * layer + 32 + 32 * 96
    assert decode.weight_bytes_per_step(TINY, Runtime()) == 4 * read
    half = Runtime(dtype="bfloat16")
    assert decode.weight_bytes_per_step(TINY, half) == 2 * read
    # Tied, the head reads the embedding.
    tied = TINY.replace(tied_embeddings=True)
    assert decode.weight_bytes_per_step(tied, Runtime()) == 4 * read


def test_a_device_reads_its_part_of_the_weights() -> None:
    whole, half = (
        decode.weight_bytes_per_step(TINY, Runtime(), make_mesh(parse_mesh(text)))
        for text in ("data=8", "data=4,tensor=2")
    )
    assert whole == decode.weight_bytes_per_step(TINY, Runtime())
    norms = 4 * TINY.embed_dim * (2 * TINY.num_layers + 1)  # replicated
    assert half - norms == (whole - norms) // 2


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of the machine that take no time to measure."""
    rates = Bandwidth(reduction=10.0, matvec=12.0, copy=8.0)
    monkeypatch.setattr(decode, "measure_bandwidth", lambda: rates)
    rate = MatmulRate(gflops=10.0, size="8,8,8")
    monkeypatch.setattr(prefill, "measure_matmul_rate", lambda *_: rate)


FLAGS = ("--model", SHAPE, "--prompt-length", "8", "--steps", "1", "--batch", "2")


@pytest.mark.parametrize(
    ("benchmark", "limit", "per_second"),
    [("decode", 12, "gb_per_s"), ("prefill", 10, "gflops_per_s")],
)
def test_a_benchmark_reports_its_rate_and_the_machines(
    benchmark: str, limit: int, per_second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([benchmark, *FLAGS, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["benchmark"], report["model"]) == (benchmark, SHAPE)
    assert report["tokens_per_s"] >= report["median_tokens_per_s"] > 0
    assert report["ratio"] == pytest.approx(report[per_second] / limit)


@pytest.mark.parametrize("benchmark", ["decode", "prefill"])
def test_rates_on_a_mesh_are_per_device(
    benchmark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = ["--mesh", "data=-1,tensor=4"]
    assert main([benchmark, *FLAGS, *mesh, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mesh"] == "data=-1,tensor=4"
    if benchmark == "prefill":
        per_device = report["gflops_per_s"] / 8
        assert report["ratio"] == pytest.approx(per_device / 10)


def test_the_table_has_rates_and_their_ratio(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["decode", *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"decode: {SHAPE}\n")
    assert "tokens/s" in printed
    assert "fraction of the highest" in printed


def test_the_machines_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for squares in ("_CPU_SQUARES", "_ACCELERATOR_SQUARES"):
        monkeypatch.setattr(machine, squares, (32,))
    monkeypatch.setattr(machine, "_RUN_SECONDS", 1e-4)
    rate = machine.measure_matmul_rate(TINY, 16, "float32", repeats=1)
    assert rate.gflops > 0
    assert rate.size in ("32,32,32", "16,32,32", "16,32,48", "16,48,32")
    rates = machine.measure_bandwidth(size=1 << 20, repeats=1)
    assert rates.best == max(rates.reduction, rates.matvec, rates.copy) > 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["decode", "--steps", "0"], "--steps: '0' is not a positive integer"),
        (["prefill", "--model", "L1"], "lacks"),
        (["decode", *FLAGS, "--mesh", "tensor=3"], "tensor=3"),
    ],
)
def test_invalid_arguments_end_with_status_2(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run_command(main, capsys, *flags)
    assert status == 2
    assert reason in err
