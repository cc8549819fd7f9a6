"""The exceptions that bad input raises; each message says what, where and the fix.

All of them are `ValueError`s, so that a caller who does not care which one it was
need not import them. Command lines print the message alone and exit with status 2.
"""


class LlamaJaxError(ValueError):
    """What every refusal of this library is."""


class ConfigError(LlamaJaxError):
    """A model description that is incomplete, contradictory or not understood."""


class CheckpointError(LlamaJaxError):
    """A checkpoint that is missing, damaged, of the wrong shape or unsafe to read."""


class TokenizerError(LlamaJaxError):
    """A tokenizer that is missing or does not fit its model."""


class PromptError(LlamaJaxError):
    """A prompt, dialog or sampling setting that cannot be honoured."""


class UnsafePromptError(PromptError):
    """Text from a user that contains the special tags of its prompt format."""


class MeshError(LlamaJaxError):
    """A device mesh that does not exist here or does not divide the model."""


class DataError(LlamaJaxError):
    """Training data that cannot be read, or that nothing can be learnt from.

    Attributes:
      reason: one word for it, under which such records are counted.
    """

    def __init__(self, message: str, *, reason: str = "malformed") -> None:
        super().__init__(message)
        self.reason = reason


class ProcessError(LlamaJaxError):
    """A process of a run over several that is missing, gone, or was started wrongly."""


class TrainError(LlamaJaxError):
    """A training run that cannot begin, go on or be resumed as it was asked to."""
