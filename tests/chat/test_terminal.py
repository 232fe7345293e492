"""The chat over a pipe, and its commands."""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from rgexport.chat.commands import COMMANDS
from rgexport.chat.conversation import Conversation
from rgexport.chat.model import Model
from rgexport.chat.reply import ReplyOptions
from rgexport.chat.terminal import one_message, pipe_chat, terminal_chat
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from tests.toy_session import ToySession


@pytest.fixture
def conversation(make_model: Callable[..., Model], gemma: Tokenizer) -> Conversation:
    """A conversation whose first reply spells "hello"."""
    session = ToySession(gemma.vocab_size)
    letters = [i for c in "hello" for i in gemma.encode_text(c)]
    session.script = [*letters, 107]
    return Conversation(make_model(gemma, session), ReplyOptions(max_new_tokens=4 * len(letters)))


def said(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def chat(conversation: Conversation, *lines: str) -> list[str]:
    output = io.StringIO()
    with contextlib.redirect_stderr(output):  # what commands say
        pipe_chat(conversation, io.StringIO("\n".join(lines)), output)
    return output.getvalue().splitlines()


def test_a_pipe_gives_the_replies_alone(conversation: Conversation) -> None:
    output = io.StringIO()
    pipe_chat(conversation, io.StringIO("\n  \nhi\n/set top_k 0\nbye"), output)
    assert said(conversation)[:3] == ["hi", "hello", "bye"]
    assert output.getvalue() == f"hello\n{said(conversation)[3]}\n"


def test_help_lists_all_commands(conversation: Conversation) -> None:
    lines = chat(conversation, "/help")
    assert [line.split()[0][1:] for line in lines] == [*COMMANDS]


def test_commands(conversation: Conversation, tmp_path: Path) -> None:
    document, file = tmp_path / "book.txt", tmp_path / "a.state"
    document.write_text("the model said it")
    lines = chat(
        conversation,
        "hi",
        "/system Be brief.",
        f"/save {file}",
        "/undo",
        f"/load {file}",
        "/set temperature 0.7",
        "/set max-new-tokens 3",
        "/clear",
        f"/read {document}",
        f"/save {file}",
        "/quit",
        "never",
    )
    assert lines[:2] == ["hello", "The system prompt is set."]
    assert lines[2].startswith(f"{file} has ") and lines[4].endswith(
        "tokens are known, 3 messages."
    )
    assert lines[5:7] == ["temperature is 0.7.", "max_new_tokens is 3."]
    assert lines[8].startswith("book.txt is read, the conversation has ")
    assert len(lines) == 10 and conversation.system == "Be brief."
    assert conversation.options.sampling.temperature == 0.7
    assert conversation.options.max_new_tokens == 3


def test_retry_and_edit_answer_again(conversation: Conversation) -> None:
    lines = chat(conversation, "hi", "/retry", "/edit there")
    assert lines[0] == "hello" and said(conversation) == ["there", lines[2]]


def test_stats(conversation: Conversation) -> None:
    text = "\n".join(chat(conversation, "/stats", "hi", "/stats"))
    assert text.count("toy in toy 1") == 2 and text.count("last reply: ") == 1


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
        ("/save", "/save needs FILE"),
    ],
)
def test_what_cannot_be_done_is_one_line(line, message, conversation):
    with pytest.raises(RequestError, match=message):
        chat(conversation, line)


def test_one_message(conversation: Conversation) -> None:
    output = io.StringIO()
    one_message(conversation, "hi", output)
    assert output.getvalue() == "hello\n"
    output = io.StringIO()
    one_message(conversation, "again", output, as_json=True)
    found = json.loads(output.getvalue())
    assert found["text"] == said(conversation)[-1]
    assert {"reason", "prompt_tokens", "cached_tokens", "ids", "read_seconds"} <= found.keys()


def test_a_terminal_without_prompt_toolkit(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hi", "/nothing", "/quit"])
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    screen = Console(file=io.StringIO(), width=200)
    terminal_chat(conversation, screen)
    assert said(conversation) == ["hi", "hello"] and not list(lines)
    text = screen.file.getvalue()
    assert "pip install 'rgexport[chat]'" in text and "Alt-Enter" not in text
    assert "hello" in text and "there is no command /nothing" in text


def test_input_that_is_not_utf8(conversation: Conversation) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"hi\xff\n"), encoding="utf-8")
    with pytest.raises(RequestError, match="not UTF-8"):
        pipe_chat(conversation, lines, io.StringIO())
