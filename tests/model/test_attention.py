"""Attention by a kernel on a mesh: cut along rows and heads, joined to the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from support.models import TINY, random_tokens
from support.programs import needs_tpu_compiler
from support.tolerances import EQUAL_FORWARD, EQUAL_GRADIENT

from llama_jax.kernels import reference
from llama_jax.model import attention as attending
from llama_jax.model.attention import attend
from llama_jax.model.presets import preset
from llama_jax.model.transformer import Llama
from llama_jax.params import param_shapes
from llama_jax.planning.target_devices import tpu_devices
from llama_jax.runtime import LayerLayout, Runtime
from llama_jax.sharding import make_mesh, param_shardings, parse_mesh

Shapes = list[tuple[int, ...]]
KERNEL = Runtime(attention="mosaic_tpu")

pytestmark = pytest.mark.skipif(
    len(jax.devices()) < 8, reason="needs eight devices (tests/conftest.py)"
)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Shapes of q and k that a kernel gets; plain operations take its shardings."""
    shapes: Shapes = []

    def kernel(q: Any, k: Any, v: Any, **rest: Any) -> Any:
        assert rest.pop("implementation") == "mosaic_tpu"
        shapes.extend((q.shape, k.shape))
        return reference.attention(q, k, v, **rest)

    monkeypatch.setattr(attending.kernels, "attention", kernel)
    return shapes


def inputs(rows: int, heads: int, kv_heads: int, slots: int = 16) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = (
        (rows, 16, heads, 8),
        (rows, kv_heads, slots, 8),
        (rows, kv_heads, slots, 8),
    )
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("mesh", "heads", "local"),
    [
        ("data=8", (4, 2), [(1, 16, 4, 8), (1, 2, 16, 8)]),
        ("data=2,tensor=4", (8, 4), [(4, 16, 2, 8), (4, 1, 16, 8)]),
        ("data=2,tensor=4", (8, 2), [(4, 16, 2, 8), (4, 1, 16, 8)]),  # K is shared
        ("data=2,tensor=4", (12, 3), [(4, 16, 12, 8), (4, 3, 16, 8)]),  # cannot be cut
        ("data=2,fsdp=2,tensor=2", (4, 2), [(2, 16, 2, 8), (2, 1, 16, 8)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_each_device_computes_its_rows_and_heads(
    seen: Shapes, mesh: str, heads: tuple[int, int], local: Shapes, packed: bool
) -> None:
    q, k, v = inputs(8, *heads)
    options: dict[str, Any] = {"q_start": None, "segment_ids": None}
    if packed:
        options["segment_ids"] = jnp.asarray(
            np.arange(8)[:, None] * 0 + np.arange(16) // 5
        )
    devices = make_mesh(parse_mesh(mesh))
    run = jax.jit(lambda *x: attend(*x, **options, runtime=KERNEL, mesh=devices))
    np.testing.assert_allclose(
        run(q, k, v),
        reference.attention(q, k, v, **options),
        rtol=EQUAL_FORWARD,
        atol=EQUAL_FORWARD,
    )
    assert seen == local


def test_a_cache_is_cut_as_queries_are(seen: Shapes) -> None:
    q, k, v = inputs(4, 4, 2, slots=64)
    start = jnp.asarray([0, 5, 48, 20])
    devices = make_mesh({"data": 4, "tensor": 2})
    options = {"q_start": start, "segment_ids": None}
    actual = attend(q, k, v, **options, runtime=KERNEL, mesh=devices)
    np.testing.assert_allclose(
        actual,
        reference.attention(q, k, v, q_start=start),
        rtol=EQUAL_FORWARD,
        atol=EQUAL_FORWARD,
    )
    assert seen == [(1, 16, 2, 8), (1, 1, 64, 8)]


def test_a_kernels_gradient_is_cut_too(seen: Shapes) -> None:
    options = {"q_start": None, "segment_ids": None}
    devices = make_mesh({"data": 2, "tensor": 4})

    def loss(q: Any, k: Any, v: Any, mesh: Any) -> Any:
        return jnp.sum(attend(q, k, v, **options, runtime=KERNEL, mesh=mesh) ** 2)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    x = inputs(4, 8, 2)
    for one, other in zip(grad(*x, devices), grad(*x, None), strict=True):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=EQUAL_GRADIENT * scale)


def test_a_model_on_a_mesh_calls_the_kernel_on_every_device(seen: Shapes) -> None:
    mesh = make_mesh({"data": 4, "tensor": 2})
    model = Llama(TINY, KERNEL, mesh)
    tokens = jnp.asarray(random_tokens(TINY, 4, 16))
    jax.eval_shape(
        lambda params: model.apply({"params": params}, tokens), param_shapes(TINY)
    )
    assert len(seen) == 2 * TINY.num_layers
    assert seen[0] == (1, 16, TINY.num_heads // 2, TINY.head_dim)


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_a_training_step_on_a_tpu_mesh_gathers_no_heads(layout: LayerLayout) -> None:
    config = preset("llama2-70b").replace(num_layers=2)
    runtime = Runtime(
        dtype="bfloat16", attention="mosaic_tpu", layer_layout=layout, remat="block"
    )
    devices = tpu_devices("v5e:2x4")
    mesh = make_mesh({"data": 2, "tensor": 4}, devices)
    model = Llama(config, runtime, mesh)
    shardings = param_shardings(config, runtime, mesh)
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=at),
        param_shapes(config, layout=layout),
        shardings,
    )
    rows = NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tokens = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=rows)

    def loss(params: Any, tokens: Any) -> Any:
        logits = model.apply({"params": params}, tokens)
        return jnp.mean(jax.tree.leaves(logits)[0].astype(jnp.float32) ** 2)

    text = jax.jit(jax.grad(loss)).lower(params, tokens).compile().as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, again, and backward
    # Of q a device holds 2 rows x 16 heads; all 64 heads, or 4 rows, would be gathered.
    whole = ("bf16[2,1024,64,128]", "bf16[4,1024,16,128]", "bf16[2,64,1024,128]")
    assert not any(shape in text for shape in whole)
