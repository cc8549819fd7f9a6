"""Rollouts: answers that a policy has sampled, as arrays and as text.

Tokens in, tokens out: an answer is trained on with the ids that were sampled, never
encoded again. Nothing is appended that was not sampled: an answer that the limit cut
has no end.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.atomic_write import new_file
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import ConfigError, PromptError
from llama_jax.generation.generate import Completion, generate
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.params import flatten, unflatten
from llama_jax.rlhf.rewards import Answer, Prompt
from llama_jax.types import Params, PyTree

_FINAL_NORM = "transformer/final_norm/scale"


class Rollout(NamedTuple):
    """Sampled answers, one row each; NumPy arrays.

    Attributes:
      tokens: ids of prompt and answer without the last, `[N, T]`; 0 after them.
      targets: the id that follows each token, `[N, T]`; 0 after them.
      mask: targets that were sampled, `[N, T]`.
      logprobs: of the targets when they were sampled, `[N, T]`; 0 elsewhere.
      ended: answers that the model ended, not the limit, `[N]`.
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    ended: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Sampled tokens of each answer, `[N]`."""
        lengths: np.ndarray = self.mask.sum(axis=1)
        return lengths


def with_temperature(params: Params, temperature: float) -> Params:
    """Return parameters whose logits are divided by the temperature.

    The last norm's scale is divided, so that every program that takes the parameters,
    in training and in decoding, computes log-probabilities at that temperature.
    """
    if temperature == 1.0:
        return params
    leaves = flatten(params)
    scale: PyTree = leaves[_FINAL_NORM]
    leaves[_FINAL_NORM] = (scale.astype(jnp.float32) / temperature).astype(scale.dtype)
    return unflatten(leaves)


def check_sampling(sampling: Sampling) -> None:
    """Raise a `ConfigError` if tokens would not be drawn from the model's distribution.

    Top-p, top-k and min-p normalize over the tokens that remain, penalties and biases
    change the logits: log-probabilities in training would be others.
    """
    exact = Sampling(temperature=1.0, top_p=1.0, seed=sampling.seed)
    for field in dataclasses.fields(Sampling):
        value = getattr(sampling, field.name)
        if field.name != "temperature" and value != getattr(exact, field.name):
            raise ConfigError(
                f"sampling: {field.name} is {value}, which changes the distribution "
                f"that the policy is trained on; leave it at "
                f"{getattr(exact, field.name)}"
            )
    if not sampling.temperature > 0:
        raise ConfigError(
            f"sampling: temperature is {sampling.temperature}; a policy is trained on "
            "samples, so it must be more than 0"
        )


def sample_rollout(
    loaded: Loaded,
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    length: int,
) -> tuple[Rollout, list[Answer]]:
    """Sample answers.

    Args:
      loaded: policy.
      requests: of the prompts; their sampling must have temperature 1 and no filters,
        since `temperature` is put into the weights.
      prompts: of the requests, for rewards.
      temperature: of the samples; log-probabilities are at this temperature.
      length: T; prompt and answer must fit.

    Returns:
      The arrays, and the answers for a `Reward`, request by request and sample by
      sample.

    Raises:
      ConfigError: the sampling of a request is not exact.
      PromptError: a prompt with its longest answer does not fit into T.
    """
    for request in requests:
        check_sampling(request.sampling)
    params = with_temperature(loaded.params, temperature)
    scored = [
        dataclasses.replace(
            request,
            logprobs=0,
            sampling=dataclasses.replace(request.sampling, temperature=1.0),
        )
        for request in requests
    ]
    completions = generate(loaded._replace(params=dict(params)), scored)
    whose = [
        p for p, r in zip(prompts, requests, strict=True) for _ in range(r.num_samples)
    ]
    answers = [
        Answer(
            prompt=prompt,
            text=completion.text,
            prompt_ids=completion.prompt_ids,
            token_ids=sampled_ids(completion),
            ended=completion.finish_reason == "stop",
        )
        for prompt, completion in zip(whose, completions, strict=True)
    ]
    return make_rollout(completions, length), answers


def sampled_ids(completion: Completion) -> tuple[int, ...]:
    """The ids that were sampled, with the one that ended the completion."""
    stop = () if completion.stop_id is None else (completion.stop_id,)
    return (*completion.token_ids, *stop)


def make_rollout(completions: Sequence[Completion], length: int) -> Rollout:
    """Make the arrays of completions, which have log-probabilities.

    Raises:
      PromptError: a prompt with its answer does not fit into `length` slots.
    """
    count = len(completions)
    tokens, targets = np.zeros((2, count, length), np.int32)
    mask = np.zeros((count, length), bool)
    logprobs = np.zeros((count, length), np.float32)
    for row, completion in enumerate(completions):
        sampled = sampled_ids(completion)
        ids = [*completion.prompt_ids, *sampled]
        if len(ids) - 1 > length:
            raise PromptError(
                f"prompt {row + 1}: has {len(ids)} tokens with its answer, but a row "
                f"of training only {length + 1}; raise the sequence length"
            )
        assert completion.logprobs is not None, "rollouts are sampled with logprobs"
        stop = () if completion.stop_logprob is None else (completion.stop_logprob,)
        first = len(completion.prompt_ids) - 1
        answer = slice(first, first + len(sampled))
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:]
        mask[row, answer] = True
        logprobs[row, answer] = (*completion.logprobs, *stop)
    ended = np.array([c.finish_reason == "stop" for c in completions])
    return Rollout(tokens, targets, mask, logprobs, ended)


def save_rollout(path: pathlib.Path, rollout: Rollout, rewards: np.ndarray) -> None:
    """Write a rollout and its rewards; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **rollout._asdict(), rewards=rewards)


def load_rollout(path: pathlib.Path) -> tuple[Rollout, np.ndarray]:
    """Read what `save_rollout` has written."""
    with np.load(path) as arrays:
        rollout = Rollout(*(arrays[name] for name in Rollout._fields))
        return rollout, arrays["rewards"]
