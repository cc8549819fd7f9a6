"""What of a model is trained, and what is held still beside it: all of it, or adapters.

A method says this once; the step, evaluation, checkpoints and samples take it from
there, and know nothing of the difference.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.config import LlamaConfig
from llama_jax.distributed import to_host
from llama_jax.loading import Opened, read_weights
from llama_jax.model.init import init_params
from llama_jax.model.lora import Lora, adapt, init_lora, lora_shapes
from llama_jax.model.transformer import Llama
from llama_jax.params import flatten, param_shapes, unflatten, unstack_layers
from llama_jax.runtime import DType, Runtime
from llama_jax.sharding import weight_shardings
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.loss import Loss, LossSums, next_token_loss
from llama_jax.types import Mesh
from llama_jax.weights import Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained and what is not; layers are stacked in both.

    Attributes:
      model: how it is run.
      shapes: of the trained leaves, with their shardings where there is a mesh.
      first: makes the trained leaves that a run begins with.
      frozen: the other leaves; none where all are trained.
      loss: of trained leaves, frozen leaves and a batch.
      lora: what the adapters are, None where weights are trained.
    """

    model: Llama
    shapes: Any
    first: Callable[[], Any]
    frozen: Any
    loss: Loss
    lora: Lora | None = None

    def whole(self, trained: Any) -> Any:
        """The model's parameters, with the trained leaves among them."""
        if self.lora is None:
            return trained
        return adapt(self.frozen, trained, self.lora.scaling)

    def speaking(self, trained: Any, tokenizer: Tokenizer) -> Loaded:
        """The model as it generates: its layers unrolled, which copies them."""
        runtime = self.model.runtime.replace(layer_layout="unrolled", remat="none")
        model = Llama(self.model.config, runtime, self.model.mesh)
        return Loaded(model, unstack_layers(self.whole(trained)), tokenizer)


def train_weights(
    config: LlamaConfig,
    runtime: Runtime,
    *,
    mesh: Mesh | None = None,
    opened: Opened | None = None,
    seed: int = 0,
    loss: Callable[..., LossSums] = next_token_loss,
) -> Method:
    """All weights are trained, held in the runtime's `weight_dtype`.

    Args:
      config: of the model.
      runtime: of the step; its layers are stacked.
      mesh: devices.
      opened: the model to begin with; random weights where there is none.
      seed: of these.
      loss: of model, parameters and a batch.
    """
    model = Llama(config, runtime.replace(layer_layout="stacked"), mesh)

    def first() -> Any:
        if opened is None:
            return init_params(model, jax.random.key(seed))
        found = opened._replace(config=config)
        return read_weights(found, runtime=model.runtime, mesh=mesh)

    dtype = jnp.dtype(model.runtime.weight_dtype)
    shapes = param_shapes(config, "stacked", dtype=dtype)
    return Method(
        model=model,
        shapes=_placed(shapes, model),
        first=first,
        frozen={},
        loss=lambda params, _, batch: loss(model, params, batch),
    )


def train_adapters(
    opened: Opened,
    runtime: Runtime,
    lora: Lora,
    *,
    mesh: Mesh | None = None,
    quantize: Kind | None = None,
    dtype: DType = "float32",
    seed: int = 0,
    loss: Callable[..., LossSums] = next_token_loss,
) -> Method:
    """Adapters are trained; the weights are read now, and held still.

    Args:
      opened: the model.
      runtime: of the step; weights are held in its `weight_dtype`.
      lora: what adapters.
      mesh: devices.
      quantize: hold the layers' projections in eight or four bits.
      dtype: of the adapters.
      seed: of the first ones.
      loss: of model, parameters and a batch.
    """
    config = opened.config
    model = Llama(config, runtime.replace(layer_layout="stacked"), mesh)
    frozen = read_weights(opened, runtime=model.runtime, mesh=mesh, quantize=quantize)

    def first() -> Any:
        key = jax.random.key(seed)
        return init_lora(
            config, key, lora, runtime=model.runtime, dtype=dtype, mesh=mesh
        )

    def of_adapted(trained: Any, frozen: Any, batch: Any) -> LossSums:
        return loss(model, adapt(frozen, trained, lora.scaling), batch)

    return Method(
        model=model,
        shapes=_placed(lora_shapes(config, lora, dtype=dtype), model),
        first=first,
        frozen=frozen,
        loss=of_adapted,
        lora=lora,
    )


def fingerprint(leaves: Mapping[str, LazyLeaf]) -> str:
    """A few letters that tell one set of weights from another: of a norm's scale."""
    scale = np.asarray(to_host(leaves["transformer/final_norm/scale"].read()))
    return hashlib.sha256(scale.astype(np.float32).tobytes()).hexdigest()[:16]


def _placed(shapes: Any, model: Llama) -> Any:
    if model.mesh is None:
        return shapes
    places = flatten(weight_shardings(shapes, model.config, model.runtime, model.mesh))
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
            for path, leaf in flatten(shapes).items()
        }
    )
