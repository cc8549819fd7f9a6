"""The conversation: history, commands, several lines, limits, interruption."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest

from llama_jax.cli.chat import Conversation
from llama_jax.errors import PromptError
from llama_jax.generation.generate import Delta
from llama_jax.generation.request import Request


class Echo:
    """Answers with the number of messages, and records the dialogs.

    A word is a token.
    """

    def __init__(self):
        self.dialogs = []

    def ask(self, dialog):
        self.dialogs.append(list(dialog))
        if dialog[-1]["content"] == "unsafe":
            raise PromptError("the message has special tags")
        words = " ".join(message["content"] for message in dialog).split()
        return Request([1] * len(words), max_new_tokens=4)

    def answer(self, request):
        dialog = self.dialogs[-1]
        yield Delta(0, "I have ", (1, 2), None, None, None)
        if dialog[-1]["content"] == "interrupt":
            signal.raise_signal(signal.SIGINT)
        if dialog[-1]["content"] == "interrupt twice":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second Ctrl-C was ignored")
        reason = "length" if "long" in dialog[-1]["content"] else "stop"
        yield Delta(0, f"{len(dialog)} ", (3,), None, None, None)
        yield Delta(0, "messages", (4,), None, None, reason)

    def converse(self, *, context=1000, system=None):
        return Conversation(self.ask, self.answer, context, system)


@pytest.fixture
def echo():
    return Echo()


def talk(monkeypatch, conversation, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    conversation.loop()


def test_the_history_contains_messages_and_answers(monkeypatch, capsys, echo):
    talk(monkeypatch, echo.converse(system="Be brief."), "Hello", "And?")
    assert [message["role"] for message in echo.dialogs[1]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert echo.dialogs[1][2]["content"] == "I have 2 messages"
    assert capsys.readouterr().out == "I have 2 messages\nI have 4 messages\n"


def test_a_message_may_have_several_lines(monkeypatch, echo):
    talk(monkeypatch, echo.converse(), "one\\", "two", '"""', "a", "", "b", '"""')
    contents = [dialog[-1]["content"] for dialog in echo.dialogs]
    assert contents == ["one\ntwo", "a\n\nb"]


def test_reset_and_system_start_a_new_conversation(monkeypatch, echo):
    lines = ("Hello", "/reset", "Again", "/system Rhyme.", "Now", "/system", "Plain")
    talk(monkeypatch, echo.converse(), *lines)
    assert [len(dialog) for dialog in echo.dialogs] == [1, 1, 2, 1]
    assert echo.dialogs[2][0] == {"role": "system", "content": "Rhyme."}


@pytest.mark.parametrize("message", ["interrupt", "interrupt twice"])
def test_ctrl_c_stops_an_answer_and_the_history_keeps_its_text(
    monkeypatch, capsys, echo, message
):
    handler = signal.getsignal(signal.SIGINT)
    talk(monkeypatch, echo.converse(), message, "Go on")
    answer = {"role": "assistant", "content": echo.dialogs[1][1]["content"]}
    assert echo.dialogs[1][1] == answer
    assert answer["content"] in ("I have ", "I have 1 ")
    assert capsys.readouterr().err == "(stopped)\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_message_that_cannot_be_sent_is_removed(monkeypatch, capsys, echo):
    talk(monkeypatch, echo.converse(), "unsafe", "Hello")
    assert len(echo.dialogs[1]) == 1
    assert "error: the message has special tags" in capsys.readouterr().err


def test_an_answer_that_is_cut_says_so(monkeypatch, capsys, echo):
    talk(monkeypatch, echo.converse(), "short", "long", "long")
    cut = "(the answer is cut at --max-new-tokens 4)\n"
    assert capsys.readouterr().err == 2 * cut


RESET = "; /reset starts a new conversation)"


def test_a_full_context_names_reset_once(monkeypatch, capsys, echo):
    lines = ("long", "Go on and on", "And?", "/reset", "Hello", "too long " * 9, "And?")
    talk(monkeypatch, echo.converse(context=5), *lines)
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "(the answer is cut: the context of 5 tokens is full" + RESET,
        "(not sent: the conversation has 9 tokens, but the context holds 5)",
        "(not sent: the conversation has 6 tokens, but the context holds 5)",
        "(forgotten)",
        "(not sent: the conversation has 23 tokens, but the context holds 5" + RESET,
        "(not sent: the conversation has 6 tokens, but the context holds 5)",
    ]
    assert out == 2 * "I have 1 messages\n"


def test_save_writes_the_whole_dialog(monkeypatch, echo, tmp_path):
    file = tmp_path / "talk.json"
    conversation = echo.converse(system="Be brief.")
    talk(monkeypatch, conversation, "Grüß dich", f"/save {file}", "/quit", "unread")
    assert json.loads(file.read_text("utf-8")) == conversation.dialog
    assert len(conversation.dialog) == 3
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_reported(monkeypatch, capsys, echo, tmp_path):
    talk(monkeypatch, echo.converse(), f"/save {tmp_path}/no/such/folder/x.json")
    assert "cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_not_sent_to_the_model(monkeypatch, capsys, echo):
    talk(monkeypatch, echo.converse(), "/resett", "", "   ")
    assert echo.dialogs == []
    assert "/resett is not a command" in capsys.readouterr().err


def test_a_text_of_several_lines_may_begin_with_a_slash(monkeypatch, echo):
    lines = ("/* a comment */\\", "return x", "/system Be\\", "brief.", "Hello")
    talk(monkeypatch, echo.converse(), *lines)
    first, second = echo.dialogs
    assert first[0]["content"] == "/* a comment */\nreturn x"
    assert second[0] == {"role": "system", "content": "Be\nbrief."}


def test_input_that_ends_in_a_continued_line_is_still_a_message(monkeypatch, echo):
    monkeypatch.setattr("sys.stdin", io.StringIO("the end\\"))
    echo.converse().loop()
    assert echo.dialogs[0][0]["content"] == "the end"


READ_TWO_MESSAGES = """
import sys
if "plain" in sys.argv:
    sys.modules["readline"] = None
from llama_jax.cli.terminal_input import MessageReader
reader = MessageReader()
for _ in range(2):
    print("read", repr(reader.read()), flush=True)
"""
PASTE = b"def f():\r\r  return 1\r"


@pytest.mark.parametrize(
    ("editing", "paste"),
    [
        ("readline", b"\x1b[200~" + PASTE + b"\x1b[201~\r"),
        ("plain", PASTE),
    ],
)
def test_a_paste_of_several_lines_is_one_message(editing, paste):
    readline = pytest.importorskip("readline")
    if editing == "readline" and "libedit" in readline.__doc__:
        pytest.skip("libedit has no bracketed paste")
    terminal, theirs = pty.openpty()

    with subprocess.Popen(
        [sys.executable, "-c", READ_TWO_MESSAGES, editing],
        stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, env=os.environ | {"TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        for sent in (paste, b"a question\r"):
            prompts = shown.count(b"> ")
            while shown.count(b"> ") == prompts:
                shown += os.read(terminal, 4096)
            os.write(terminal, sent)
        assert process.wait(30) == 0
    shown += os.read(terminal, 4096)
    os.close(terminal)
    read = re.findall(rb"read '(.*?)'", shown)
    assert read == [rb"def f():\n\n  return 1", b"a question"]
