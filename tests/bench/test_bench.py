"""The benchmarks: what they count, and that they run."""

import functools
import json

import pytest
from support.models import TINY

from llama_jax.bench import __main__ as entry
from llama_jax.bench import decode, machine, prefill
from llama_jax.errors import ConfigError
from llama_jax.params import count_params, param_shapes
from llama_jax.presets import EXAMPLE_MODEL, parse_model, preset
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, parse_mesh

SHAPE = "L2,D32,N4,K2,F48,V96"


def test_the_default_shape_has_134_million_parameters() -> None:
    assert count_params(param_shapes(parse_model(EXAMPLE_MODEL, 128))) == 134_105_856


def test_a_model_is_named_by_preset_or_by_letters() -> None:
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
def test_a_model_that_is_not_understood_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_model(text, 64)


def test_a_step_reads_all_weights_but_of_the_embedding_one_row() -> None:
    layer = 2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    read = 2 * layer + 32 + 32 * 96
    assert decode.weight_bytes_per_step(TINY, Runtime()) == 4 * read
    half = Runtime(dtype="bfloat16")
    assert decode.weight_bytes_per_step(TINY, half) == 2 * read
    # Tied, the embedding is what the head reads.
    tied = TINY.replace(tied_embeddings=True)
    assert decode.weight_bytes_per_step(tied, Runtime()) == 4 * read


def test_a_device_reads_its_part_of_the_weights() -> None:
    whole, half = (
        decode.weight_bytes_per_step(TINY, Runtime(), make_mesh(parse_mesh(text)))
        for text in ("data=8", "data=4,tensor=2")
    )
    assert whole == decode.weight_bytes_per_step(TINY, Runtime())
    norms = 4 * TINY.embed_dim * (2 * TINY.num_layers + 1)  # are whole everywhere
    assert half - norms == (whole - norms) // 2


@pytest.fixture
def brief_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory's rate from a look at a megabyte."""
    small = functools.partial(machine.bandwidth, size=1 << 20, repeats=2)
    monkeypatch.setattr(decode, "bandwidth", small)


@pytest.mark.usefixtures("brief_bandwidth")
@pytest.mark.parametrize("benchmark", ["decode", "prefill"])
def test_a_mesh_is_measured_whole(
    benchmark: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--model", SHAPE, "--prompt-length", "8", "--steps", "1", "--batch", "2"]
    assert entry.main([benchmark, *asked, "--mesh", "data=-1,tensor=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == "data=-1,tensor=4"
    if benchmark == "prefill":
        of_each = found["gflops_per_s"] / 8
        assert found["ratio"] == pytest.approx(of_each / found["matmul"]["gflops"])
    assert entry.main([benchmark, *asked, "--mesh", "tensor=3"]) == 2
    assert "tensor" in capsys.readouterr().err


def test_prefill_counts_each_useful_multiplication_twice() -> None:
    useful = 0
    for query in range(5):
        useful += 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
        useful += 2 * 4 * 8 * 2 * (query + 1)
    useful += 32 * 96
    assert prefill.prefill_flops(TINY, 1, 5) == 2 * useful
    assert prefill.prefill_flops(TINY, 3, 5) == 3 * 2 * useful


@pytest.mark.usefixtures("brief_bandwidth")
@pytest.mark.parametrize("benchmark", ["decode", "prefill"])
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "table"])
def test_a_benchmark_reports_both_figures_and_their_ratio(
    benchmark: str,
    as_json: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workload = ["--prompt-length", "8", "--steps", "3", "--batch", "2"]
    output = ["--json"] if as_json else []
    assert entry.main([benchmark, "--model", SHAPE, *workload, *output]) == 0
    printed = capsys.readouterr().out
    if not as_json:
        assert "tokens/s" in printed
        assert "part of" in printed
        return
    found = json.loads(printed)
    assert (found["benchmark"], found["model"]) == (benchmark, SHAPE)
    assert found["tokens_per_s"] >= found["median_tokens_per_s"] > 0
    if benchmark == "decode":
        limit = max(found["bandwidth"].values())
        assert found["ratio"] == pytest.approx(found["gb_per_s"] / limit)
    else:
        limit = found["matmul"]["gflops"]
        assert found["ratio"] == pytest.approx(found["gflops_per_s"] / limit)


def test_arguments_that_make_no_sense_end_with_status_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert entry.main(["decode", "--steps", "0"]) == 2
    assert entry.main(["prefill", "--model", "L1"]) == 2
    assert "--steps is 0" in capsys.readouterr().err
