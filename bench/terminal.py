"""Runs a command in a pseudo-terminal and gives what a user would see there."""

import fcntl
import os
import pty
import struct
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyte
from pyte.screens import Char
from rich.style import Style
from rich.text import Text

from bench.run import START

ROWS = 200
"""More than any command here prints: nothing scrolls away."""
PROMPT = "> "
COLOURS = {"brown": "yellow", "default": None}
"""pyte's names that are not rich's."""


@dataclass(frozen=True)
class Scene:
    """A command of rgexport, what a user types while it runs, and the last line to show."""

    arguments: tuple[str, ...]
    typed: tuple[str, ...] = ()
    last_line: str = ""


def play(scene: Scene, folder: Path, columns: int) -> Iterator[Text]:
    """The lines of a scene: the command, what it printed, an empty line.

    Raises:
        SystemExit: the command failed.
    """
    yield Text.assemble(("$ ", "bold green"), (" ".join(["rgexport", *scene.arguments]), "bold"))
    screen = pyte.Screen(columns, ROWS)
    run(scene, folder, screen)
    last = max(number for number, line in enumerate(screen.display) if line.strip())
    for number, line in enumerate(screen.display[: last + 1]):
        yield line_of(screen, number)
        if scene.last_line and line.startswith(scene.last_line):
            yield Text("…", "dim")
            break
    yield Text()


def run(scene: Scene, folder: Path, screen: pyte.Screen) -> None:
    """Runs the command on a terminal that `screen` shows; types whenever there is a prompt."""
    typed = list(scene.typed)
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.environ["TERM"] = "xterm-256color"
        os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"  # this terminal does not say where its cursor is
        os.environ["XDG_STATE_HOME"] = str(folder)  # not the user's own history
        os.execv(sys.executable, [sys.executable, "-c", START, *scene.arguments])
    size = struct.pack("HHHH", screen.lines, screen.columns, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    stream = pyte.ByteStream(screen)
    while output := _read(terminal):
        stream.feed(output)
        if typed and screen.display[screen.cursor.y].rstrip() == PROMPT.rstrip():
            os.write(terminal, f"{typed.pop(0)}\n".encode())
    _, status = os.waitpid(process, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"rgexport {' '.join(scene.arguments)} ended with exit code {code}")


def _read(terminal: int) -> bytes:
    """The next output; nothing once the command has ended, which Linux says by an error."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""


def line_of(screen: pyte.Screen, number: int) -> Text:
    """One line of the screen with its colours, without the spaces at its end."""
    cells = (screen.buffer[number][column] for column in range(screen.columns))
    runs = groupby(cells, style_of)
    line = Text.assemble(*(("".join(cell.data for cell in run), style) for style, run in runs))
    line.rstrip()
    return line


def style_of(cell: Char) -> Style:
    """Rich's style of a cell."""
    return Style(
        color=_colour(cell.fg), bgcolor=_colour(cell.bg), bold=cell.bold, reverse=cell.reverse
    )


def _colour(name: str) -> str | None:
    if len(name) == 6 and name not in COLOURS and all(c in "0123456789abcdef" for c in name):
        return f"#{name}"
    return COLOURS.get(name, name.replace("bright", "bright_"))
