"""A request: what to read, how to continue it, and where to stop.

The command line, the text functions, samples during training and scoring all begin with
a `Request`; only the makers below turn text into prompt ids and stop ids.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias, TypedDict, Unpack

import numpy as np

from llama_jax.arguments import checked
from llama_jax.errors import PromptError
from llama_jax.generation.sampling import Sampling
from llama_jax.text.prompt_formats import (
    Dialog,
    PromptFormat,
    completion_prompt,
    default_format,
    get_format,
    infilling_prompt,
)
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Int

TokenIds: TypeAlias = Sequence[SupportsIndex] | Int[np.ndarray, " T"]
"""Token ids as integers of any type; a `Request` stores a tuple of `int`."""


@checked(PromptError)
@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
      prompt_ids: token ids of the prompt, at least one.
      max_new_tokens: most tokens of a completion; None fills the context.
      sampling: how tokens are drawn.
      stop_ids: token ids that end a completion; they are not part of it.
      stop: strings that end a completion; they are not part of it.
      num_samples: completions of the prompt.
      logprobs: report the log-probability of every token, and those of this many
        likeliest tokens at its position; None reports nothing.
      echo: put the prompt in front of the completion.
      after_marker: decode the completion as the continuation of a text (infilling),
        not as the beginning of one.

    Raises:
      PromptError: a value is out of range.

    >>> Request([1, 5, 9], max_new_tokens=4).prompt_ids
    (1, 5, 9)
    """

    prompt_ids: TokenIds
    max_new_tokens: int | None = None
    sampling: Sampling = Sampling()  # noqa: RUF009  (it is frozen)
    stop_ids: TokenIds = ()
    stop: Sequence[str] = ()
    num_samples: int = 1
    logprobs: int | None = None
    echo: bool = False
    after_marker: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "stop_ids"):
            ids = tuple(map(operator.index, getattr(self, name)))
            object.__setattr__(self, name, ids)
        object.__setattr__(self, "stop", tuple(self.stop))
        if "" in self.stop:
            raise PromptError("stop: has an empty string; remove it")
        if not self.prompt_ids:
            raise PromptError("prompt_ids: is empty; give at least one token id")
        for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("logprobs", 0)):
            if (value := getattr(self, name)) is not None:
                if value < least:
                    raise PromptError(f"{name}: must be at least {least}, got {value}")
                object.__setattr__(self, name, int(value))


class Settings(TypedDict, total=False):
    """The fields of a `Request` that its makers pass on; see there."""

    max_new_tokens: int | None
    sampling: Sampling
    stop_ids: TokenIds
    stop: Sequence[str]
    num_samples: int
    logprobs: int | None
    echo: bool


def default_sampling(tokenizer: Tokenizer, **given: Any) -> Sampling:
    """Return the sampling settings of a checkpoint, and ours where it has none.

    Args:
      tokenizer: of the checkpoint.
      **given: fields of `Sampling` that take precedence.

    Raises:
      PromptError: the checkpoint's settings are unknown or out of range.
    """
    defaults = tokenizer.settings.sampling
    fields = {field.name for field in dataclasses.fields(Sampling)}
    if unknown := sorted(defaults.keys() - fields):
        raise PromptError(
            f"sampling: the checkpoint sets {', '.join(unknown)}, which llama_jax does "
            "not have; convert the model again"
        )
    try:
        return Sampling(**{**defaults, **given})
    except PromptError as error:
        raise PromptError(f"{error}; the checkpoint sets {dict(defaults)}") from error


@checked(PromptError)
def text_request(
    tokenizer: Tokenizer, text: str, **settings: Unpack[Settings]
) -> Request:
    """Make the request that continues a text.

    Args:
      tokenizer: the model's tokenizer.
      text: not empty; the begin of sequence is added, unless the model's prompts have
        none.
      **settings: fields of `Request`. `sampling` defaults to `default_sampling`,
        `stop_ids` to `text_stop_ids`.

    Raises:
      PromptError: the text is empty, or a setting is out of range.

    >>> import llama_jax
    >>> tokenizer = llama_jax.load().tokenizer
    >>> request = text_request(tokenizer, "Once upon a time", max_new_tokens=20)
    >>> tokenizer.decode(request.prompt_ids)
    'Once upon a time'
    """
    if not text:
        raise PromptError("prompt: is empty; write at least one character")
    settings.setdefault("sampling", default_sampling(tokenizer))
    settings.setdefault("stop_ids", text_stop_ids(tokenizer))
    return Request(completion_prompt(tokenizer, text), **settings)


@checked(PromptError)
def chat_request(
    tokenizer: Tokenizer,
    dialog: Dialog,
    *,
    format: str | PromptFormat | None = None,
    **settings: Unpack[Settings],
) -> Request:
    """Make the request that answers a dialog.

    Args:
      tokenizer: the model's tokenizer.
      dialog: messages with `role` and `content`; the last is the user's.
      format: prompt format or its name (see `get_format`); defaults to the
        checkpoint's chat template, or to the format of Meta's chat models with this
        tokenizer.
      **settings: fields of `Request`. `sampling` defaults to `default_sampling`,
        `stop_ids` to the format's and the tokenizer's `end_ids`; the format's stop
        strings are added to `stop`.

    Raises:
      UnsafePromptError: a message contains special tags of the format.
      PromptError: the format cannot express the messages, or a setting is out of range.

    >>> import llama_jax
    >>> tokenizer = llama_jax.load().tokenizer
    >>> dialog = [{"role": "user", "content": "Tell me a story."}]
    >>> tokenizer.decode(chat_request(tokenizer, dialog).prompt_ids)
    '[INST] Tell me a story. [/INST]'
    """
    style = get_format(format, tokenizer) if isinstance(format, str) else format
    style = style or default_format(tokenizer)
    settings.setdefault("sampling", default_sampling(tokenizer))
    settings.setdefault("stop_ids", style.stop_ids(tokenizer))
    settings["stop"] = (*style.stop_strings, *settings.get("stop", ()))
    return Request(style.encode(tokenizer, dialog), **settings)


@checked(PromptError)
def infill_request(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    suffix_first: bool = False,
    **settings: Unpack[Settings],
) -> Request:
    """Make the request that fills the gap between two texts (Code Llama paper, 2.3).

    Args:
      tokenizer: tokenizer of an infilling model (Code Llama 7B or 13B).
      prefix: text before the gap.
      suffix: text after it.
      suffix_first: show the model the suffix before the prefix.
      **settings: fields of `Request`, without `echo`. `sampling` defaults to
        `default_sampling`, `stop_ids` to the end-of-middle token and the tokenizer's
        `end_ids`.

    Raises:
      PromptError: not an infilling model, or a setting is out of range.

    >>> import llama_jax
    >>> infill_request(llama_jax.load().tokenizer, "def f(x):", "return x")
    Traceback (most recent call last):
    llama_jax.errors.PromptError: infilling: the tokenizer has no infilling pieces; ...
    """
    if settings.get("echo"):
        raise PromptError(
            "echo: must be False for infilling; the prompt has prefix and suffix in "
            "the model's order"
        )
    settings.setdefault("sampling", default_sampling(tokenizer))
    settings.setdefault("stop_ids", infilling_stop_ids(tokenizer))
    ids = infilling_prompt(tokenizer, prefix, suffix, suffix_first=suffix_first)
    return Request(ids, after_marker=True, **settings)


def text_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids that end a text: `end_ids`, and the begin of the next sequence.

    It separates texts in some models (llama2.c's).
    """
    bos = (tokenizer.bos_id,) if tokenizer.bos_id >= 0 else ()
    return (*tokenizer.end_ids, *bos)


def infilling_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids that end the text of a gap."""
    pieces, ends = tokenizer.infilling, tokenizer.end_ids
    return ends if pieces is None else (pieces.end, *ends)
