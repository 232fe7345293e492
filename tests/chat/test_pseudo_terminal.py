"""`rgexport chat` in a pseudo-terminal, driven by keys and read from the screen."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.command_line import ROOT, START

pexpect, pyte = pytest.importorskip("pexpect"), pytest.importorskip("pyte")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals"),
]

ROWS, SECONDS = 40, 60
ENDLESS = """
from rgexport.chat.tokenizer import Tokenizer
Tokenizer.stop_ids = property(lambda tokenizer: frozenset())
"""
"""Replies end by Ctrl-C alone."""


class Terminal:
    """A chat on a screen of so many columns."""

    def __init__(self, artifact: Path, columns: int, folder: Path) -> None:
        self.screen = pyte.HistoryScreen(columns, ROWS, history=5000)
        self._stream = pyte.ByteStream(self.screen)
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        environment = inherited | {
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm-256color",
            "XDG_STATE_HOME": str(folder),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        arguments = ["-c", ENDLESS + START, "chat", str(artifact), "-n", "100000", "--threads", "1"]
        self.child = pexpect.spawn(
            sys.executable,
            arguments,
            dimensions=(ROWS, columns),
            env=environment,
            cwd=folder,
            # Whoever runs the tests in the background has Ctrl-C ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def send(self, keys: str) -> None:
        self.child.send(keys.encode())

    def until(self, condition: Callable[[str], bool]) -> str:
        """The text on the screen as soon as it is as wanted."""
        end = time.monotonic() + SECONDS
        while not condition(self.text):
            assert time.monotonic() < end, f"the screen stays so:\n{self.text}"
            try:
                self._stream.feed(self.child.read_nonblocking(65536, 0.2))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                break
        return self.text

    def shows(self, text: str) -> str:
        return self.until(lambda screen: text in screen.replace("\n", " "))

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def resize(self, columns: int) -> None:
        self.child.setwinsize(ROWS, columns)
        self.screen.resize(ROWS, columns)


@pytest.fixture(params=[40, 120])
def terminal(
    request: pytest.FixtureRequest, demo_artifact: Path, tmp_path: Path
) -> Iterator[Terminal]:
    made = Terminal(demo_artifact, request.param, tmp_path)
    made.shows("/help lists the commands.")
    yield made
    made.child.close(force=True)


def at_prompt(screen: str) -> bool:
    return screen.endswith("\n>")


def at_prompt_again(screen: str) -> bool:
    """After Ctrl-C in a reply, however much of it has left the screen."""
    return at_prompt(screen) and screen.split()[-2:] == ["[stopped]", ">"]


def test_a_session(terminal: Terminal, tmp_path: Path) -> None:
    """Ctrl-C in a reply, /undo, /save and /load, /stats, an error, and Ctrl-D."""
    for text in ("Hello! How are you?", "And the sea?"):
        terminal.until(at_prompt)
        terminal.send(f"{text}\r")
        asked = terminal.shows(text)
        terminal.until(lambda screen, asked=asked: len(screen) > len(asked) + 20)
        terminal.send("\x03")
        terminal.until(at_prompt_again)
    terminal.send("/save a.state\r")
    terminal.shows("a.state has ")
    terminal.send("/undo\r")
    terminal.shows("reply are gone.")
    terminal.send("/load a.state\r")
    terminal.shows("tokens are known, 4 messages.")
    terminal.send("/stats\r")
    terminal.shows("last reply: ")
    terminal.send("/nonsense\r")
    terminal.shows("there is no command /nonsense;")
    terminal.until(at_prompt)
    terminal.send("\x03")
    terminal.shows("Ctrl-D or /quit ends the chat.")
    terminal.until(at_prompt)
    terminal.send("\x04")
    terminal.child.expect(pexpect.EOF, timeout=SECONDS)
    terminal.child.close()
    assert terminal.child.exitstatus == 0
    assert (tmp_path / "a.state").is_file()


def test_a_paste_is_one_message(terminal: Terminal) -> None:
    """Fifty lines, then emoji, and a width that changes meanwhile; the history has all of it."""
    lines = [f"line {i}" for i in range(50)]
    terminal.until(at_prompt)
    terminal.send("\x1b[200~" + "\n".join(lines) + "\x1b[201~")
    terminal.shows("line 49")
    terminal.send("\r")
    terminal.until(lambda screen: not screen.endswith("line 49"))
    terminal.send("\x03")
    terminal.until(at_prompt_again)
    terminal.resize(60)
    terminal.send("🐢 é 漢字\x1b\rand more")
    terminal.until(lambda screen: screen.endswith("and more"))
    terminal.send("\r")
    terminal.until(lambda screen: not screen.endswith("and more"))
    terminal.send("\x03")
    terminal.until(lambda screen: at_prompt(screen))
    terminal.send("/save a.state\r")
    terminal.shows("a.state has ")
    terminal.send("\x1b[A\x1b[A")  # up, twice: the message before the command
    terminal.shows("🐢")
    terminal.send("\x03/quit\r")
    terminal.child.expect(pexpect.EOF, timeout=SECONDS)


def test_tab_completes_a_command(terminal: Terminal) -> None:
    terminal.until(at_prompt)
    terminal.send("/he\t")
    terminal.shows("> /help")
    terminal.send("\r")
    terminal.shows("/system TEXT")
