"""The model: one `Block` for training, prefill and decoding.

The only module that knows Flax, and through a narrow door: modules declare their
parameters with `self.param` and are applied to plain nested dicts.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.model import cache_slots as slots
from llama_jax.model.attention import attend, in_order, ring_order
from llama_jax.model.cache import KVCache, LayerCache, NewCache
from llama_jax.model.linear import linear, matmul_precision
from llama_jax.model.rope import RopeTables, apply_rope, rope_tables
from llama_jax.model.token_loss import token_losses
from llama_jax.params import draw, init_std, weight_shape
from llama_jax.runtime import Runtime
from llama_jax.sharding import constrain, weight_spec
from llama_jax.types import Array, Float, Hidden, Int, Mesh, Params, Tokens
from llama_jax.weights import Adapted, Quantized


class _Module(nn.Module):
    """What every module has: the facts, the choices and the devices."""

    config: LlamaConfig
    runtime: Runtime
    mesh: Mesh | None = None

    def weight(self, name: str, axes: str) -> Any:
        """A weight, whose first numbers its row of `AXES` decides.

        One that is quantized or adapted is given as it is held: `linear` takes it.
        """
        path, shape = "/".join((*self.path, name)), weight_shape(self.config, axes)
        if self.has_variable("params", name):
            given: Any = self.get_variable("params", name)
            if isinstance(given, Quantized | Adapted):
                if given.shape != shape:
                    raise ConfigError(
                        f"{path}: has the shape {list(given.shape)}, but the "
                        f"configuration makes it {list(shape)}; do the two belong "
                        "together?"
                    )
                return given
        dtype = jnp.dtype(self.runtime.weight_dtype)
        init = functools.partial(draw, std=init_std(path, self.config))
        weight = self.param(name, init, shape, dtype)
        if self.mesh is None or "/layers/" not in path or len(shape) == 1:
            return weight
        # Gathered, and its gradient scattered, in the dtype of products.
        spot = weight_spec(axes, self.config, self.runtime.rules, self.mesh)
        return jax.lax.with_sharding_constraint(
            weight.astype(self.runtime.dtype), NamedSharding(self.mesh, spot)
        )

    def rows(self, x: Hidden) -> Array:
        """`x` with its rows in one axis, unless a mesh splits two: twice as fast."""
        # With two, XLA:CPU copies an activation for the gradient of each weight.
        if self.mesh is not None or x.shape[1] == 1:
            return x
        return x.reshape(-1, x.shape[-1])

    def part(self, module: Any, name: str | None = None, **fields: Any) -> Any:
        """A submodule with the same facts, choices and devices."""
        return module(self.config, self.runtime, self.mesh, name=name, **fields)

    def place(self, x: Array, axes: str) -> Array:
        """`x` where the runtime's rules want it on the mesh."""
        return constrain(x, axes, self.runtime.rules, self.mesh)


class RMSNorm(_Module):
    """x / √(mean x² + ε) · scale, computed in float32 (arXiv:1910.07467)."""

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        scale = self.weight("scale", "D")
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(exact * exact, axis=-1, keepdims=True)
        normed = exact * jax.lax.rsqrt(mean_square + self.config.norm_eps)
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(_Module):
    """Grouped-query attention with rotary positions."""

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        rope: RopeTables,
        segment_ids: Int[Array, "B T"] | None,
        cache: LayerCache | NewCache | None,
    ) -> tuple[Hidden, LayerCache | None]:
        config = self.config
        batch, queries, _ = x.shape
        heads = (batch, queries, config.num_heads, config.head_dim)
        kv_heads = (batch, queries, config.num_kv_heads, config.head_dim)
        rows = self.rows(x)
        q = linear(rows, self.weight("q_proj", "D NH"))
        k = linear(rows, self.weight("k_proj", "D KH"))
        v = linear(rows, self.weight("v_proj", "D KH"))
        if cache is not None:
            # Else the TPU compiler pulls the split into heads into the product, and
            # lays the weights out anew for it on every step.
            q, k, v = jax.lax.optimization_barrier((q, k, v))
        q = self.place(q.reshape(heads), "B T N H")
        k = self.place(k.reshape(kv_heads), "B T K H")
        v = self.place(v.reshape(kv_heads), "B T K H").swapaxes(1, 2)
        q, k = apply_rope(q, rope), apply_rope(k, rope).swapaxes(1, 2)
        of_mesh: Any = {"rules": self.runtime.rules, "mesh": self.mesh}
        q_start: Any = None
        all_k: Any = k
        all_v: Any = v
        kept: LayerCache | None = None
        if isinstance(cache, NewCache):
            first_k, first_v = (in_order(x, "B K T H", **of_mesh) for x in (k, v))
            room, dtype = cache.num_slots, self.runtime.slot_dtype
            kept = slots.begin(first_k, first_v, room, dtype, **of_mesh)
        elif cache is not None:
            q_start = cache.length
            kept = slots.write(cache, k, v, **of_mesh)
            all_k, all_v = kept.k, kept.v
        out = attend(
            q,
            all_k,
            all_v,
            q_start=q_start,
            segment_ids=segment_ids,
            runtime=self.runtime,
            mesh=self.mesh,
        )
        rows = self.rows(self.place(out.reshape(batch, queries, -1), "B T NH"))
        return linear(rows, self.weight("o_proj", "NH D")).reshape(x.shape), kept


class FeedForward(_Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv:2002.05202)."""

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        rows = self.rows(x)
        gate = linear(rows, self.weight("gate_proj", "D F"))
        up = linear(rows, self.weight("up_proj", "D F"))
        hidden = self.place(jax.nn.silu(gate) * up, "B T F")
        return linear(hidden, self.weight("down_proj", "F D")).reshape(x.shape)


class Block(_Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        rope: RopeTables,
        segment_ids: Int[Array, "B T"] | None,
        cache: LayerCache | NewCache | None,
    ) -> tuple[Hidden, LayerCache | None]:
        normed = self.place(self.part(RMSNorm, "attention_norm")(x), "B T D")
        out, kept = self.part(Attention, "attention")(normed, rope, segment_ids, cache)
        x = self.place(x + out, "B TS D")
        normed = self.place(self.part(RMSNorm, "mlp_norm")(x), "B T D")
        x = x + self.part(FeedForward, "mlp")(normed)
        return self.place(x, "B TS D"), kept


class UnrolledLayers(_Module):
    """The blocks one after another, each with arrays of its own."""

    block: Any = Block

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        rope: RopeTables,
        segment_ids: Int[Array, "B T"] | None,
        cache: KVCache | NewCache | None,
    ) -> tuple[Hidden, KVCache | None]:
        layers = []
        for index in range(self.config.num_layers):
            layer: Any = cache
            if isinstance(cache, KVCache):
                layer = LayerCache(cache.k[index], cache.v[index], cache.length)
            block = self.part(self.block, str(index))
            x, layer = block(x, rope, segment_ids, layer)
            layers.append(layer)
        if cache is None:
            return x, None
        k, v = (tuple(getattr(layer, name) for layer in layers) for name in "kv")
        return x, KVCache(k, v, layers[0].length)


class Stream(NamedTuple):
    """What a transformer gives.

    Attributes:
      x: the last block's stream, normed.
      cache: where one came in, or was to be begun; its length is still the old one.
      embedding: which some models' output head is.
      order: the places of the sequence as `x` has them; None where they are in order.
    """

    x: Hidden
    cache: KVCache | None
    embedding: Array
    order: np.ndarray | None


class Transformer(_Module):
    """Everything below the output head: tokens to the last block's normed stream."""

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | NewCache | None = None,
    ) -> Stream:
        embedding = self.weight("embedding", "V D")
        config, rules, mesh = self.config, self.runtime.rules, self.mesh
        order = None
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            if isinstance(cache, KVCache):
                positions = cache.length[:, None] + positions
        if not isinstance(cache, KVCache):
            order = ring_order(tokens.shape[1], rules, mesh)
        if order is not None:
            tokens, positions = tokens[:, order], positions[:, order]
            segment_ids = None if segment_ids is None else segment_ids[:, order]
        x = self.place(embedding[tokens].astype(self.runtime.dtype), "B TS D")
        rope = rope_tables(
            positions, config.head_dim, config.rope_theta, config.rope_scaling
        )
        block = self._remat(Block)
        if self.runtime.layer_layout == "unrolled":
            layers = self.part(UnrolledLayers, "layers", block=block)
            x, kept = layers(x, rope, segment_ids, cache)
        else:
            if cache is not None:
                raise ConfigError(
                    "runtime: the stacked layer layout takes no cache; "
                    "decode with layer_layout='unrolled' (params.unstack_layers)"
                )
            scan = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
                length=self.config.num_layers,
            )
            x, kept = self.part(scan, "layers")(x, rope, segment_ids, None)
        x = self.part(RMSNorm, "final_norm")(x)
        return Stream(self.place(x, "B T D"), kept, embedding, order)

    def _remat(self, block: Any) -> Any:
        """The block, or one that keeps less for the backward pass."""
        if self.runtime.remat == "none":
            return block
        policy = None
        if self.runtime.remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        stacked = self.runtime.layer_layout == "stacked"
        return nn.remat(block, policy=policy, prevent_cse=not stacked)


class Llama(_Module):
    """The language model: next-token logits, and the cache where one came in."""

    def __post_init__(self) -> None:
        self.config.check_head("lm", "Llama")
        super().__post_init__()

    @nn.compact
    def _read(
        self, tokens: Tokens, positions: Any, segment_ids: Any, cache: Any = None
    ) -> tuple[Stream, Array]:
        """The last stream, and the unembedding."""
        stream = self.part(Transformer, "transformer")(
            tokens, positions=positions, segment_ids=segment_ids, cache=cache
        )
        if self.config.tied_embeddings:
            return stream, stream.embedding.T
        return stream, self.weight("lm_head", "D V")

    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | NewCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        logits_at: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B P V"], KVCache | None]:
        """Logits (float32) of the token that follows each query.

        Args:
          tokens: ids; rows shorter than T are padded on the right with any id.
          positions: rotary positions; by default they count on from the cache's
            length, or from 0.
          segment_ids: of packed rows; not together with a cache.
          cache: what came before; the new keys and values are written behind it. It
            must have room: `length + T ≤ S`. Or how large a cache to begin with them.
          lengths: how many of each row's tokens are real: what the cache's length
            grows by; T where not given.
          logits_at: the queries whose logits are wanted, as indices into T; all where
            not given. What is not asked for is not computed.

        Returns:
          The logits, and the cache with the new tokens in it (`None` without one).
        """
        stream, head = self._read(tokens, positions, segment_ids, cache)
        kept = stream.cache
        if kept is not None:
            grown = tokens.shape[1] if lengths is None else lengths
            kept = kept._replace(length=kept.length + grown)
        x = stream.x
        if logits_at is not None:
            if stream.order is not None:
                logits_at = jnp.asarray(np.argsort(stream.order))[logits_at]
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        elif stream.order is not None:
            x = in_order(x, "B T D", self.runtime.rules, self.mesh)
        logits = linear(x, head, out_dtype=jnp.float32)
        return self.place(logits, "B T V"), kept

    def losses(
        self,
        tokens: Tokens,
        targets: Tokens,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        """-log p of each target (nats, float32), the logits never being there at once.

        `apply(model, params, tokens, targets, method="losses")`. Arguments as of a
        call; targets are the tokens that follow, any id where the loss is not wanted.
        """
        stream, head = self._read(tokens, positions, segment_ids)
        if stream.order is not None:
            targets = targets[:, stream.order]
        found = token_losses(
            stream.x, head, targets, rules=self.runtime.rules, mesh=self.mesh
        )
        return in_order(found, "B T", self.runtime.rules, self.mesh)


class ScalarModel(_Module):
    """A number per token instead of logits: reward model and critic.

    Its `transformer` tree is the language model's, so that one assignment copies it.
    """

    def __post_init__(self) -> None:
        self.config.check_head("scalar", "ScalarModel")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        stream = self.part(Transformer, "transformer")(
            tokens, positions=positions, segment_ids=segment_ids
        )
        head = self.weight("scalar_head", "D").astype(jnp.float32)
        x = stream.x.astype(jnp.float32)
        scalars = jnp.matmul(x, head, precision=matmul_precision(jnp.float32))
        return in_order(scalars, "B T", self.runtime.rules, self.mesh)


def model_for(
    config: LlamaConfig, runtime: Runtime, mesh: Mesh | None = None
) -> Llama | ScalarModel:
    """Make the model that the configuration's head names."""
    return (Llama if config.head == "lm" else ScalarModel)(config, runtime, mesh)


def apply(model: Any, params: Params, *args: Any, **kwargs: Any) -> Any:
    """`model.apply` on a plain tree of parameters."""
    return model.apply({"params": params}, *args, **kwargs)
