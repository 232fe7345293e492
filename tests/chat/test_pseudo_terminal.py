"""`rgexport chat` in a pseudo-terminal, driven by keys and read from the screen.

Replies are of a fixed length and then wait, so that nothing depends on how fast this machine is.
"""

import os
import signal
import sys
import termios
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

ROWS, SECONDS = 40, 120
PAUSED = """
import time
from rgexport.chat.sampling import Sampler
from rgexport.chat.tokenizer import Tokenizer

def choose(sampler, *arguments, choose=Sampler.__call__):
    sampler.count = getattr(sampler, "count", 0) + 1
    time.sleep(1 if sampler.count > 20 else 0)
    return choose(sampler, *arguments)

Sampler.__call__ = choose
Tokenizer.stop_ids = property(lambda tokenizer: frozenset())
"""
"""Replies end by Ctrl-C alone, and after 20 tokens a token takes a second."""


class Terminal:
    """A chat on a screen of so many columns."""

    def __init__(self, artifact: Path, columns: int, folder: Path) -> None:
        self.screen = pyte.Screen(columns, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        environment = inherited | {
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm-256color",
            "XDG_STATE_HOME": str(folder),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        arguments = ["-c", PAUSED + START, "chat", str(artifact), "-n", "100000", "--threads", "1"]
        self.child = pexpect.spawn(
            sys.executable,
            arguments,
            dimensions=(ROWS, columns),
            env=environment,
            cwd=folder,
            # Whoever runs the tests in the background has Ctrl-C ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def until(self, condition: Callable[[str], bool]) -> None:
        """Waits until the text on the screen is as wanted."""
        end = time.monotonic() + SECONDS
        while not condition(self.text):
            assert time.monotonic() < end, f"the screen stays so:\n{self.text}"
            try:
                self._stream.feed(self.child.read_nonblocking(65536, 0.2))
            except pexpect.TIMEOUT:
                continue

    def shows(self, text: str) -> None:
        self.until(lambda screen: text in screen.replace("\n", " "))

    def at_prompt(self, screen: str) -> bool:
        """Whether the line editor waits for keys, which the terminal then leaves to it."""
        return screen.endswith("\n>") and not self._makes_signals()

    def enter(self, line: str, shown: str) -> None:
        """Types a line at the prompt, and waits for what is shown then."""
        self.until(self.at_prompt)
        self.child.send(f"{line}\r".encode())
        self.shows(shown)

    def ask(self, keys: str, last_line: str) -> None:
        """Types a message whose reply is ended by Ctrl-C after some characters of it."""
        self.until(self.at_prompt)
        self.child.send(keys.encode())
        self.until(lambda screen: screen.endswith(last_line))
        self.child.send(b"\r")
        self.until(
            lambda screen: len(screen.rpartition(last_line)[2]) > 9 and self._makes_signals()
        )
        self.child.sendintr()
        self.until(lambda screen: self.at_prompt(screen) and screen.split()[-2:-1] == ["[stopped]"])

    def ends(self) -> bool:
        self.child.expect(pexpect.EOF, timeout=SECONDS)
        self.child.close()
        return self.child.exitstatus == 0

    def _makes_signals(self) -> bool:
        return bool(termios.tcgetattr(self.child.child_fd)[3] & termios.ISIG)


@pytest.fixture(params=[40, 120])
def terminal(
    request: pytest.FixtureRequest, demo_artifact: Path, tmp_path: Path
) -> Iterator[Terminal]:
    terminal = Terminal(demo_artifact, request.param, tmp_path)
    terminal.shows("/help lists the commands.")
    yield terminal
    terminal.child.close(force=True)


def test_a_session(terminal: Terminal, tmp_path: Path) -> None:
    """Ctrl-C in a reply, /undo, /save and /load, /stats, an error, a completion, and Ctrl-D."""
    for text in ("Hello! How are you?", "And the sea?"):
        terminal.ask(text, text)
    terminal.enter("/save a.state", "a.state has ")
    terminal.enter("/undo", "reply are gone.")
    terminal.enter("/load a.state", "tokens are known, 4 messages.")
    terminal.enter("/stats", "last reply: ")
    terminal.enter("/nonsense", "there is no command /nonsense;")
    terminal.until(terminal.at_prompt)
    terminal.child.send(b"/he\t")
    terminal.shows("> /help")
    terminal.child.send(b"\r")
    terminal.shows("/system TEXT")
    terminal.until(terminal.at_prompt)
    terminal.child.send(b"\x03")
    terminal.shows("Ctrl-D or /quit ends the chat.")
    terminal.until(terminal.at_prompt)
    terminal.child.send(b"\x04")
    assert terminal.ends() and (tmp_path / "a.state").is_file()


def test_a_paste_is_one_message(terminal: Terminal) -> None:
    """Fifty lines, then emoji, and a width that changes meanwhile; the history has all of it."""
    lines = "\n".join(f"line {i}" for i in range(50))
    terminal.ask(f"\x1b[200~{lines}\x1b[201~", "line 49")
    terminal.child.setwinsize(ROWS, 60)
    terminal.screen.resize(ROWS, 60)
    terminal.ask("🐢 é 漢字\x1b\rand more", "and more")
    terminal.enter("/save a.state", "a.state has ")
    terminal.until(terminal.at_prompt)
    terminal.child.send(b"\x1b[A\x1b[A")  # up, twice: the message before the command
    terminal.shows("> 🐢")
    terminal.child.send(b"\x03")
    terminal.child.send(b"/quit\r")
    assert terminal.ends()
