"""The layers: one `Block` for training, prefill and decoding.

With `transformer`, the only module that knows Flax, and only a small part of it:
modules declare their parameters with `self.param` and are applied to plain nested
dicts.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.model.attention import attend
from llama_jax.model.cache import KVCache, NewCache
from llama_jax.model.layer_cache import CacheRows, LayerCache
from llama_jax.model.linear import linear
from llama_jax.model.rope import RopeTables, apply_rope
from llama_jax.params import draw, init_std, weight_shape
from llama_jax.runtime import Runtime
from llama_jax.sharding import constrain, weight_spec
from llama_jax.types import Array, Hidden, Int, Mesh
from llama_jax.weights import Adapted, Quantized


class Module(nn.Module):
    """What all modules share: facts, choices, devices, and how weights are declared."""

    config: LlamaConfig
    runtime: Runtime
    mesh: Mesh | None = None

    def weight(self, name: str, axes: str) -> Any:
        """Declare a weight; its row of `AXES` decides its initial numbers.

        A quantized or adapted weight is returned as it is stored, for `linear`.
        """
        path, shape = "/".join((*self.path, name)), weight_shape(self.config, axes)
        if self.has_variable("params", name):
            stored: object = self.get_variable("params", name)
            if isinstance(stored, Quantized | Adapted):
                if stored.shape != shape:
                    raise ConfigError(
                        f"{path}: the weight has shape {list(stored.shape)}, but the "
                        f"configuration makes it {list(shape)}; use the configuration "
                        "that the weights were saved with"
                    )
                return stored
        dtype = jnp.dtype(self.runtime.weight_dtype)
        init = functools.partial(draw, std=init_std(path, self.config))
        weight = self.param(name, init, shape, dtype)
        if self.mesh is None or "/layers/" not in path or len(shape) == 1:
            return weight
        # In the dtype of products before it is gathered for one; and the gradient is
        # scattered before anything else is done with it.
        spec = weight_spec(axes, self.config, self.runtime.rules, self.mesh)
        return jax.lax.with_sharding_constraint(
            weight.astype(self.runtime.dtype), NamedSharding(self.mesh, spec)
        )

    def rows(self, x: Hidden) -> Array:
        """`x` with B and T in one axis, for products, unless a mesh cuts the two.

        With two axes, XLA:CPU copies an activation to another layout for the gradient
        of each weight, and the gradient of a feed-forward takes twice as long.
        """
        if self.mesh is not None or x.shape[1] == 1:
            return x
        return x.reshape(-1, x.shape[-1])

    def part(
        self, module: type["Module"], name: str | None = None, **fields: Any
    ) -> Any:
        """Create a submodule with the same facts, choices and devices."""
        return module(self.config, self.runtime, self.mesh, name=name, **fields)

    def constrain(self, x: Array, axes: str) -> Array:
        """Constrain `x` to the sharding of its axis letters on the mesh."""
        return constrain(x, axes, self.runtime.rules, self.mesh)


class RMSNorm(Module):
    """x / √(mean x² + ε) · scale, computed in float32 (arXiv:1910.07467)."""

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        scale = self.weight("scale", "D")
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(exact * exact, axis=-1, keepdims=True)
        normed = exact * jax.lax.rsqrt(mean_square + self.config.norm_eps)
        return (normed * scale.astype(jnp.float32)[None, None]).astype(x.dtype)


class SharedInputs(NamedTuple):
    """Inputs that are the same for every layer.

    Attributes:
      rope: rotary tables of the tokens.
      segment_ids: of packed rows.
      rows: of the cache that the tokens are appended to and attend to; None if they
        attend to each other only.
    """

    rope: RopeTables
    segment_ids: Int[Array, "B T"] | None = None
    rows: CacheRows | None = None


class Attention(Module):
    """Grouped-query attention with rotary positions."""

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        shared: SharedInputs,
        cache: LayerCache | NewCache | None,
    ) -> tuple[Hidden, LayerCache | None]:
        config = self.config
        batch, queries, _ = x.shape
        heads = (batch, queries, config.num_heads, config.head_dim)
        kv_heads = (batch, queries, config.num_kv_heads, config.head_dim)
        flat = self.rows(x)
        q = linear(flat, self.weight("q_proj", "D NH"))
        k = linear(flat, self.weight("k_proj", "D KH"))
        v = linear(flat, self.weight("v_proj", "D KH"))
        if cache is not None:
            # Otherwise the TPU compiler pulls the split into heads into the product,
            # and changes the layout of the weights for it on every step.
            q, k, v = jax.lax.optimization_barrier((q, k, v))
        q = self.constrain(q.reshape(heads), "B T N H")
        k = self.constrain(k.reshape(kv_heads), "B T K H")
        v = self.constrain(v.reshape(kv_heads), "B T K H").swapaxes(1, 2)
        q, k = apply_rope(q, shared.rope), apply_rope(k, shared.rope).swapaxes(1, 2)
        on: Any = {"runtime": self.runtime, "mesh": self.mesh}
        stored: Any = None
        if cache is not None:
            rows: Any = shared.rows  # None for a new cache
            stored = cache.append(k, v, rows, **on)
        if shared.rows is not None:
            out = stored.attend(q, shared.rows, **on)
        else:
            ids = shared.segment_ids
            out = attend(q, k, v, q_start=None, segment_ids=ids, **on)
        flat = self.rows(self.constrain(out.reshape(batch, queries, -1), "B T NH"))
        return linear(flat, self.weight("o_proj", "NH D")).reshape(x.shape), stored


class FeedForward(Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv:2002.05202)."""

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        rows = self.rows(x)
        gate = linear(rows, self.weight("gate_proj", "D F"))
        up = linear(rows, self.weight("up_proj", "D F"))
        hidden = self.constrain(jax.nn.silu(gate) * up, "B T F")
        return linear(hidden, self.weight("down_proj", "F D")).reshape(x.shape)


class Block(Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        shared: SharedInputs,
        cache: LayerCache | NewCache | None,
    ) -> tuple[Hidden, LayerCache | None]:
        normed = self.constrain(self.part(RMSNorm, "attention_norm")(x), "B T D")
        out, stored = self.part(Attention, "attention")(normed, shared, cache)
        x = self.constrain(x + out, "B TS D")
        normed = self.constrain(self.part(RMSNorm, "mlp_norm")(x), "B T D")
        x = x + self.part(FeedForward, "mlp")(normed)
        return self.constrain(x, "B TS D"), stored


class UnrolledLayers(Module):
    """A block for each layer, each with its own arrays."""

    block: type[Block] = Block

    @nn.compact
    def __call__(
        self, x: Hidden, shared: SharedInputs, cache: KVCache | NewCache | None
    ) -> tuple[Hidden, tuple[LayerCache | None, ...]]:
        layers = []
        for index in range(self.config.num_layers):
            block = self.part(self.block, str(index))
            layer = None if cache is None else cache.layer(index)
            x, layer = block(x, shared, layer)
            layers.append(layer)
        return x, tuple(layers)
