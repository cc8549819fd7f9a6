"""Rewards: functions from answers to numbers.

A reward is a reward model, two of them combined as in the paper, a Python function, a
language model that judges, or a weighted sum of rewards.
"""

import dataclasses
import importlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import RewardError
from llama_jax.generation.request import chat_request
from llama_jax.generation.scoring import score
from llama_jax.rlhf.estimators import combine_rewards
from llama_jax.rlhf.reward_model import score_rows
from llama_jax.text.dialogs import Dialog, Message, PromptFormat
from llama_jax.types import Float

Prompt = str | Dialog
"""A text to continue, or a dialog to answer."""


class Answer(NamedTuple):
    """An answer to a prompt, as it was sampled.

    Attributes:
      prompt: the text or the dialog.
      text: of the answer.
      prompt_ids: tokens of the prompt.
      token_ids: tokens of the answer, with the one that ended it.
      ended: whether the model ended it, not the limit of tokens.
    """

    prompt: Prompt
    text: str
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    ended: bool = True


@runtime_checkable
class Reward(Protocol):
    """Maps answers to rewards, higher for better answers."""

    @property
    def name(self) -> str:
        """Its name in reports and errors."""

    def __call__(self, answers: Sequence[Answer]) -> Float[np.ndarray, " N"]:
        """Compute the reward of each answer, float32; raise a `RewardError` if not."""


RewardFunction = Callable[[list[Any], list[str]], Any]
"""Maps prompts and the text of answers to a number for each."""


@dataclasses.dataclass(frozen=True)
class FunctionReward:
    """A Python function of prompts and answers as a reward.

    Attributes:
      function: called with a list of prompts and a list of the answers' texts; returns
        a number for each.
      name: for reports and errors; defaults to the function's.

    >>> reward = FunctionReward(lambda prompts, answers: map(len, answers), "length")
    >>> reward([Answer("Hi", "Hello", (1,), (2, 3))]).tolist()
    [5.0]
    """

    function: RewardFunction
    name: str = ""

    def __post_init__(self) -> None:
        """Take the function's name."""
        name = self.name or getattr(self.function, "__name__", "reward")
        object.__setattr__(self, "name", name)

    def __call__(self, answers: Sequence[Answer]) -> Float[np.ndarray, " N"]:
        """Call the function.

        Raises:
          RewardError: it raises, returns another number of rewards, or one that is not
            a finite number.
        """
        try:
            result = list(
                self.function([a.prompt for a in answers], [a.text for a in answers])
            )
        except Exception as error:
            raise RewardError(
                f"reward {self.name}: the function raised {type(error).__name__}: "
                f"{error}; fix the function"
            ) from error
        return check_rewards(self.name, result, answers)


def check_rewards(
    name: str, rewards: Sequence[Any], answers: Sequence[Answer]
) -> Float[np.ndarray, " N"]:
    """Return rewards as an array.

    Raises:
      RewardError: there are not as many rewards as answers, or one is not a finite
        number.
    """
    if len(rewards) != len(answers):
        raise RewardError(
            f"reward {name}: returned {len(rewards)} rewards for {len(answers)} "
            "answers; return one number for each"
        )
    for reward, answer in zip(rewards, answers, strict=True):
        if isinstance(reward, np.ndarray | jax.Array) and reward.ndim == 0:
            reward = reward.item()
        is_number = isinstance(reward, (numbers.Real, np.number))
        if not is_number or not math.isfinite(reward):
            raise RewardError(
                f"reward {name}: returned {reward!r:.40} for the answer "
                f"{answer.text!r:.60}; return a finite number"
            )
    return np.asarray([float(reward) for reward in rewards], np.float32)


def load_reward(name: str) -> FunctionReward:
    """Import a reward function by its name, `module:function`.

    Raises:
      RewardError: there is no such module or function.

    >>> load_reward("operator:nothing")
    Traceback (most recent call last):
    llama_jax.errors.RewardError: reward 'operator:nothing': the module operator has ...
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise RewardError(
            f"reward {name!r}: is not of the form module:function, such as "
            "my_rewards:brevity"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: importing {module_name} failed with "
            f"{type(error).__name__}: {error}; name a module in the current folder or "
            "an installed one"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RewardError(
            f"reward {name!r}: the module {module_name} has no function {attribute}; "
            "define one that takes prompts and answers"
        )
    return FunctionReward(function, name)


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """The score of a reward model: its scalar at the last token of the answer.

    Attributes:
      loaded: a model with a scalar head.
      format: writes dialogs for it; None takes the tokens as they were sampled, which
        needs the policy's tokenizer.
      batch_size: rows of every batch.
      name: for reports and errors.
    """

    loaded: Loaded
    format: PromptFormat | None = None
    batch_size: int = 8
    name: str = "reward model"

    def __post_init__(self) -> None:
        """Check the head."""
        self.loaded.model.config.check_head("scalar", f"reward {self.name}")

    def __call__(self, answers: Sequence[Answer]) -> Float[np.ndarray, " N"]:
        """Score answers.

        Raises:
          RewardError: an answer is longer than the model's context, or a score is not
            a finite number.
        """
        rows = [self._ids(answer) for answer in answers]
        limit = self.loaded.model.config.max_seq_len
        if rows and (longest := max(map(len, rows))) > limit:
            raise RewardError(
                f"reward {self.name}: an answer with its prompt has {longest} tokens, "
                f"but the reward model's context holds {limit}; sample shorter answers"
            )
        scores = score_rows(self.loaded, rows, batch_size=self.batch_size)
        return check_rewards(self.name, scores.tolist(), answers)

    def _ids(self, answer: Answer) -> list[int]:
        if self.format is None:
            return [*answer.prompt_ids, *answer.token_ids]
        question: list[Message] = (
            [Message(role="user", content=answer.prompt)]
            if isinstance(answer.prompt, str)
            else list(answer.prompt)
        )
        dialog = [*question, Message(role="assistant", content=answer.text)]
        spans = self.format.spans(self.loaded.tokenizer, dialog, allow_tags=True)
        return [id for span in spans for id in span.ids]


@dataclasses.dataclass(frozen=True)
class SafetyGatedReward:
    """Two reward models combined as in the Llama 2 paper, before whitening.

    Attributes:
      helpfulness: scores as logits.
      safety: scores as logits.
      is_safety_prompt: whether a prompt is meant to provoke unsafe answers; None takes
        no prompt for one.
      gate: probability of being safe below which the safety score counts.
      name: for reports and errors.
    """

    helpfulness: Reward
    safety: Reward
    is_safety_prompt: Callable[[Prompt], bool] | None = None
    gate: float = 0.15
    name: str = "helpfulness gated by safety"

    def __call__(self, answers: Sequence[Answer]) -> Float[np.ndarray, " N"]:
        """Combine the scores of both models; see `estimators.combine_rewards`."""
        tagged = [
            self.is_safety_prompt is not None and bool(self.is_safety_prompt(a.prompt))
            for a in answers
        ]
        combined = combine_rewards(
            jnp.asarray(self.helpfulness(answers)),
            jnp.asarray(self.safety(answers)),
            jnp.asarray(tagged, bool),
            gate=self.gate,
        )
        return np.asarray(combined)


@dataclasses.dataclass(frozen=True)
class JudgeReward:
    """A chat model that is asked whether an answer is good.

    The reward is the log-odds of "Yes" against "No" as its answer.

    Attributes:
      loaded: a chat model.
      question: asked about a prompt and an answer, which replace `{prompt}` and
        `{answer}`.
      format: prompt format of the model; None is its default.
      name: for reports and errors.
    """

    loaded: Loaded
    question: str = (
        "Here is a request and an answer to it.\n\nRequest: {prompt}\n\nAnswer: "
        "{answer}\n\nIs the answer correct and helpful? Answer with Yes or No."
    )
    format: PromptFormat | None = None
    name: str = "judge"

    def __call__(self, answers: Sequence[Answer]) -> Float[np.ndarray, " N"]:
        """Ask about every answer."""
        tokenizer = self.loaded.tokenizer
        requests = []
        for answer in answers:
            prompt = answer.prompt
            if not isinstance(prompt, str):
                prompt = "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)
            text = self.question.replace("{prompt}", prompt)
            text = text.replace("{answer}", answer.text)
            dialog: Dialog = [Message(role="user", content=text)]
            asked = chat_request(tokenizer, dialog, format=self.format)
            for word in ("Yes", "No"):
                ids = tokenizer.encode(word, bos=False, eos=False)
                requests.append(
                    dataclasses.replace(asked, prompt_ids=(*asked.prompt_ids, *ids))
                )
        lengths = [
            len(tokenizer.encode(word, bos=False, eos=False)) for word in ("Yes", "No")
        ]
        sums = [
            float(result.logprobs[-lengths[index % 2] :].sum())
            for index, result in enumerate(score(self.loaded, requests))
        ]
        odds = [yes - no for yes, no in zip(sums[::2], sums[1::2], strict=True)]
        return check_rewards(self.name, odds, answers)


@dataclasses.dataclass(frozen=True)
class WeightedReward:
    """A weighted sum of rewards.

    Attributes:
      terms: rewards with their weights.

    >>> length = FunctionReward(lambda prompts, answers: map(len, answers), "length")
    >>> reward = WeightedReward(((length, -0.5),))
    >>> reward.name, reward([Answer("Hi", "Hello", (1,), (2, 3))]).tolist()
    ('-0.5 length', [-2.5])
    """

    terms: tuple[tuple[Reward, float], ...]

    @property
    def name(self) -> str:
        """The names of the terms, with their weights."""
        return " + ".join(f"{weight:g} {reward.name}" for reward, weight in self.terms)

    def __call__(self, answers: Sequence[Answer]) -> Float[np.ndarray, " N"]:
        """Compute the sum."""
        total = np.zeros(len(answers), np.float32)
        for reward, weight in self.terms:
            total += np.float32(weight) * reward(answers)
        return total
