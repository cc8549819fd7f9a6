"""Which leaves of a model are trained: all weights, or adapters.

Only a `Method` knows the difference; the step, evaluation, checkpoints and samples take
trained and frozen leaves from it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax.arguments import checked
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.checkpoint.model_folder import Loaded, save_params
from llama_jax.config import LlamaConfig
from llama_jax.errors import TrainError
from llama_jax.loading import Opened, read_weights
from llama_jax.model.init import init_params
from llama_jax.model.lora import Lora, adapt, init_lora, lora_shapes
from llama_jax.model.transformer import Llama, ScalarModel, model_for
from llama_jax.params import (
    SCALAR_HEAD,
    flatten,
    init_std,
    param_shapes,
    unflatten,
)
from llama_jax.runtime import DType, Runtime
from llama_jax.sharding import weight_shardings
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.adapters import save_adapters
from llama_jax.train.for_generation import for_generation
from llama_jax.train.losses import Loss, ModelLoss, next_token_loss, trained_loss
from llama_jax.train.pump import StepFunction
from llama_jax.train.step import make_train_step
from llama_jax.types import Mesh, Params, Path
from llama_jax.weights import Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The trained and the frozen leaves of a model, with stacked layers.

    Attributes:
      model: as training runs it.
      shapes: tree of the trained leaves' shapes, with shardings if there is a mesh.
      init: makes the trained leaves at the start of a run.
      frozen: tree of the other leaves; empty if all are trained.
      loss: loss of trained leaves, frozen leaves and a batch.
      lora: configuration of the adapters; None if weights are trained.
      fingerprint: identifies the initial weights; None if they are random.
      base_model: path of the base model, to be named in an adapter's folder.
    """

    model: Llama | ScalarModel
    shapes: Params
    init: Callable[[], Params]
    frozen: Params
    loss: Loss
    lora: Lora | None = None
    fingerprint: str | None = None
    base_model: str | None = None

    def params(self, trained: Params) -> Params:
        """The parameters of the whole model, given the trained leaves."""
        if self.lora is None:
            return trained
        return adapt(self.frozen, trained, self.lora.scaling)

    def for_generation(self, trained: Params, tokenizer: Tokenizer) -> Loaded:
        """The model for generation, with a copy of its parameters; drop it after use.

        Args:
          trained: trained leaves.
          tokenizer: of the model.
        """
        return Loaded(*for_generation(self.model, self.params(trained)), tokenizer)

    def make_step(
        self, optimizer: optax.GradientTransformation, accumulate: int
    ) -> StepFunction:
        """Make the step of a run; see `make_train_step`."""
        return make_train_step(self.loss, optimizer, accumulate=accumulate)

    @property
    def result_name(self) -> str:
        """The folder of a run that has the result: `model` or `adapter`."""
        return "model" if self.lora is None else "adapter"

    def save(
        self,
        path: Path,
        trained: Params,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: DType | None = None,
    ) -> None:
        """Save the model, or its adapters; with several processes all must call this.

        A scalar head is saved with the adapters.

        Args:
          path: of a new folder, for `load` (or its `adapter`).
          trained: trained leaves.
          tokenizer: stored with a model.
          dtype: of a model's weights on disk; defaults to theirs.

        Raises:
          CheckpointError: `path` exists or cannot be written.
        """
        config = self.model.config
        if self.lora is not None:
            save_adapters(
                path,
                trained,
                config,
                self.lora,
                base_model=self.base_model,
                base_weights=self.fingerprint,
            )
            return
        save_params(path, trained, config, tokenizer=tokenizer, dtype=dtype)


@checked(TrainError)
def train_weights(
    config: LlamaConfig,
    runtime: Runtime,
    *,
    mesh: Mesh | None = None,
    opened: Opened | None = None,
    seed: int = 0,
    loss: ModelLoss = next_token_loss,
) -> Method:
    """Train all weights, stored in the runtime's `weight_dtype`.

    Args:
      config: of the model; `head="scalar"` trains a `ScalarModel`.
      runtime: of the step; its layout becomes "stacked".
      mesh: devices.
      opened: initial weights; random if None. A scalar head that they lack is random.
      seed: of random weights.
      loss: loss of a model, its parameters and a batch.

    >>> import llama_jax
    >>> opened = llama_jax.open_model()
    >>> runtime = llama_jax.default_runtime()
    >>> method = train_weights(opened.config, runtime, opened=opened)
    >>> method.shapes["transformer"]["embedding"].shape
    (2048, 192)
    """
    model = model_for(config, runtime.replace(layer_layout="stacked"), mesh)
    leaves: Mapping[str, LazyLeaf] = {}
    if opened is not None and opened.leaves:
        leaves = _with_head(opened.leaves, config, seed)

    def init() -> Params:
        if opened is None or not leaves:
            return init_params(model, jax.random.key(seed))
        initial = opened._replace(config=config, leaves=leaves)
        return read_weights(initial, runtime=model.runtime, mesh=mesh)

    dtype = jnp.dtype(model.runtime.weight_dtype)
    shapes = param_shapes(config, "stacked", dtype=dtype)
    return Method(
        model=model,
        shapes=_with_shardings(shapes, model),
        init=init,
        frozen={},
        loss=trained_loss(model, loss),
        fingerprint=fingerprint(leaves) if leaves else None,
    )


@checked(TrainError)
def train_adapters(
    opened: Opened,
    runtime: Runtime,
    lora: Lora,
    *,
    mesh: Mesh | None = None,
    quantize: Kind | None = None,
    dtype: DType = "float32",
    seed: int = 0,
    loss: ModelLoss = next_token_loss,
    base_model: str | None = None,
) -> Method:
    """Train adapters; the weights are read now, and frozen.

    A scalar head is trained with them.

    Args:
      opened: the model; `head="scalar"` trains a `ScalarModel`, with a random head if
        its weights lack one.
      runtime: of the step; frozen weights are stored in its `weight_dtype`.
      lora: configuration of the adapters.
      mesh: devices.
      quantize: store the layers' projections in eight or four bits.
      dtype: of the adapters.
      seed: of the initial adapters.
      loss: loss of a model, its parameters and a batch.
      base_model: path of the model, to be named in the adapter's folder.

    >>> import llama_jax
    >>> lora = llama_jax.Lora(rank=2, alpha=4.0, targets=("q_proj",))
    >>> method = train_adapters(
    ...     llama_jax.open_model(), llama_jax.default_runtime(), lora
    ... )
    >>> method.shapes["transformer"]["layers"]["attention"]["q_proj"]["a"].shape
    (5, 192, 2)
    """
    config = opened.config
    model = model_for(config, runtime.replace(layer_layout="stacked"), mesh)
    whole = opened._replace(leaves=_with_head(opened.leaves, config, seed))
    frozen = read_weights(whole, runtime=model.runtime, mesh=mesh, quantize=quantize)
    initial = {SCALAR_HEAD: frozen.pop(SCALAR_HEAD)} if SCALAR_HEAD in frozen else {}
    base = Base(frozen, fingerprint(opened.leaves), base_model)
    return adapters_on(
        base, model, lora, dtype=dtype, seed=seed, loss=loss, initial=initial
    )


class Base(NamedTuple):
    """Frozen weights, which several methods may share.

    Attributes:
      frozen: weights of all but a scalar head, with stacked layers.
      fingerprint: of these weights.
      path: of the model.
    """

    frozen: Params
    fingerprint: str | None
    path: str | None


def adapters_on(
    base: Base,
    model: Llama | ScalarModel,
    lora: Lora,
    *,
    dtype: DType,
    seed: int,
    loss: ModelLoss,
    initial: Params,
) -> Method:
    """Train adapters on frozen weights, which are neither read nor copied.

    Args:
      base: the weights.
      model: as training runs it.
      lora: configuration of the adapters.
      dtype: of the adapters.
      seed: of the initial adapters.
      loss: loss of a model, its parameters and a batch.
      initial: initial leaves that are not drawn: those of adapters, a scalar head.
    """
    config, mesh = model.config, model.mesh
    shapes = lora_shapes(config, lora, dtype=dtype)
    if config.head == "scalar":
        shapes[SCALAR_HEAD] = jax.ShapeDtypeStruct((config.embed_dim,), dtype)

    def init() -> Params:
        # Copies, since steps donate them.
        given = jax.tree.map(lambda leaf: jnp.array(leaf, dtype), dict(initial))
        if given.keys() == shapes.keys():
            return given
        key = jax.random.key(seed)
        drawn = init_lora(
            config, key, lora, runtime=model.runtime, dtype=dtype, mesh=mesh
        )
        return drawn | given

    return Method(
        model=model,
        shapes=_with_shardings(shapes, model),
        init=init,
        frozen=base.frozen,
        loss=trained_loss(model, loss, lora),
        lora=lora,
        fingerprint=base.fingerprint,
        base_model=base.path,
    )


def _with_head(
    leaves: Mapping[str, LazyLeaf], config: LlamaConfig, seed: int
) -> Mapping[str, LazyLeaf]:
    """The leaves, with a random scalar head if the configuration wants one."""
    if config.head != "scalar" or SCALAR_HEAD in leaves:
        return leaves
    shape, size = (config.embed_dim,), 4 * config.embed_dim
    head = LazyLeaf(
        shape, np.dtype(np.float32), lambda: random_head(config, seed), size
    )
    return {**leaves, SCALAR_HEAD: head}


def random_head(config: LlamaConfig, seed: int) -> np.ndarray:
    """A random scalar head `[D]`."""
    draw = np.random.Generator(np.random.Philox(seed))
    std = init_std(SCALAR_HEAD, config) or 0.0
    return std * draw.standard_normal(config.embed_dim, np.float32)


def _with_shardings(shapes: Params, model: Llama | ScalarModel) -> Params:
    if model.mesh is None:
        return shapes
    shardings = weight_shardings(shapes, model.config, model.runtime, model.mesh)
    flat_shardings = flatten(shardings)
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=flat_shardings[path]
            )
            for path, leaf in flatten(shapes).items()
        }
    )
