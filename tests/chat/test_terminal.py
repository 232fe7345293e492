"""The terminal loop, over a pipe and over something that says it is a terminal."""

import io
import signal
from collections.abc import Callable
from typing import Any, cast

import pytest

from rgexport.chat.conversation import Conversation
from rgexport.chat.sampling import Sampler
from rgexport.chat.template import ChatTemplate
from rgexport.chat.terminal import HELP, PROMPT, chat_loop
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError


class Terminal(io.StringIO):
    """Lines typed at a terminal; None is Ctrl-C."""

    def __init__(self, *typed: str | None) -> None:
        super().__init__()
        self._typed = list(typed)

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        line = self._typed.pop(0) if self._typed else ""
        if line is None:
            raise KeyboardInterrupt
        return line


class Screen(io.StringIO):
    """Output at which Ctrl-C is pressed `times` times when `when` has been written."""

    def __init__(self, when: str, times: int) -> None:
        super().__init__()
        self._when, self._times = when, times

    def write(self, text: str) -> int:
        count = super().write(text)
        if self._times and self.getvalue().endswith(self._when):
            while self._times:
                self._times -= 1
                signal.raise_signal(signal.SIGINT)
        return count


@pytest.fixture
def conversation(
    make_session: Callable[[int], Any], gemma: Tokenizer, template: ChatTemplate
) -> Conversation:
    """A conversation whose first reply spells "hello"."""
    session = make_session(gemma.vocab_size)
    letters = [i for c in "hello" for i in gemma.encode_text(c)]
    session.script = [*letters, 107]
    return Conversation(session, gemma, template, Sampler(), max_new_tokens=4 * len(letters))


def said(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def test_a_pipe_gives_the_replies_alone(conversation: Conversation) -> None:
    output = io.StringIO()
    chat_loop(conversation, io.StringIO("\n  \nhi\nbye"), output)
    assert said(conversation)[:3] == ["hi", "hello", "bye"]
    assert output.getvalue() == f"hello\n{said(conversation)[3]}\n"


def test_a_terminal_has_a_prompt(conversation: Conversation) -> None:
    output = io.StringIO()
    chat_loop(conversation, Terminal("hi\n"), output)
    assert output.getvalue() == f"{PROMPT}hello\n{PROMPT}\n"


def test_commands(conversation: Conversation) -> None:
    output = io.StringIO()
    chat_loop(conversation, io.StringIO("hi\n/reset\n/help\n/quit\nnever\n"), output)
    assert output.getvalue() == f"hello\n{HELP}\n"
    assert conversation.messages == [] and conversation.position == 0


def test_ctrl_c_at_the_prompt_clears_the_line(conversation: Conversation) -> None:
    output = io.StringIO()
    chat_loop(conversation, Terminal(None, "hi\n"), output)
    assert output.getvalue() == f"{PROMPT}\n{HELP}\n{PROMPT}hello\n{PROMPT}\n"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_between_tokens_stops_the_reply_and_keeps_it(
    conversation: Conversation, times: int
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    output = Screen("hel", times)
    chat_loop(conversation, io.StringIO("hi\n"), output)
    assert output.getvalue() == "hel\n"
    assert said(conversation) == ["hi", "hel"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_twice_in_a_step_drops_the_turn(conversation: Conversation) -> None:
    output, session = io.StringIO(), cast(Any, conversation.session)
    session.failure, session.failing_step = KeyboardInterrupt(), 3
    chat_loop(conversation, io.StringIO("hi\n"), output)
    assert output.getvalue() == "hel [dropped]\n"
    assert conversation.messages == [] and conversation.position == 0


def test_input_that_is_not_utf8(conversation: Conversation) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"hi\xff\n"), encoding="utf-8")
    with pytest.raises(RequestError, match="not UTF-8"):
        chat_loop(conversation, lines, io.StringIO())
