"""The conversation: history, commands, several lines, interruption."""

import io
import json

import pytest

from llama_jax.cli.chat import Conversation, read_message
from llama_jax.errors import PromptError


class Echo:
    """Answers with the number of messages, and records the dialogs."""

    def __init__(self):
        self.dialogs = []

    def __call__(self, dialog):
        self.dialogs.append(list(dialog))
        yield "I have "
        if dialog[-1]["content"] == "interrupt":
            raise KeyboardInterrupt
        if dialog[-1]["content"] == "too long":
            raise PromptError("the conversation is too long")
        yield f"{len(dialog)} messages"


@pytest.fixture
def echo():
    return Echo()


def talk(monkeypatch, conversation, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    conversation.loop()


def test_the_history_contains_messages_and_answers(monkeypatch, capsys, echo):
    talk(monkeypatch, Conversation(echo, "Be brief."), "Hello", "And?")
    assert [message["role"] for message in echo.dialogs[1]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert echo.dialogs[1][2]["content"] == "I have 2 messages"
    assert capsys.readouterr().out == "I have 2 messages\nI have 4 messages\n"


def test_a_message_may_have_several_lines(monkeypatch, echo):
    talk(monkeypatch, Conversation(echo), "one\\", "two", '"""', "a", "", "b", '"""')
    contents = [dialog[-1]["content"] for dialog in echo.dialogs]
    assert contents == ["one\ntwo", "a\n\nb"]


def test_reset_and_system_start_a_new_conversation(monkeypatch, echo):
    lines = ("Hello", "/reset", "Again", "/system Rhyme.", "Now", "/system", "Plain")
    talk(monkeypatch, Conversation(echo), *lines)
    assert [len(dialog) for dialog in echo.dialogs] == [1, 1, 2, 1]
    assert echo.dialogs[2][0] == {"role": "system", "content": "Rhyme."}


def test_the_history_keeps_the_text_of_an_interrupted_answer(monkeypatch, echo):
    talk(monkeypatch, Conversation(echo), "interrupt", "Go on")
    assert echo.dialogs[1][1] == {"role": "assistant", "content": "I have "}


def test_a_message_that_cannot_be_sent_is_removed(monkeypatch, capsys, echo):
    talk(monkeypatch, Conversation(echo), "too long", "Hello")
    assert len(echo.dialogs[1]) == 1
    assert "error: the conversation is too long" in capsys.readouterr().err


def test_save_writes_the_whole_dialog(monkeypatch, echo, tmp_path):
    file = tmp_path / "talk.json"
    conversation = Conversation(echo, "Be brief.")
    talk(monkeypatch, conversation, "Grüß dich", f"/save {file}", "/quit", "unread")
    assert json.loads(file.read_text("utf-8")) == conversation.dialog
    assert len(conversation.dialog) == 3
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_reported(monkeypatch, capsys, echo, tmp_path):
    talk(monkeypatch, Conversation(echo), f"/save {tmp_path}/no/such/folder/x.json")
    assert "cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_not_sent_to_the_model(monkeypatch, capsys, echo):
    talk(monkeypatch, Conversation(echo), "/resett", "", "   ")
    assert echo.dialogs == []
    assert "/resett is not a command" in capsys.readouterr().err


def test_input_that_ends_in_a_continued_line_is_still_a_message(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the end\\"))
    assert read_message() == "the end"
