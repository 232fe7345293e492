"""The chat over a pipe, and its commands."""

import contextlib
import io
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from rgexport.chat.conversation import Conversation
from rgexport.chat.reply import ReplyOptions
from rgexport.chat.styled_reply import StyledReply
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
    return [line for line in output.getvalue().splitlines() if "reply is cut" not in line]


def test_a_pipe_gives_the_replies_alone(conversation):
    output = io.StringIO()
    lines = io.StringIO("\n  \nhi\n/set temperature 0.5\n/retry\n/edit there")
    pipe_chat(conversation, lines, output)
    message, last_reply = said(conversation)
    assert message == "there"
    assert output.getvalue().startswith("hello\n")
    assert output.getvalue().endswith(f"\n{last_reply}\n")


def test_commands(conversation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("the model said it\n" * 99)
    asked = "/stats|hi|/stats|/system Be brief.|/save a.state|/undo|/load a.state|/set top_p 0.5"
    asked += "|/set max-new-tokens 3|/clear|/read book.txt|/save a.state|/load a.state|/quit|never"
    lines = iter(chat(conversation, *asked.split("|")))
    for said_by_command in (
        *("toy in toy 1", "hello", "toy in toy 1", "last reply: ", "The system prompt: Be brief."),
        *("a.state has ", "tokens are known, 3 messages.", "top_p is 0.5.", "max_new_tokens is 3."),
        *("book.txt is read, the conversation has ", "a.state has ", "> the model said it "),
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
        ("/system Be brief.\n/save a.state", "the conversation is empty"),
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


PIECES = [
    *("# ", "## A heading", "**", "**bold** ", "*", "2*3*4", "<tag>", "`", "`code`", "```"),
    *("```python\n", "\n", "\n\n", "- ", "1. ", "| a | b |", "[link](https://a.example)"),
    *("word ", "  ", "\t", *"漢字 é 🐢 [red] [/] &amp; a_b_c ---".split(), "> ", "\\*"),
    "averyveryveryveryveryveryveryveryveryverylongword ",
]
MARKDOWN = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


def on_screen(text, width, *, styled=True, step=3, **attributes):
    console = Console(file=io.StringIO(), width=width, highlight=False, **attributes)
    reply = StyledReply(console, styled=styled)
    for start in range(0, len(text), step):
        reply.add(text[start : start + step])
    reply.close()
    return console.file.getvalue()


@settings(max_examples=200)
@given(text=MARKDOWN, step=st.integers(1, 9))
def test_a_terminal_shows_what_the_model_wrote(text, step):
    """Styles change no character; a line breaks at white space or wide characters alone."""
    lines = [line.rstrip() for line in text.split("\n")]
    plain = Text.from_ansi(on_screen(text, 10_000, step=step, force_terminal=True)).plain
    for shown in (plain, on_screen(text, 10_000, step=step)):
        kept = [line.rstrip() for line in shown.split("\n")]
        assert "\n".join(kept).rstrip("\n") == "\n".join(lines).rstrip("\n")
    for width in (40, 80, 120):
        narrow = on_screen(text, width, step=step)
        assert "".join(narrow.split()) == "".join(text.split())
        assert {*narrow.split()} <= {*text.split()} or any(ord(c) > 0x1100 for c in text)
        asked, got = ("\n\n" in re.sub(r"[^\S\n]", "", lines) for lines in (text, narrow))
        assert asked or not got
    assert on_screen(text, 40, styled=False, step=step).rstrip("\n") == text.rstrip("\n")


def test_styles_and_lines():
    text = "# Title here\na **bold text** and `some code` 2*3*4\n```\nx = [1]\n```\nend"
    shown = on_screen(text, 80, force_terminal=True, color_system="standard")
    assert "\x1b[1mTitle\x1b[0m" in shown and "\x1b[1mtext\x1b[0m" in shown
    assert "\x1b[36mcode\x1b[0m" in shown and " 2*3*4\n" in shown
    assert "\x1b[36mx\x1b[0m" in shown and shown.endswith("end\n")
    assert on_screen("alpha beta gamma", 11) == "alpha beta\ngamma\n"
    assert on_screen("alpha beta  gamma", 10) == "alpha beta\ngamma\n", "no blank line"
    assert on_screen("a\n\tcc a.c\nab\tc", 80) == "a\n\tcc a.c\nab\tc\n"
    inline = on_screen("```python``` is code\nand more", 80, force_terminal=True)
    assert inline.endswith("and more\n")
    assert on_screen("=" * 100_000, 80).strip() == "=" * 100_000


def test_commands_say_what_they_do(conversation):
    lines = "hi", "/retry", "/raw", "/raw", "/set top_k", "/system none", "/system", "/set"
    said_by = chat(conversation, *lines)
    assert "At temperature 0 the reply is the same" in said_by[1]
    lines = "/set temperature 1", "/retry", "/set temperature 0", "/retry", "/set top_p 1", "/retry"
    assert sum("the reply is the same" in line for line in chat(conversation, *lines)) == 1
    assert said_by[3:5] == ["Replies are shown as they are.", "Markdown has styles."]
    assert said_by[5:8] == ["top_k 0", *["No system prompt."] * 2] and "seed random" in said_by
