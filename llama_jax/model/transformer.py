"""The models: a transformer with one of two output heads."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from llama_jax.arguments import checked
from llama_jax.config import Head, LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.kernels.precision import matmul_precision
from llama_jax.model.attention import in_order, ring_order
from llama_jax.model.cache import KVCache, NewCache
from llama_jax.model.layer_cache import CacheRows
from llama_jax.model.layers import Block, Module, RMSNorm, SharedInputs, UnrolledLayers
from llama_jax.model.linear import linear
from llama_jax.model.rope import rope_tables
from llama_jax.model.token_loss import greedy_tokens, token_losses
from llama_jax.runtime import Runtime
from llama_jax.types import Array, Float, Hidden, Int, Mesh, Params, Tokens


class TransformerOutput(NamedTuple):
    """What an output head needs.

    Attributes:
      x: the normed output of the last block.
      cache: the cache with the new tokens; None without one.
      embedding: of tokens, which is the output head of some models.
      order: index in the sequence of each token of `x`; None if they are in order.
    """

    x: Hidden
    cache: KVCache | None
    embedding: Array
    order: np.ndarray | None


class Transformer(Module):
    """Everything below the output head: tokens to hidden states."""

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | NewCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> TransformerOutput:
        embedding = self.weight("embedding", "V D")
        config, order = self.config, None
        rows = None if cache is None else cache.rows
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            if rows is not None:
                positions = rows.length[:, None] + positions
        if rows is None:
            order = ring_order(tokens.shape[1], self.runtime.rules, self.mesh)
        if order is not None:
            tokens, positions = tokens[:, order], positions[:, order]
            segment_ids = None if segment_ids is None else segment_ids[:, order]
        x = self.constrain(embedding[tokens].astype(self.runtime.dtype), "B TS D")
        rope = rope_tables(positions, config, num_tokens=tokens.shape[1])
        shared = SharedInputs(rope, segment_ids, rows)
        block, after = self._remat(Block), None
        if self.runtime.layer_layout == "unrolled":
            x, layers = self.part(UnrolledLayers, "layers", block=block)(
                x, shared, cache
            )
            if cache is not None:
                batch = tokens.shape[0]
                rows = rows or CacheRows(jnp.zeros((batch,), jnp.int32))
                added = tokens.shape[1] if lengths is None else lengths
                after = KVCache(layers, rows.length + added, rows.page_table)
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
                in_axes=(nn.broadcast, nn.broadcast),
                length=self.config.num_layers,
            )
            x, _ = self.part(scan, "layers")(x, shared, None)
        x = self.part(RMSNorm, "final_norm")(x)
        return TransformerOutput(self.constrain(x, "B T D"), after, embedding, order)

    def _remat(self, block: type[Block]) -> type[Block]:
        """The block, or one that stores less for the backward pass."""
        if self.runtime.remat == "none":
            return block
        policy = None
        if self.runtime.remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        stacked = self.runtime.layer_layout == "stacked"
        return nn.remat(block, policy=policy, prevent_cse=not stacked)


class _Model(Module):
    """A transformer and an output head."""

    @nn.compact
    def _run(self, tokens: Tokens, **inputs: Any) -> tuple[TransformerOutput, Array]:
        """The transformer's output, and the weights of the head."""
        out = self.part(Transformer, "transformer")(tokens, **inputs)
        return out, self._head(out)

    def _head(self, out: TransformerOutput) -> Array:
        raise NotImplementedError

    def _check(self, head: Head) -> None:
        """Raise a `ConfigError` for other facts or choices than the model needs."""
        name = type(self).__name__
        for field, kind in (("config", LlamaConfig), ("runtime", Runtime)):
            if not isinstance(value := getattr(self, field), kind):
                raise ConfigError(
                    f"{name}: {field} must be a {kind.__name__}, got {value!r:.60}"
                )
        self.config.check_head(head, name)

    def _in_order(self, x: Array, axes: str) -> Array:
        return in_order(x, axes, self.runtime.rules, self.mesh)


class Llama(_Model):
    """The language model: logits of the next token, and the cache if one is given.

    >>> import jax, jax.numpy as jnp
    >>> from llama_jax import Runtime, init_cache, init_params, preset
    >>> small = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 2}
    >>> small |= {"head_dim": 8, "mlp_dim": 32, "vocab_size": 100}
    >>> model = Llama(preset("llama2-7b").replace(**small), Runtime())
    >>> params = init_params(model, jax.random.key(0))
    >>> logits, _ = apply(model, params, jnp.asarray([[1, 5, 7]]))
    >>> logits.shape
    (1, 3, 100)
    >>> cache = init_cache(model.config, batch=1, num_slots=8, dtype="float32")
    >>> _, cache = apply(model, params, jnp.asarray([[1, 5]]), cache=cache)
    >>> last, cache = apply(model, params, jnp.asarray([[7]]), cache=cache)
    >>> bool(jnp.allclose(last[:, 0], logits[:, 2], atol=1e-5)), cache.length.tolist()
    (True, [3])
    """

    def __post_init__(self) -> None:
        self._check("lm")
        super().__post_init__()

    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | NewCache | None = None,
        lengths: Int[Array, " B"] | None = None,
        logits_at: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B P V"], KVCache | None]:
        """Compute logits (float32) of the token that follows each query.

        Args:
          tokens: ids; rows shorter than T are padded on the right with any id.
          positions: rotary positions; by default they continue from the cache's length,
            or count from 0.
          segment_ids: of packed rows; not together with a cache of earlier tokens.
          cache: of earlier tokens, to which the new keys and values are appended; it
            must have room: `length + T ≤ S`. A `NewCache` creates one.
          lengths: how many of each row's tokens are real, by which the cache's length
            grows; defaults to T.
          logits_at: indices into T of the queries whose logits are computed; defaults
            to all.

        Returns:
          The logits, and the cache with the new tokens (`None` without one).
        """
        out, head = self._run(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            lengths=lengths,
        )
        x = out.x
        if logits_at is not None:
            if out.order is not None:
                logits_at = jnp.asarray(np.argsort(out.order))[logits_at]
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        elif out.order is not None:
            x = self._in_order(x, "B T D")
        logits = linear(x, head, out_dtype=jnp.float32)
        return self.constrain(logits, "B T V"), out.cache

    def losses(
        self,
        tokens: Tokens,
        targets: Tokens,
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        """Compute -log p of each target (nats, float32), in chunks of the vocabulary.

        `apply(model, params, tokens, targets, method="losses")`. The logits of all
        tokens are never in memory at once.

        Args:
          tokens: as of a call.
          targets: the tokens that follow; any id where the loss is not used.
          positions: as of a call.
          segment_ids: as of a call.
        """
        out, head = self._run(tokens, positions=positions, segment_ids=segment_ids)
        return self._losses(out, head, targets)

    def scores(
        self, tokens: Tokens, targets: Tokens
    ) -> tuple[Float[Array, "B T"], Int[Array, "B T"], Float[Array, "B T"]]:
        """Compute log p of each target (nats), the likeliest token, and its log p.

        `apply(model, params, tokens, targets, method="scores")`; arguments as of
        `losses`. Of equally likely tokens, the lowest id is the likeliest.
        """
        out, head = self._run(tokens)
        greedy = greedy_tokens(out.x, head, rules=self.runtime.rules, mesh=self.mesh)
        best, best_loss = (self._in_order(part, "B T") for part in greedy)
        loss = self._losses(out, head, targets)
        # The two are rounded in other places; the same token has one number.
        return -loss, best, -jnp.where(best == targets, loss, best_loss)

    def _losses(
        self, out: TransformerOutput, head: Array, targets: Tokens
    ) -> Float[Array, "B T"]:
        if out.order is not None:
            targets = targets[:, out.order]
        losses = token_losses(
            out.x, head, targets, rules=self.runtime.rules, mesh=self.mesh
        )
        return self._in_order(losses, "B T")

    def _head(self, out: TransformerOutput) -> Array:
        if self.config.tied_embeddings:
            return out.embedding.T
        return self.weight("lm_head", "D V")


class ScalarModel(_Model):
    """A number per token instead of logits: reward model and critic.

    Its `transformer` tree is the language model's, so that one assignment copies it.

    >>> import jax, jax.numpy as jnp
    >>> from llama_jax import Runtime, init_params, preset
    >>> small = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 2}
    >>> small |= {"head_dim": 8, "mlp_dim": 32, "vocab_size": 100}
    >>> config = preset("llama2-7b").replace(head="scalar", **small)
    >>> model = ScalarModel(config, Runtime())
    >>> params = init_params(model, jax.random.key(0))
    >>> scalars, _ = apply(model, params, jnp.asarray([[1, 5, 7]]))
    >>> scalars.shape
    (1, 3)
    """

    def __post_init__(self) -> None:
        self._check("scalar")
        super().__post_init__()

    def __call__(
        self,
        tokens: Tokens,
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: KVCache | NewCache | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T"], KVCache | None]:
        """Compute a scalar (float32) of each token and those before it.

        Args:
          tokens: as of `Llama`, and so are the others.
          positions: rotary positions.
          segment_ids: of packed rows.
          cache: of earlier tokens.
          lengths: how many of each row's tokens are real.

        Returns:
          The scalars, and the cache with the new tokens (`None` without one).
        """
        out, head = self._run(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            lengths=lengths,
        )
        exact = jnp.float32
        scalars = jnp.matmul(
            out.x.astype(exact), head.astype(exact), precision=matmul_precision(exact)
        )
        return self._in_order(scalars, "B T"), out.cache

    def _head(self, out: TransformerOutput) -> Array:
        return self.weight("scalar_head", "D")


def model_for(
    config: LlamaConfig, runtime: Runtime, mesh: Mesh | None = None
) -> Llama | ScalarModel:
    """Make the model that the configuration's head names."""
    return (Llama if config.head == "lm" else ScalarModel)(config, runtime, mesh)


@checked(ConfigError)
def apply(model: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Call a model with a plain tree of parameters.

    Args:
      model: a `Llama`, a `ScalarModel` or a part of one.
      params: its weights.
      *args: of the call.
      **kwargs: of the call; `method` names another method, as `"losses"`.

    >>> import jax.numpy as jnp, llama_jax
    >>> model, params, _ = llama_jax.load()
    >>> tokens = jnp.asarray([[1, 403, 407, 261]])
    >>> losses = apply(model, params, tokens[:, :-1], tokens[:, 1:], method="losses")
    >>> losses.shape
    (1, 3)
    """
    try:
        return model.apply({"params": params}, *args, **kwargs)
    except FlaxError as error:
        reason = str(error).partition(" (https")[0]
        raise ConfigError(f"apply: params are not of this model: {reason}") from error
