"""Messages that a user types or pastes."""

import contextlib
import os
import select
import sys

_QUOTES = '"""'
_PASTE_SECONDS = 0.03  # between two lines of one paste


class MessageReader:
    """Reads messages from standard input, of one or more lines.

    In a terminal a pasted text is one message, whatever the number of its lines. With
    GNU readline the terminal marks where a paste begins and ends (bracketed paste), and
    the text can be edited before it is sent. Without it (libedit, Windows' console) the
    lines that arrive together are one message.
    """

    def __init__(self) -> None:
        self._terminal = sys.stdin.isatty()
        self._brackets = (
            self._terminal and sys.stdout.isatty() and _enable_line_editing()
        )

    def read(self) -> str:
        r"""Read a message: a line or a paste, continued by `\`, or quoted by three `"`.

        Raises:
          EOFError: there is no more input.
        """
        lines = self._lines("> ")
        with contextlib.suppress(EOFError):
            if lines[0].strip() == _QUOTES:
                del lines[0]
                while _QUOTES not in map(str.strip, lines):
                    lines += self._lines(". ")
                del lines[[line.strip() for line in lines].index(_QUOTES)]
                return "\n".join(lines)
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines += self._lines(". ")
        return "\n".join(lines)

    def _lines(self, prompt: str) -> list[str]:
        text = input(prompt if self._terminal else "")
        lines = text.removesuffix("\n").split("\n")
        with contextlib.suppress(EOFError):
            while self._terminal and not self._brackets and _more_is_waiting():
                lines.append(input())
        return lines


def _enable_line_editing() -> bool:
    """Enable line editing if there is any; whether it returns a paste as one line."""
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or "") or os.environ.get("TERM") == "dumb":
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python disables it
    return True


def _more_is_waiting() -> bool:
    with contextlib.suppress(OSError, ValueError):  # Windows selects only sockets
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
    return False
