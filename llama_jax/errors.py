"""Exceptions for bad input; each message says what, where and how to fix it.

All are subclasses of `ValueError`. Commands print the message and exit with status 2.
"""


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
