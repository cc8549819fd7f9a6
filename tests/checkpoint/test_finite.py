"""Weights that are not numbers are found, on the host and on devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TINY, random_params

from llama_jax.checkpoint.finite import all_finite, check_finite, find_non_finite
from llama_jax.errors import CheckpointError
from llama_jax.model.lora import Lora, adapt, init_lora
from llama_jax.model.quantize import quantize_params
from llama_jax.params import flatten, stack_layers, unflatten, unstack_layers

NAME = "transformer/layers/1/mlp/up_proj"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (7,), (300, 500), (2, 3, 5)])
def test_every_position_is_tested(dtype: str, shape: tuple[int, ...]) -> None:
    largest = float(jnp.finfo(dtype).max)
    array = np.full(shape, largest, jnp.dtype(dtype))
    array.flat[0] = -0.0
    assert all_finite(array)
    for at in {0, array.size // 2, array.size - 1}:
        for value in (math.nan, -math.nan, math.inf, -math.inf):
            bad = array.copy()
            bad.flat[at] = value
            assert not all_finite(bad)
            assert not all_finite(bad.T)
            index = re.escape(str([int(n) for n in np.unravel_index(at, shape)]))
            words = f"^m: w has 1 of {array.size:,} numbers .* at {index};"
            with pytest.raises(CheckpointError, match=words):
                check_finite(bad, "m", "w")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_on_devices_are_found_in_every_form(value: float) -> None:
    flat = flatten(random_params(TINY))
    assert find_non_finite(unflatten(flat)) is None
    assert find_non_finite(quantize_params(unflatten(flat), "int8")) is None
    flat[NAME] = flat[NAME].at[3, 5].set(value)
    params = unflatten(flat)
    assert find_non_finite(params) == NAME
    assert find_non_finite(stack_layers(params)) == NAME
    for kind in ("int8", "int4", "nf4"):
        assert find_non_finite(quantize_params(params, kind)) == f"{NAME}/scales"
    lora = Lora(rank=2, alpha=1.0, targets=("up_proj",))
    adapters = unstack_layers(init_lora(TINY, jax.random.key(0), lora))
    assert find_non_finite(adapt(params, adapters, lora.scaling)) == f"{NAME}/base"
