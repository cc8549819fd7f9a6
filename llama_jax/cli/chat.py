"""A conversation in the terminal."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator

from llama_jax.checkpoint.atomic_write import write_file
from llama_jax.errors import CheckpointError, PromptError
from llama_jax.text.prompt_formats import Dialog, Message

Answer = Callable[[Dialog], Iterator[str]]

HELP = """\
Write a message; end a line with \\ to continue it, or put several lines between
two lines of \"\"\". Ctrl-C stops an answer, Ctrl-D or /quit ends the conversation.
  /reset          forget the conversation
  /system TEXT    set the system message (no TEXT: none) and start a new conversation
  /save FILE      write the conversation as JSON
  /help           show this help"""


class Conversation:
    """The history of a conversation, its commands, and the loop that reads input.

    Args:
      answer: yields the text of the next answer to a dialog, piece by piece.
      system: the system message, if any.
    """

    def __init__(self, answer: Answer, system: str | None = None) -> None:
        self._answer = answer
        self._system = system
        self._turns: list[Message] = []

    @property
    def dialog(self) -> list[Message]:
        """The messages so far, the system's first."""
        if self._system is None:
            return list(self._turns)
        return [{"role": "system", "content": self._system}, *self._turns]

    def loop(self) -> None:
        """Read and answer messages until the end of input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # line editing, where there is any
                import readline  # noqa: F401
            self._note(HELP)
        while True:
            try:
                message = read_message()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("\n(Ctrl-D or /quit ends the conversation)")
                continue
            if message.strip() == "/quit":
                return
            if message.startswith("/"):
                self.command(message.strip())
            elif message.strip():
                self.say(message)

    def say(self, message: str) -> None:
        """Send a message and print the answer as it is generated.

        The history keeps the text of an interrupted answer, but no message that could
        not be sent.
        """
        self._turns.append({"role": "user", "content": message})
        pieces: list[str] = []
        try:
            for piece in self._answer(self.dialog):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except PromptError as error:
            self._turns.pop()
            self._note(f"error: {error}")
            return
        except KeyboardInterrupt:
            self._note("\n(stopped)")
        print(flush=True)
        self._turns.append({"role": "assistant", "content": "".join(pieces)})

    def command(self, line: str) -> None:
        """Run a command: a line that begins with a slash."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self._turns.clear()
            self._note("(forgotten)")
        elif name == "/system":
            self._system = rest or None
            self._turns.clear()
            self._note("(system message set, conversation forgotten)")
        elif name == "/save":
            self.save(rest)
        elif name == "/help":
            self._note(HELP)
        else:
            self._note(f"{name} is not a command; /help lists them")

    def save(self, file: str) -> None:
        """Write the conversation as JSON: a list of messages."""
        if not file:
            self._note("/save needs a file name, as in /save talk.json")
            return
        path = pathlib.Path(file).expanduser()
        text = json.dumps(self.dialog, ensure_ascii=False, indent=1)
        try:
            write_file(path, text + "\n")
        except CheckpointError as error:
            self._note(f"error: {error}")
        else:
            self._note(f"({len(self.dialog)} messages written to {path})")

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def read_message() -> str:
    """Read one message of one or more lines from standard input.

    Raises:
      EOFError: there is no more input.
    """
    prompt = "> " if sys.stdin.isatty() else ""
    continued = ". " if prompt else ""
    line = input(prompt)
    if line.strip() == '"""':
        lines: list[str] = []
        with contextlib.suppress(EOFError):
            while (line := input(continued)).strip() != '"""':
                lines.append(line)
        return "\n".join(lines)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(input(continued))
        except EOFError:
            break
    return "\n".join(lines)
