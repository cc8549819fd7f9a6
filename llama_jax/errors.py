"""Exceptions for bad input; each message says what, where and how to fix it.

All are subclasses of `ValueError`. Commands print the message and exit with status 2.
"""

import difflib
from collections.abc import Collection, Mapping

_ALIASES = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "8bit": "int8",
    "4bit": "int4",
    "chatml": "template",
    "huggingface": "hf",
    "safetensors": "hf",
    "llama.cpp": "gguf",
    "pytorch": "meta",
}


class LlamaJaxError(ValueError):
    """Base class of all exceptions that this library raises for bad input."""


class ConfigError(LlamaJaxError):
    """A configuration is incomplete, contradictory or not understood."""


class CheckpointError(LlamaJaxError):
    """A checkpoint is missing, damaged, of the wrong shape or unsafe to read."""


class TokenizerError(LlamaJaxError):
    """A tokenizer is missing, damaged or does not match its model."""


class PromptError(LlamaJaxError):
    """A prompt, dialog or sampling setting is invalid."""


class UnsafePromptError(PromptError):
    """A user's text contains special tags of its prompt format."""


class MeshError(LlamaJaxError):
    """A device mesh is impossible here, or does not divide the model."""


class DataError(LlamaJaxError):
    """Training data cannot be read, or contains nothing to learn from.

    Attributes:
      reason: one word by which such records are counted.
    """

    def __init__(self, message: str, *, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason


class ProcessError(LlamaJaxError):
    """A process of a distributed run is missing, has died or was started wrongly."""


class TrainError(LlamaJaxError):
    """A training run cannot start, continue or resume."""


class RewardError(LlamaJaxError):
    """A reward function is missing, fails, or returns something else than rewards."""


class ServeError(LlamaJaxError):
    """The engine of a server cannot run a request now, or at all."""


class QueueFull(ServeError):
    """Too many requests wait; the same request may succeed later."""


class PromptTooLong(ServeError):
    """A prompt does not fit the context.

    Attributes:
      prompt_tokens: tokens of the prompt.
      max_tokens: tokens that the context holds, prompt and answer together.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, but the context holds "
            f"{max_tokens}, the answer included; shorten it"
        )
        self.prompt_tokens, self.max_tokens = prompt_tokens, max_tokens


def did_you_mean(
    name: str, known: Collection[str], *, aliases: Mapping[str, str] = _ALIASES
) -> str:
    """Return a suggestion for an unknown name, as the end of a sentence.

    Args:
      name: that is unknown.
      known: names that exist.
      aliases: names that other software has for them.

    Returns:
      "; did you mean ...?", or nothing if no name is similar.

    >>> did_you_mean("bf16", ["bfloat16", "float32"])
    "; did you mean 'bfloat16'?"
    >>> did_you_mean("a100", ["a100-40", "a100-80", "h100"])
    "; did you mean 'a100-40' or 'a100-80'?"
    """
    name = name.lower().replace("_", "-")
    close = [other for other in known if len(name) > 1 and other.startswith(name)]
    if aliases.get(name) in known:
        close = [aliases[name]]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    return f"; did you mean {' or '.join(map(repr, close[:2]))}?" if close else ""
