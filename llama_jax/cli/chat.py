"""A conversation in the terminal."""

import contextlib
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator

from llama_jax.checkpoint.atomic_write import write_file
from llama_jax.cli.terminal_input import MessageReader
from llama_jax.errors import CheckpointError, PromptError
from llama_jax.generation.generate import Delta
from llama_jax.generation.request import Request
from llama_jax.text.prompt_formats import Dialog, Message

HELP = """\
Write or paste a message; end a line with \\ to continue it, or put several lines
between two lines of \"\"\". Ctrl-C stops an answer, Ctrl-D or /quit ends the
conversation.
  /reset          forget the conversation
  /system TEXT    set the system message (no TEXT: none) and start a new conversation
  /save FILE      write the conversation as JSON
  /help           show this help"""
COMMANDS = ("/quit", "/reset", "/system", "/save", "/help")


class Conversation:
    """The history of a conversation, its commands, and the loop that reads input.

    Args:
      ask: makes the request that answers a dialog.
      answer: runs it.
      context: tokens that the model can read and write in one conversation.
      system: the system message, if any.
    """

    def __init__(
        self,
        ask: Callable[[Dialog], Request],
        answer: Callable[[Request], Iterator[Delta]],
        context: int,
        system: str | None = None,
    ) -> None:
        self._ask = ask
        self._answer = answer
        self._context = context
        self._system = system
        self._turns: list[Message] = []
        self._reset_named = False

    @property
    def dialog(self) -> list[Message]:
        """The messages so far, the system's first."""
        if self._system is None:
            return list(self._turns)
        return [{"role": "system", "content": self._system}, *self._turns]

    def loop(self) -> None:
        """Read and answer messages until the end of input."""
        reader = MessageReader()
        if sys.stdin.isatty():
            self._note(HELP)
        while True:
            try:
                message = reader.read()
                line = message.strip()
                if line == "/quit":
                    return
                # A text of several lines may begin with a slash: a comment, a path.
                name = line.split(maxsplit=1)[:1]
                if line.startswith("/") and (name[0] in COMMANDS or "\n" not in line):
                    self.command(line)
                elif line:
                    self.say(message)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("\n(Ctrl-D or /quit ends the conversation)")

    def say(self, message: str) -> None:
        """Send a message and print the answer as it is generated.

        The history keeps the text of an interrupted answer, but no message that could
        not be sent.
        """
        user: Message = {"role": "user", "content": message}
        try:
            request = self._ask([*self.dialog, user])
            tokens = len(request.prompt_ids)
            if tokens < self._context or not self._turns:
                self._reply(user, request)
            else:
                self._note_full(
                    f"not sent: the conversation has {tokens:,} tokens, but the "
                    f"context holds {self._context:,}"
                )
        except PromptError as error:
            self._note(f"error: {error}")

    def _reply(self, user: Message, request: Request) -> None:
        text, tokens, reason = "", len(request.prompt_ids), None
        with _ctrl_c() as pressed, contextlib.suppress(KeyboardInterrupt):
            for delta in self._answer(request):
                text += delta.text
                tokens += len(delta.token_ids)
                reason = delta.finish_reason
                print(delta.text, end="", flush=True)
                if pressed:
                    break
        print(flush=True)
        self._turns += [user, {"role": "assistant", "content": text}]
        if reason is None:
            self._note("(stopped)")
        elif reason == "length" and tokens >= self._context:
            full = f"the context of {self._context:,} tokens is full"
            self._note_full(f"the answer is cut: {full}")
        elif reason == "length":
            limit = request.max_new_tokens
            self._note(f"(the answer is cut at --max-new-tokens {limit})")

    def command(self, line: str) -> None:
        """Run a command: a line that begins with a slash."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/reset", "/system"):
            self._turns.clear()
            self._reset_named = False
        if name == "/reset":
            self._note("(forgotten)")
        elif name == "/system":
            self._system = rest or None
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

    def _note_full(self, text: str) -> None:
        """Say that the context is full, and the first time what to do about it."""
        remedy = "" if self._reset_named else "; /reset starts a new conversation"
        self._reset_named = True
        self._note(f"({text}{remedy})")


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Record Ctrl-C; only a second one raises, wherever the program is.

    An exception inside JAX may be lost or leave something half done.
    """
    pressed: list[int] = []

    def record(number: int, _: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, record)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
