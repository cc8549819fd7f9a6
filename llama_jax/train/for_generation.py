"""Parameters as generation takes them, from those of a training step."""

import dataclasses
import functools

import jax

from llama_jax.model.transformer import Llama, ScalarModel, model_for
from llama_jax.params import flatten, unflatten, unstack_layers
from llama_jax.runtime import DType, Rules
from llama_jax.sharding import weight_shardings
from llama_jax.types import Params, PyTree
from llama_jax.weights import Adapted, Quantized, Weight


def for_generation(
    model: Llama | ScalarModel, params: Params
) -> tuple[Llama | ScalarModel, dict[str, PyTree]]:
    """Convert a training model and its parameters for generation, under one jit.

    Layers are unstacked, weights cast to the dtype of activations, and sharded by the
    rules of inference. The result is a copy; drop it after sampling.

    Args:
      model: with stacked layers, on its mesh if it has one.
      params: its parameters, which may be quantized or adapted.

    Returns:
      The model with unrolled layers, and its parameters as `load` would give them.
    """
    runtime = model.runtime.replace(
        layer_layout="unrolled", remat="none", param_dtype=None, rules=Rules()
    )
    inference_model = model_for(model.config, runtime, model.mesh)
    return inference_model, _convert(inference_model, params)


@functools.partial(jax.jit, static_argnums=0)
def _convert(model: Llama | ScalarModel, params: Params) -> dict[str, PyTree]:
    unrolled = unflatten(
        {
            path: _cast(leaf, model.runtime.dtype)
            for path, leaf in flatten(unstack_layers(params)).items()
        }
    )
    if model.mesh is None:
        return unrolled
    shardings = weight_shardings(unrolled, model.config, model.runtime, model.mesh)
    return jax.lax.with_sharding_constraint(unrolled, shardings)


def _cast(leaf: Weight, dtype: DType) -> Weight:
    """A weight in `dtype`; adapters in float32, as `load` holds them."""
    if isinstance(leaf, Adapted):
        a, b = leaf.a.astype("float32"), leaf.b.astype("float32")
        return dataclasses.replace(leaf, base=_cast(leaf.base, dtype), a=a, b=b)
    return leaf if isinstance(leaf, Quantized) else leaf.astype(dtype)
