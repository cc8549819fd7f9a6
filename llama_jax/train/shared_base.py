"""Models on the frozen weights of a policy, each with adapters and a scalar head.

The weights are on the devices once, plain or quantized. Adapters that were trained on
other weights are refused, by the fingerprints of both.
"""

from llama_jax.arguments import checked
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.conversion.peft_base import is_adapter, read_base
from llama_jax.errors import ConfigError, TrainError
from llama_jax.loading import open_model, read_adapters
from llama_jax.model.lora import Lora, adapt
from llama_jax.model.transformer import ScalarModel
from llama_jax.params import SCALAR_HEAD
from llama_jax.runtime import DType
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.losses import next_token_loss
from llama_jax.train.methods import Base, Method, adapters_on, random_head
from llama_jax.types import Params, Path


@checked(TrainError)
def train_critic_on(
    policy: Method,
    *,
    adapter: Path | None = None,
    dtype: DType = "float32",
    seed: int = 0,
) -> Method:
    """Train adapters and a scalar head on the frozen weights of a policy.

    Args:
      policy: of `train_adapters`.
      adapter: initial adapters with a scalar head, trained on the same weights; if
        None, new ones with the policy's rank and targets.
      dtype: of what is trained.
      seed: of a new head and adapters.

    Raises:
      ConfigError: the policy trains all its weights, or the adapters have no head or
        were trained on other weights.

    >>> import llama_jax
    >>> lora = llama_jax.Lora(rank=2, alpha=4.0, targets=("q_proj",))
    >>> policy = llama_jax.train_adapters(
    ...     llama_jax.open_model(), llama_jax.default_runtime(), lora
    ... )
    >>> critic = train_critic_on(policy)
    >>> critic.frozen is policy.frozen, critic.shapes["scalar_head"].shape
    (True, (192,))
    """
    model, lora = _scalar_model(policy), policy.lora
    if lora is None:
        raise ConfigError(
            "critic: the policy trains all its weights, which cannot be shared; train "
            "adapters, or a critic of its own with train_weights"
        )
    if adapter is None:
        initial: Params = {SCALAR_HEAD: random_head(model.config, seed)}
    else:
        initial, lora = _read_on(policy, adapter)
    base = Base(policy.frozen, policy.fingerprint, policy.base_model)
    return adapters_on(
        base, model, lora, dtype=dtype, seed=seed, loss=next_token_loss, initial=initial
    )


@checked(TrainError)
def load_reward_model_on(policy: Method, adapter: Path, tokenizer: Tokenizer) -> Loaded:
    """Load a reward model of adapters and a head on the frozen weights of a policy.

    Args:
      policy: of `train_adapters`.
      adapter: folder of the reward model, trained on the same weights.
      tokenizer: of the policy.

    Raises:
      ConfigError: the adapters have no head or were trained on other weights.
    """
    adapters, lora = _read_on(policy, adapter)
    params = adapt(policy.frozen, adapters, lora.scaling)
    return Loaded(_scalar_model(policy), params, tokenizer)


def _read_on(policy: Method, adapter: Path) -> tuple[Params, Lora]:
    """Read adapters with a head, which must have been trained on these weights."""
    if not is_adapter(adapter):
        weights = fingerprint(open_model(adapter).leaves)
        raise ConfigError(
            f"{adapter}: is a model with the weights {weights}, but the policy has "
            f"adapters on {policy.fingerprint} ({policy.base_model}); give adapters on "
            "that, of `rlhf reward --lora-rank`"
        )
    base = read_base(adapter)
    if base.weights is None or base.weights != policy.fingerprint:
        raise ConfigError(
            f"{adapter}: adapters were trained on the weights "
            f"{base.weights or 'unknown'} ({base.model}), but the policy has "
            f"{policy.fingerprint} ({policy.base_model}), so they cannot share them; "
            "train both on the same checkpoint"
        )
    adapters, lora = read_adapters(adapter, _scalar_model(policy))
    if SCALAR_HEAD not in adapters:
        raise ConfigError(
            f"{adapter}: adapters have no scalar head; give those of `rlhf reward "
            "--lora-rank`"
        )
    return adapters, lora


def _scalar_model(policy: Method) -> ScalarModel:
    model = policy.model
    config = model.config.replace(head="scalar")
    return ScalarModel(config, model.runtime, model.mesh)
