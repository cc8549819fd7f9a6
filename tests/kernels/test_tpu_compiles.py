"""The TPU's flash attention, compiled for every generation of chips."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from support.programs import needs_tpu_compiler

from llama_jax.kernels.tpu.flash import flash_attention
from llama_jax.planning.target_devices import tpu_devices

CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


class Shape(NamedTuple):
    """Sizes of a call."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str = "bfloat16"
    kind: str = "plain"


MODELS = {
    "7b": Shape(1, 2048, 2048, 32, 32, 128),
    "70b-packed": Shape(2, 2048, 2048, 64, 8, 128, kind="packed"),
}
OTHERS = {
    "ragged-cache": Shape(3, 700, 2500, 32, 8, 128, kind="start"),
    "ragged-packed-80": Shape(1, 1300, 1300, 8, 2, 80, kind="packed"),
    "few-queries-64": Shape(4, 5, 1000, 32, 8, 64, kind="start"),
    "float32-96": Shape(1, 1100, 1100, 8, 2, 96, "float32"),
    "chunks-64": Shape(1, 16384, 16384, 8, 1, 64),
}
EVERY = [(chip, name) for chip in CHIPS for name in MODELS]
EVERY += [(chip, name) for chip in (CHIPS[0], CHIPS[3]) for name in OTHERS]


def programs(topology: str, shape: Shape, *, mapped: int | None = None) -> Any:
    """The forward pass, and with all gradients; mapped over one more axis if given.

    Queries have heads before slots, as in the kernels; otherwise XLA would transpose
    them here, since there is no projection that could.
    """
    sharding = SingleDeviceSharding(tpu_devices(topology)[0])
    lead = () if mapped is None else (mapped,)

    def array(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((*lead, *sizes), dtype, sharding=sharding)

    q = array(shape.dtype, shape.B, shape.N, shape.T, shape.H)
    slots = array(shape.dtype, shape.B, shape.K, shape.S, shape.H)
    more = {
        "plain": {},
        "start": {"q_start": array(jnp.int32, shape.B)},
        "packed": {"segment_ids": array(jnp.int32, shape.B, shape.T)},
    }[shape.kind]

    def forward(q: Any, k: Any, v: Any, more: Any) -> Any:
        return flash_attention(q.swapaxes(1, 2), k, v, **more).swapaxes(1, 2)

    def both(q: Any, k: Any, v: Any, more: Any, do: Any) -> Any:
        out, backward = jax.vjp(lambda *x: forward(*x, more), q, k, v)
        return out, backward(do)

    functions = (forward, both) if mapped is None else map(jax.vmap, (forward, both))
    one, two = map(jax.jit, functions)
    arguments = q, slots, slots, more
    return one.lower(*arguments).compile(), two.lower(*arguments, q).compile()


def kernels(program: Any) -> int:
    return program.as_text().count('custom_call_target="tpu_custom_call"')


@needs_tpu_compiler
@pytest.mark.tpu_compile
@pytest.mark.parametrize(("topology", "name"), EVERY)
def test_flash_attention_compiles_for_tpus_and_stores_no_scores(
    topology: str, name: str
) -> None:
    shape = (MODELS | OTHERS)[name]
    forward, both = programs(topology, shape)
    assert kernels(forward) == 1
    assert kernels(both) == 1 + -(
        -shape.S // 8192
    )  # the gradients of 8,192 slots at a time
    one_head = shape.T * shape.S * jnp.dtype(shape.dtype).itemsize
    if shape.T > 128:  # fewer scores are less than the other temporaries
        assert forward.memory_analysis().temp_size_in_bytes < one_head


@needs_tpu_compiler
@pytest.mark.tpu_compile
def test_flash_attention_under_vmap_compiles_for_tpus() -> None:
    shape = Shape(1, 1024, 1024, 4, 2, 128)
    forward, both = programs("v5e:2x2", shape, mapped=2)
    assert kernels(forward) == 1
    assert kernels(both) == 2
