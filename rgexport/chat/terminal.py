"""Chats in a terminal, and over a pipe."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rgexport.chat.commands import COMMANDS, Quit, Replies, run_command
from rgexport.chat.conversation import Conversation
from rgexport.errors import RequestError, printable
from rgexport.printing import print_reply, printable_reply
from rgexport.progress import note

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from rich.console import Console

PROMPT = "> "
GREETING = "Ctrl-C ends a reply and keeps it, Ctrl-D ends the chat. /help lists the commands."
EDITOR = "Enter sends, Alt-Enter begins a new line."
NO_EDITOR = (
    "Each line is a message. Messages of several lines, their history and completion: "
    "pip install 'rgexport[chat]'."
)


def pipe_chat(conversation: Conversation, lines: TextIO, output: TextIO) -> None:
    """Reads one message a line until the end of `lines`, and streams each reply to `output`.

    Replies end with a newline; the output of commands goes to stderr. Blank lines are skipped.
    """
    with contextlib.suppress(Quit):
        for line in _messages(lines):
            answer = _answer(conversation, line)
            if isinstance(answer, str):
                note(answer)
                continue
            for piece in answer:
                print_reply(piece, output)
            print_reply("\n", output)


def one_message(
    conversation: Conversation, text: str, output: TextIO, *, as_json: bool = False
) -> None:
    """Sends one message; streams the reply, or writes it as JSON at its end."""
    for piece in conversation.send(text):
        print_reply("" if as_json else piece, output)
    if as_json:
        assert conversation.last
        fields = json.dumps(dataclasses.asdict(conversation.last), ensure_ascii=False)
        print_reply(fields, output)
    print_reply("\n", output)


def terminal_chat(conversation: Conversation, console: "Console | None" = None) -> None:
    """Chats at a terminal: a line editor, and streamed replies in Markdown."""
    from rich.console import Console

    console = console or Console(highlight=False)
    read_message, usage = _editor()
    console.print(f"{usage} {GREETING}", style="dim", markup=False)
    with contextlib.suppress(Quit, EOFError):
        while True:
            try:
                line = read_message(PROMPT)
                if line.strip():
                    _show(conversation, line, console)
            except KeyboardInterrupt:
                console.print("Ctrl-D or /quit ends the chat.", style="dim")
            except RequestError as error:
                console.print(printable(str(error)), style="red", markup=False)


def _answer(conversation: Conversation, line: str) -> str | Replies:
    """Returns the line of a command or the pieces of a reply; `//` escapes a slash."""
    if line.startswith("/") and not line.startswith("//"):
        return run_command(conversation, line.strip())
    return conversation.send(line[1:] if line.startswith("//") else line)


def _show(conversation: Conversation, line: str, console: "Console") -> None:
    from rgexport.chat.markdown_stream import MarkdownStream

    answer = _answer(conversation, line)
    if isinstance(answer, str):
        console.print(printable_reply(answer), style="dim", markup=False)
        return
    with MarkdownStream(console) as stream, contextlib.closing(answer) as reply:
        try:
            for piece in reply:
                stream.add(printable_reply(piece))
        except KeyboardInterrupt:
            stream.add(" [stopped]")
    if conversation.last and conversation.last.reason == "length":
        console.print("(cut; /set max_new_tokens NUMBER allows more)", style="dim")


def _editor() -> tuple[Callable[[str], str], str]:
    try:
        return _prompt_session().prompt, EDITOR
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prompt_toolkit":
            raise
        return input, NO_EDITOR


def _prompt_session() -> "PromptSession[str]":
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        multiline=True,
        key_bindings=keys,
        completer=WordCompleter([f"/{name}" for name in COMMANDS], sentence=True),
        complete_while_typing=False,
        prompt_continuation=". ",
        history=_history(),
    )


def _history() -> Any:
    """Returns the history, in a private file, or in memory if the file cannot be made."""
    import platformdirs
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = Path(platformdirs.user_state_dir("rgexport")) / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _messages(lines: TextIO) -> Iterator[str]:
    try:
        for line in lines:
            if text := line.strip():
                yield text if text.startswith("/") else line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"the input is not UTF-8 text: {error}") from None
