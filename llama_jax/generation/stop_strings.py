"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence

from llama_jax.errors import PromptError


class StopScanner:
    """Returns text until a stop string appears, however the text is cut.

    Text that may be the beginning of a stop string is buffered until that is decided,
    so that no part of a stop string is ever returned.

    Args:
      stops: stop strings, none of them empty.

    Raises:
      PromptError: `stops` is no such list.

    >>> scanner = StopScanner(["END"])
    >>> scanner.push("one E"), scanner.push("ND two"), scanner.stopped
    ('one ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(stops):
            raise PromptError(
                f"stop: must be a list of strings, none of them empty, got {stops!r}"
            )
        self._stops = tuple(stops)
        self._buffer = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text and return what cannot belong to a stop string.

        Sets `stopped` once a stop string is complete. Of several, the one that is
        complete first counts; of those that end together, the one that begins first.
        """
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._buffer + text
        ends = [
            (at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0
        ]
        if ends:
            self.stopped, self._buffer = True, ""
            return text[: min(ends)[1]]
        size = max(_overlap(text, stop) for stop in self._stops)
        self._buffer = text[len(text) - size :]
        return text[: len(text) - size]

    def flush(self) -> str:
        """Return the buffered text at the end of the input."""
        text, self._buffer = self._buffer, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    for size in range(longest, 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
