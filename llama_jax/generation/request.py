"""A request: what to read, how to continue it, and where to stop.

The command line, the text functions, samples during training and scoring all begin with
a `Request`; only the makers below turn text into prompt ids and stop ids.
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict, Unpack

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

    prompt_ids: Sequence[int]
    max_new_tokens: int | None = None
    sampling: Sampling = Sampling()  # noqa: RUF009  (it is frozen)
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    num_samples: int = 1
    logprobs: int | None = None
    echo: bool = False
    after_marker: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "stop_ids"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if not self.prompt_ids:
            raise PromptError("prompt_ids: is empty; give at least one token id")
        for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("logprobs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise PromptError(f"{name}: must be at least {least}, got {value}")
        if not isinstance(self.sampling, Sampling):
            raise PromptError(
                f"sampling: must be one Sampling, got {self.sampling!r}; give each "
                "request its own"
            )


def _ids(name: str, ids: Iterable[int]) -> tuple[int, ...]:
    if isinstance(ids, str):
        raise PromptError(
            f"{name}: must be a list of token ids, got the string {ids!r}; "
            "text_request encodes a text"
        )
    try:
        return tuple(map(operator.index, ids))
    except TypeError as error:
        raise PromptError(
            f"{name}: must be a list of token ids, got {ids!r} ({error})"
        ) from error


def _stop_strings(stop: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str) or not all(
        isinstance(text, str) and text for text in stop
    ):
        raise PromptError(
            f"stop: must be a list of strings, none of them empty, got {stop!r}"
        )
    return tuple(stop)


class Settings(TypedDict, total=False):
    """The fields of a `Request` that its makers pass on; see there."""

    max_new_tokens: int | None
    sampling: Sampling
    stop_ids: Sequence[int]
    stop: Sequence[str]
    num_samples: int
    logprobs: int | None
    echo: bool


def text_request(
    tokenizer: Tokenizer, text: str, **settings: Unpack[Settings]
) -> Request:
    """Make the request that continues a text.

    Args:
      tokenizer: the model's tokenizer.
      text: not empty; the begin of sequence is added, unless the model's prompts have
        none.
      **settings: fields of `Request`. `stop_ids` default to `text_stop_ids`.

    Raises:
      PromptError: the text is empty, or a setting is out of range.

    >>> import llama_jax
    >>> tokenizer = llama_jax.load().tokenizer
    >>> request = text_request(tokenizer, "Once upon a time", max_new_tokens=20)
    >>> tokenizer.decode(request.prompt_ids)
    'Once upon a time'
    """
    if not isinstance(text, str):
        raise PromptError(f"prompt: must be a string, got {text!r}")
    if not text:
        raise PromptError("prompt: is empty; write at least one character")
    settings.setdefault("stop_ids", text_stop_ids(tokenizer))
    return Request(completion_prompt(tokenizer, text), **settings)


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
      format: prompt format or its name; defaults to that of Meta's chat models with
        this tokenizer.
      **settings: fields of `Request`. `stop_ids` default to the format's and the
        tokenizer's `end_ids`; the format's stop strings are added to `stop`.

    Raises:
      UnsafePromptError: a message contains special tags of the format.
      PromptError: the format cannot express the messages, or a setting is out of range.

    >>> import llama_jax
    >>> tokenizer = llama_jax.load().tokenizer
    >>> dialog = [{"role": "user", "content": "Tell me a story."}]
    >>> tokenizer.decode(chat_request(tokenizer, dialog).prompt_ids)
    '[INST] Tell me a story. [/INST]'
    """
    if isinstance(dialog, str | Mapping):
        raise PromptError(f"dialog: must be a list of messages, got {dialog!r}")
    style = get_format(format) if isinstance(format, str) else format
    style = style or default_format(tokenizer)
    settings.setdefault("stop_ids", style.stop_ids(tokenizer))
    settings["stop"] = (*style.stop_strings, *_stop_strings(settings.get("stop", ())))
    return Request(style.encode(tokenizer, dialog), **settings)


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
      **settings: fields of `Request`, without `echo`. `stop_ids` default to the
        end-of-middle token and the tokenizer's `end_ids`.

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
