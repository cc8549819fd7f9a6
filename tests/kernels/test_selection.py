"""Which implementation of attention is selected, which is rejected, and why."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any, get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_inputs import inputs
from support.programs import needs_tpu_compiler

from llama_jax.errors import ConfigError
from llama_jax.kernels import Implementation, attention, explain, resolve, selection
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh


def device(platform: str, **facts: Any) -> Any:
    """A device that is not there, with the properties that a selection depends on."""
    return mock.Mock(spec=jax.Device, platform=platform, **facts)


TPU = device("tpu", device_kind="TPU v5 lite")


@pytest.fixture(autouse=True)
def cleared_probes() -> Iterator[None]:
    """Every test probes again."""
    selection.probe.cache_clear()
    yield
    selection.probe.cache_clear()


@pytest.fixture
def kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU runtime that accepts Pallas kernels."""
    monkeypatch.setattr(selection, "_compile_small", lambda device: None)


def test_auto_selects_plain_operations_on_a_cpu() -> None:
    assert explain(device=jax.devices("cpu")[0]) == ("xla", ())


def test_auto_selects_the_tpu_kernels_on_a_tpu(kernels_compile: None) -> None:
    assert str(explain(device=device("tpu", device_kind="TPU v5p"))) == "mosaic_tpu"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dtype": "float16"}, "requires bfloat16 or float32, not float16"),
        (
            {"head_dim": 512},
            "requires head_dim to be a multiple of 8, at most 256, not 512",
        ),
        (
            {"queries": 1, "cached": True, "slots": 100},
            "requires a cache of a multiple of 8 slots, not 100",
        ),
        (
            {"queries": 1, "cached": True, "slots": 64, "quantized": True},
            "requires a cache of a multiple of 128 slots, not 64",
        ),
        (
            {"queries": 1, "slots": 16, "head_dim": 64, "paged": True},
            "requires pages of a multiple of 128 slots, not 16",
        ),
        (
            {"queries": 40, "group": 8, "paged": True},
            "requires at most 128 query rows per key/value head, not 320",
        ),
    ],
)
def test_auto_selects_xla_for_calls_that_tpu_kernels_do_not_support(
    kernels_compile: None, call: dict[str, Any], reason: str
) -> None:
    assert str(explain(device=TPU, **call)) == f"xla; not mosaic_tpu: {reason}"


def test_many_queries_over_a_cache_do_not_count_as_decoding(
    kernels_compile: None,
) -> None:
    tpu = device("tpu", device_kind="TPU v6 lite")
    selected = explain(device=tpu, queries=9, cached=True, slots=100)
    assert selected.implementation == "mosaic_tpu"


def test_auto_selects_xla_for_an_int8_cache_on_a_v4(kernels_compile: None) -> None:
    call: dict[str, Any] = {"queries": 1, "cached": True, "quantized": True}
    chips = (device("tpu", device_kind=f"TPU {name}") for name in ("v4", "v5 lite"))
    selected = [explain(device=chip, **call).implementation for chip in chips]
    assert selected == ["xla", "mosaic_tpu"]


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        (
            "7.5",
            "float16",
            "xla; not cudnn: requires compute capability 8.0 (Ampere), not 7.5",
        ),
        ("8.0", "bfloat16", "cudnn"),
        ("9.0", "float16", "cudnn"),
        (
            "9.0",
            "float32",
            "xla; not cudnn: requires bfloat16 or float16, not float32",
        ),
    ],
)
def test_auto_selects_cudnn_from_ampere_on(
    capability: str, dtype: str, expected: str
) -> None:
    gpu = device("gpu", compute_capability=capability)
    assert str(explain(dtype, device=gpu)) == expected


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            {"queries": 1, "cached": True},
            "requires slots before heads, which would copy the cache",
        ),
        ({"queries": 7, "slots": 7}, "has no gradient for odd lengths"),
        ({"queries": 1, "slots": 16, "paged": True}, "does not support paged caches"),
        (
            {"queries": 32, "cached": True, "quantized": True},
            "does not support int8 slots",
        ),
    ],
)
def test_auto_selects_xla_for_calls_that_cudnn_does_not_suit(
    call: dict[str, Any], reason: str
) -> None:
    gpu = device("gpu", compute_capability="9.0")
    assert str(explain(device=gpu, **call)) == f"xla; not cudnn: {reason}"


def test_a_runtime_that_rejects_kernels_is_probed_and_warned_about_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_small = mock.Mock(return_value="Unsupported version")
    monkeypatch.setattr(selection, "_compile_small", compile_small)
    monkeypatch.setattr(selection, "_version", lambda package: "0.0.21.1")
    with pytest.warns(UserWarning, match="falls back to XLA") as caught:
        first = explain(device=TPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(device=TPU) == first
    assert (len(caught), compile_small.call_count) == (1, 1)
    assert first.implementation == "xla"
    assert "libtpu 0.0.21.1 rejects the kernels of jax" in str(first)
    message = str(caught[0].message)
    assert re.search(r"to fix this, run `pip install .*libtpu.*` and restart", message)


def test_auto_equals_xla_on_a_tpu_that_rejects_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [TPU])
    monkeypatch.setattr(selection, "_compile_small", lambda device: "no")
    q, k, v = inputs(4, 2)
    with pytest.warns(UserWarning, match="falls back"):
        out = attention(q, k, v)
    np.testing.assert_array_equal(out, attention(q, k, v, implementation="xla"))


@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu", "triton", "cudnn"])
def test_a_named_implementation_never_falls_back(name: Implementation) -> None:
    q, k, v = (x.astype("bfloat16") for x in inputs(4, 2))
    q, k, v = (jnp.tile(x, (1, 1, 1, 8)) for x in (q, k, v))  # 64 wide
    assert resolve(name, q, k) == name
    with pytest.raises(Exception, match=r"(?i)interpret|cudnn|gpu|platform|lowering"):
        jax.block_until_ready(attention(q, k, v, implementation=name))


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("mosaic_tpu", "float16", "requires bfloat16 or float32, not float16"),
        ("cudnn", "float32", "requires bfloat16 or float16, not float32"),
        ("mosaic_gpu", "float32", "requires bfloat16 or float16, not float32"),
        (
            "triton",
            "bfloat16",
            "requires head_dim to be a multiple of 16, at most 256, not 8",
        ),
    ],
)
def test_a_named_implementation_reports_what_it_does_not_support(
    name: Implementation, dtype: str, reason: str
) -> None:
    q, k, v = (x.astype(dtype) for x in inputs(4, 2))
    with pytest.raises(ValueError, match=reason):
        attention(q, k, v, implementation=name)


def test_an_unknown_implementation_is_rejected() -> None:
    call = selection.AttentionCall("float32", head_dim=8, queries=6, slots=6)
    with pytest.raises(ValueError, match="'flash' does not exist; choose from auto"):
        selection.check("flash", call)


@pytest.mark.parametrize("name", get_args(Implementation))
def test_a_runtime_accepts_every_implementation(name: Implementation) -> None:
    assert Runtime(attention=name).attention == name


@pytest.mark.wrong_types
def test_a_runtime_rejects_an_unknown_implementation() -> None:
    with pytest.raises(ConfigError, match="attention is 'flash'; choose from auto"):
        Runtime(attention="flash")  # type: ignore[arg-type]


@needs_tpu_compiler
@pytest.mark.tpu_compile
def test_the_probe_compiles_a_kernel_for_a_real_tpu() -> None:
    assert str(explain(device=tpu_devices("v5e:2x2")[0])) == "mosaic_tpu"


@needs_tpu_compiler
@pytest.mark.tpu_compile
def test_the_probe_is_independent_of_a_trace_in_progress() -> None:
    chip = tpu_devices("v5e:2x2")[0]
    mesh = make_mesh({"data": 8})
    selected = []

    def traced(x: Any) -> Any:
        selected.append(str(explain(device=chip)))
        return x

    spec = jax.sharding.PartitionSpec("data")
    run = jax.shard_map(traced, mesh=mesh, in_specs=spec, out_specs=spec)
    jax.jit(run).lower(jax.ShapeDtypeStruct((8,), jnp.float32))
    assert selected
    assert set(selected) == {"mosaic_tpu"}


REJECTING = os.environ.get("LLAMA_JAX_REFUSING_LIBTPU", "")


@pytest.mark.tpu_compile
@pytest.mark.skipif(
    not REJECTING or jax.__version_info__ >= (0, 8),
    reason="needs jax 0.7.2, and in LLAMA_JAX_REFUSING_LIBTPU a folder with libtpu "
    "0.0.21.1, the versions of stock Colab",
)
def test_stock_colab_falls_back_with_a_warning_that_says_how_to_fix_it() -> None:
    """The real compiler, which rejects all Pallas kernels, in a process of its own."""
    program = (
        "from llama_jax.kernels import explain\n"
        "from llama_jax.planning.target_devices import tpu_devices\n"
        "print(explain(device=tpu_devices('v5e:2x2')[0]))\n"
    )
    # This process may use another libtpu.
    environment = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": REJECTING},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("xla; not mosaic_tpu: libtpu 0.0.21.1 rejects")
    assert "expected <= 7 but got 8" in done.stdout
    assert done.stderr.count("falls back to XLA") == 1
    assert "run `pip install libtpu==0.0.24` and restart" in done.stderr
