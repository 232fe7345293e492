"""The plain terminal chat."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from rgexport.chat.conversation import Conversation
from rgexport.errors import RequestError

PROMPT = "> "
HELP = "Ctrl-C stops a reply, Ctrl-D or /quit ends, /reset starts a new conversation."


def chat_loop(conversation: Conversation, lines: TextIO, output: TextIO) -> None:
    """Reads one message a line until the end of `lines`, and streams each reply to `output`.

    A terminal shows a prompt, and Ctrl-C stops the reply after its next token; a second Ctrl-C
    stops at once, and drops the turn if the engine was computing. With a pipe, only the replies are
    written, each ended by a newline. Blank lines are skipped.

    Raises:
        RequestError: a message that cannot be rendered, or input that is not UTF-8.
    """
    interactive = lines.isatty()
    while (line := _read_line(lines, output, interactive)) is not None:
        match line.strip():
            case "/quit" | "/exit":
                return
            case "/reset":
                conversation.reset()
            case "/help":
                output.write(f"{HELP}\n")
            case "":
                pass
            case _:
                _answer(conversation, line, output)


def _answer(conversation: Conversation, message: str, output: TextIO) -> None:
    said = len(conversation.messages)
    try:
        with _interruption() as stopped, contextlib.closing(conversation.send(message)) as reply:
            for piece in reply:
                output.write(piece)
                output.flush()
                if stopped():
                    break
    except KeyboardInterrupt:
        output.write("" if len(conversation.messages) > said else " [dropped]")
    output.write("\n")
    output.flush()


@contextlib.contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; the first one raises nothing.

    A second Ctrl-C raises KeyboardInterrupt as usual. Only the main thread can handle signals.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _read_line(lines: TextIO, output: TextIO, interactive: bool) -> str | None:
    """The next line without its end, None after the last; Ctrl-C at the prompt clears the line."""
    while True:
        try:
            return _prompted_line(lines, output) if interactive else _plain_line(lines)
        except KeyboardInterrupt:
            if not interactive:
                raise
            output.write(f"\n{HELP}\n")
        except EOFError:
            output.write("\n" if interactive else "")
            return None
        except UnicodeDecodeError as error:
            raise RequestError(f"the input is not UTF-8 text: {error}") from None


def _prompted_line(lines: TextIO, output: TextIO) -> str:
    if lines is sys.stdin and output is sys.stdout:
        with contextlib.suppress(ImportError):  # no line editing on Windows
            import readline  # noqa: F401
        return input(PROMPT)
    output.write(PROMPT)
    output.flush()
    return _plain_line(lines)


def _plain_line(lines: TextIO) -> str:
    line = lines.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
