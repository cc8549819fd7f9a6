"""Which implementation of attention is taken, which is refused, and in what words."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_inputs import inputs
from support.programs import needs_tpu_compiler

from llama_jax.errors import ConfigError
from llama_jax.kernels import Implementation, attention, explain, resolve
from llama_jax.kernels import dispatch as choice
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh


def device(platform: str, **facts: Any) -> Any:
    """What dispatch looks at of a device that is not there; hashable, as they are."""
    return type("Device", (), {"platform": platform, **facts})()


TPU = device("tpu", device_kind="TPU v5 lite")


@pytest.fixture(autouse=True)
def forgotten_probes() -> Iterator[None]:
    """No probe is remembered, before and after."""
    choice.probe.cache_clear()
    yield
    choice.probe.cache_clear()


@pytest.fixture
def kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU runtime that takes Pallas kernels."""
    monkeypatch.setattr(choice, "_compile_small", lambda device: None)


def test_a_cpu_has_plain_operations_only() -> None:
    assert explain(device=jax.devices("cpu")[0]) == ("xla", ())


def test_a_tpu_has_its_kernels(kernels_compile: None) -> None:
    assert str(explain(device=device("tpu", device_kind="TPU v5p"))) == "mosaic_tpu"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"dtype": "float16"}, "computes in bfloat16 or float32, not in float16"),
        ({"head_dim": 512}, "takes heads of up to 256 in steps of 8, not 512"),
        (
            {"queries": 1, "cached": True, "slots": 100},
            "reads a cache of a multiple of 8 slots, not of 100",
        ),
        (
            {"queries": 1, "cached": True, "slots": 64, "quantized": True},
            "reads a cache of a multiple of 128 slots, not of 64",
        ),
        (
            {"queries": 1, "slots": 16, "head_dim": 64, "paged": True},
            "reads a page of a multiple of 128 slots, not of 16",
        ),
        (
            {"queries": 40, "group": 8, "paged": True},
            "takes 128 queries to a head's page, not 320",
        ),
    ],
)
def test_what_a_tpu_kernel_does_not_do_falls_to_xla(
    kernels_compile: None, asked: dict[str, Any], reason: str
) -> None:
    found = explain(device=TPU, **asked)
    assert str(found) == f"xla; not mosaic_tpu: {reason}"


def test_many_queries_over_any_cache_are_no_decoding(kernels_compile: None) -> None:
    tpu = device("tpu", device_kind="TPU v6 lite")
    found = explain(device=tpu, queries=9, cached=True, slots=100)
    assert found.implementation == "mosaic_tpu"


def test_a_v4_reads_eight_bit_slots_by_xla(kernels_compile: None) -> None:
    asked = {"queries": 1, "cached": True, "quantized": True}
    chips = (device("tpu", device_kind=f"TPU {name}") for name in ("v4", "v5 lite"))
    found = [explain(device=chip, **asked).implementation for chip in chips]
    assert found == ["xla", "mosaic_tpu"]


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        (
            "7.5",
            "float16",
            "xla; not cudnn: needs compute capability 8.0 (Ampere), this GPU has 7.5",
        ),
        ("8.0", "bfloat16", "cudnn"),
        ("9.0", "float16", "cudnn"),
        (
            "9.0",
            "float32",
            "xla; not cudnn: computes in bfloat16 or float16, not in float32",
        ),
    ],
)
def test_a_gpu_has_cudnn_from_ampere_on(
    capability: str, dtype: str, expected: str
) -> None:
    gpu = device("gpu", compute_capability=capability)
    assert str(explain(dtype, device=gpu)) == expected


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (
            {"queries": 1, "cached": True},
            "wants slots before heads, for which the cache would be copied",
        ),
        ({"queries": 7, "slots": 7}, "has no gradient for odd lengths"),
        ({"queries": 1, "slots": 16, "paged": True}, "does not read pages"),
        (
            {"queries": 32, "cached": True, "quantized": True},
            "does not read eight-bit slots",
        ),
    ],
)
def test_what_cudnn_does_not_do_well_falls_to_xla(
    asked: dict[str, Any], reason: str
) -> None:
    found = explain(device=device("gpu", compute_capability="9.0"), **asked)
    assert str(found) == f"xla; not cudnn: {reason}"


def test_a_runtime_that_refuses_kernels_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def refuse(device: Any) -> str:
        asked.append(device)
        return "Unsupported version"

    monkeypatch.setattr(choice, "_compile_small", refuse)
    monkeypatch.setattr(choice, "_version", lambda package: "0.0.21.1")
    with pytest.warns(UserWarning, match="falls back to XLA") as heard:
        first = explain(device=TPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(device=TPU) == first
    assert (len(heard), len(asked)) == (1, 1)
    assert first.implementation == "xla"
    assert "libtpu 0.0.21.1 refuses the kernels of jax" in str(first)
    assert re.search(r"run `pip install .*libtpu.*` and restart", str(heard[0].message))


def test_auto_does_on_a_refusing_tpu_what_xla_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [TPU])
    monkeypatch.setattr(choice, "_compile_small", lambda device: "no")
    q, k, v = inputs(4, 2)
    with pytest.warns(UserWarning, match="falls back"):
        found = attention(q, k, v)
    np.testing.assert_array_equal(found, attention(q, k, v, implementation="xla"))


@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu", "triton", "cudnn"])
def test_a_named_implementation_is_never_replaced(name: Implementation) -> None:
    q, k, v = (x.astype("bfloat16") for x in inputs(4, 2))
    q, k, v = (jnp.tile(x, (1, 1, 1, 8)) for x in (q, k, v))  # 64 wide
    assert resolve(name, q, k) == name
    with pytest.raises(Exception, match=r"(?i)interpret|cudnn|gpu|platform|lowering"):
        jax.block_until_ready(attention(q, k, v, implementation=name))


@pytest.mark.parametrize(
    ("name", "dtype", "sentence"),
    [
        ("mosaic_tpu", "float16", "computes in bfloat16 or float32, not in float16"),
        ("cudnn", "float32", "computes in bfloat16 or float16, not in float32"),
        ("mosaic_gpu", "float32", "computes in bfloat16 or float16, not in float32"),
        ("triton", "bfloat16", "takes heads of up to 256 in steps of 16, not 8"),
    ],
)
def test_a_named_implementation_says_what_it_does_not_do(
    name: Implementation, dtype: str, sentence: str
) -> None:
    q, k, v = (x.astype(dtype) for x in inputs(4, 2))
    with pytest.raises(ValueError, match=sentence):
        attention(q, k, v, implementation=name)


@pytest.mark.parametrize("name", get_args(Implementation))
def test_a_runtime_takes_every_implementation(name: Implementation) -> None:
    assert Runtime(attention=name).attention == name


def test_a_runtime_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ConfigError, match="attention is 'flash'; choose from auto"):
        Runtime(attention="flash")  # type: ignore[arg-type]


@needs_tpu_compiler
@pytest.mark.tpu_compile
def test_the_probe_compiles_a_kernel_for_a_real_tpu() -> None:
    found = explain(device=tpu_devices("v5e:2x2")[0])
    assert str(found) == "mosaic_tpu"


@needs_tpu_compiler
@pytest.mark.tpu_compile
def test_the_probe_is_not_disturbed_by_what_is_being_traced() -> None:
    chip = tpu_devices("v5e:2x2")[0]
    mesh = make_mesh({"data": 8})
    found = []

    def traced(x: Any) -> Any:
        found.append(str(explain(device=chip)))
        return x

    place = jax.sharding.PartitionSpec("data")
    run = jax.shard_map(traced, mesh=mesh, in_specs=place, out_specs=place)
    jax.jit(run).lower(jax.ShapeDtypeStruct((8,), jnp.float32))
    assert found
    assert set(found) == {"mosaic_tpu"}


REFUSING = os.environ.get("LLAMA_JAX_REFUSING_LIBTPU", "")


@pytest.mark.tpu_compile
@pytest.mark.skipif(
    not REFUSING or jax.__version_info__ >= (0, 8),
    reason="needs jax 0.7.2, and in LLAMA_JAX_REFUSING_LIBTPU a folder with libtpu "
    "0.0.21.1, as stock Colab has them",
)
def test_stock_colab_falls_back_with_the_remedy() -> None:
    """The real compiler that refuses all Pallas kernels, in a process of its own."""
    program = (
        "from llama_jax.kernels import explain\n"
        "from llama_jax.planning.target_devices import tpu_devices\n"
        "print(explain(device=tpu_devices('v5e:2x2')[0]))\n"
    )
    # This process may have told jax where another libtpu is.
    environment = {k: v for k, v in os.environ.items() if k != "TPU_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": REFUSING},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("xla; not mosaic_tpu: libtpu 0.0.21.1 refuses")
    assert "expected <= 7 but got 8" in done.stdout
    assert done.stderr.count("falls back to XLA") == 1
    assert "run `pip install libtpu==0.0.24` and restart" in done.stderr
