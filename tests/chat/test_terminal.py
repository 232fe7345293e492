"""The chat over a pipe, and its commands."""

import contextlib
import io
import sys

import pytest
from rich.console import Console

from rgexport.chat.conversation import Conversation
from rgexport.chat.reply import ReplyOptions
from rgexport.chat.terminal import COMMANDS, pipe_chat, terminal_chat
from rgexport.errors import RequestError
from tests.toy_session import ToySession


@pytest.fixture
def conversation(make_model, gemma):
    """A conversation whose first reply spells "hello"."""
    session = ToySession(gemma.vocab_size)
    letters = [i for c in "hello" for i in gemma.encode_text(c)]
    session.script = [*letters, 107]
    return Conversation(make_model(gemma, session), ReplyOptions(max_new_tokens=4 * len(letters)))


def said(conversation):
    return [message["content"] for message in conversation.messages]


def chat(conversation, *lines):
    output = io.StringIO()
    with contextlib.redirect_stderr(output):  # what commands say
        pipe_chat(conversation, io.StringIO("\n".join(lines)), output)
    return output.getvalue().splitlines()


def test_a_pipe_gives_the_replies_alone(conversation):
    output = io.StringIO()
    pipe_chat(conversation, io.StringIO("\n  \nhi\n/set top_k 0\n/retry\n/edit there"), output)
    *_, second, third = output.getvalue().splitlines()
    assert said(conversation) == ["there", third]
    assert output.getvalue() == f"hello\n{second}\n{third}\n"


def test_commands(conversation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("the model said it")
    asked = "/stats|hi|/stats|/system Be brief.|/save a.state|/undo|/load a.state|/set top_p 0.5"
    asked += "|/set max-new-tokens 3|/clear|/read book.txt|/save a.state|/quit|never"
    lines = iter(chat(conversation, *asked.split("|")))
    for said_by_command in (
        *("toy in toy 1", "hello", "toy in toy 1", "last reply: ", "The system prompt is set."),
        *("a.state has ", "tokens are known, 3 messages.", "top_p is 0.5.", "max_new_tokens is 3."),
        *("book.txt is read, the conversation has ", "a.state has "),
    ):
        assert any(said_by_command in line for line in lines), "in this order"
    assert not [*lines] and conversation.system == "Be brief."
    assert conversation.options.sampling.top_p == 0.5 and conversation.options.max_new_tokens == 3
    assert [line.split()[0][1:] for line in chat(conversation, "/help")] == [*COMMANDS]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "there is no command /nothing; /help lists them"),
        ("/read", "/read needs FILE"),
        ("/read none.txt", "cannot read none.txt: No such file"),
        ("/load none.state", "none.state"),
        ("/undo", "there is no message yet"),
        ("/set colour red", "there is no setting 'colour'; expected one of temperature"),
        ("/set top_k many", "top_k is 'many'; expected a number"),
        ("/set top_p 3", "top_p is 3.0; expected"),
        ("/save a.state", "the conversation is empty"),
    ],
)
def test_what_cannot_be_done_is_one_line(line, message, conversation):
    with pytest.raises(RequestError, match=message):
        chat(conversation, line)
    lines = io.TextIOWrapper(io.BytesIO(b"hi\xff\n"), encoding="utf-8")
    with pytest.raises(RequestError, match="not UTF-8"):
        pipe_chat(conversation, lines, io.StringIO())


def test_a_terminal_without_prompt_toolkit(conversation, monkeypatch):
    lines = iter(["hi", "/nothing", "/quit"])
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    screen = Console(file=io.StringIO(), width=200)
    terminal_chat(conversation, screen)
    assert said(conversation) == ["hi", "hello"] and not list(lines)
    text = screen.file.getvalue()
    assert "pip install 'rgexport[chat]'" in text and "Alt-Enter" not in text
    assert "hello" in text and "there is no command /nothing" in text
