"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence

from llama_jax.errors import PromptError


class StopScanner:
    """Passes text on until a stop string appears, however the pieces are cut.

    Text that might be the beginning of a stop string is held back until it is clear
    what it is, so nobody ever sees a part of one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(stops):
            raise PromptError(
                f"stop: {stops!r} must be a list of strings, none of them empty"
            )
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now. Sets `stopped` once a stop string is complete.

        Of several, the one that is complete first counts; of those that are complete
        with the same character, the one that begins first.
        """
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        ends = [
            (at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0
        ]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once there is no more text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    for size in range(longest, 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
