"""`rgexport chat` in a pseudo-terminal, driven by keys and read from the screen.

Replies are of a fixed length and then wait, so that nothing depends on how fast this machine is.
"""

import io
import os
import signal
import sys
import termios
import time
from functools import partial

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
from rgexport.chat import reading
from rgexport.chat.sampling import Sampler
from rgexport.chat.tokenizer import Tokenizer

def choose(sampler, *arguments, choose=Sampler.__call__):
    sampler.count = getattr(sampler, "count", 0) + 1
    time.sleep(1 if sampler.count > 20 else 0)
    return choose(sampler, *arguments)

Sampler.__call__ = choose
Tokenizer.stop_ids = property(lambda tokenizer: frozenset())
reading._SILENT_SECONDS = 1000
"""
"""Replies end by Ctrl-C alone, after 20 tokens a token takes a second, no prompt shows a bar."""


class Terminal:
    """A chat on a screen of so many columns."""

    def __init__(self, artifact, columns, folder, **settings):
        self.screen = pyte.Screen(columns, ROWS)
        self._stream = pyte.ByteStream(self.screen)
        inherited = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        environment = {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder)}
        environment |= {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | settings
        self.child = pexpect.spawn(
            sys.executable,
            ["-c", PAUSED + START, "chat", str(artifact), "-n", "100000", "--threads", "1"],
            dimensions=(ROWS, columns),
            env=inherited | environment,
            cwd=folder,
            # Whoever runs the tests in the background has Ctrl-C ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def until(self, condition):
        """Waits until the text on the screen is as wanted."""
        end = time.monotonic() + SECONDS
        while not condition(text := "\n".join(map(str.rstrip, self.screen.display)).rstrip()):
            assert time.monotonic() < end, f"the screen stays so:\n{text}"
            try:
                self._stream.feed(self.child.read_nonblocking(65536, 0.2))
            except pexpect.TIMEOUT:
                continue

    def at_prompt(self, screen):
        """Whether the line editor waits for keys, which the terminal then leaves to it."""
        return screen.endswith("\n>") and not self._makes_signals()

    def press(self, keys, shown):
        """Types at the prompt, and waits for what is shown then."""
        self.until(self.at_prompt)
        self.child.send(keys.encode())
        self.until(lambda screen: shown in screen.replace("\n", " "))

    def ask(self, keys, last_line):
        """Types a message whose reply is ended by Ctrl-C after some characters of it."""
        self.until(self.at_prompt)
        self.child.send(keys.encode())
        self.until(lambda screen: screen.endswith(last_line))
        self.child.send(b"\r")

        def replies(screen):  # while the editor draws the message anew, its last line is missing
            _, message_end, reply = screen.rpartition(last_line)
            return message_end and len(reply) > 9 and self._makes_signals()

        self.until(replies)
        self.child.sendintr()
        self.until(lambda screen: self.at_prompt(screen) and screen.split()[-2:-1] == ["[stopped]"])

    def _makes_signals(self):
        return bool(termios.tcgetattr(self.child.child_fd)[3] & termios.ISIG)


@pytest.mark.parametrize(("columns", "settings"), [(40, {}), (80, {"NO_COLOR": "1"}), (120, {})])
def test_a_session(columns, settings, demo_artifact, tmp_path):
    """A long paste, emoji, another width, commands, the history, and all that ends something."""
    terminal = Terminal(demo_artifact, columns, tmp_path, **settings)
    terminal.until(lambda screen: "/help lists the commands." in screen.replace("\n", " "))
    lines = "\n".join(f"line {i}" for i in range(50))
    terminal.ask(f"\x1b[200~{lines}\x1b[201~", "line 49")
    terminal.child.setwinsize(ROWS, 60)
    terminal.screen.resize(ROWS, 60)
    terminal.ask("🐢 é 漢字\x1b\rand more", "and more")
    terminal.press("/save a.state\r", "a.state has ")
    terminal.press("/undo\r", "reply are gone.")
    terminal.press("/load a.state\r", "tokens are known, 4 messages.")
    terminal.press("/stats\r", "last reply: ")
    terminal.press("/nonsense\r", "there is no command /nonsense;")
    terminal.press("/he\t", "> /help")
    terminal.child.send(b"\r")
    terminal.press("\x1b[A" * 6, "> 🐢")  # up, to the message before the commands
    terminal.child.send(b"\x03")
    terminal.press("\x03", "Ctrl-D or /quit ends the chat.")
    terminal.until(terminal.at_prompt)
    terminal.child.send(b"\x04")
    terminal.child.expect(pexpect.EOF, timeout=SECONDS)
    terminal.child.close()
    assert terminal.child.exitstatus == 0 and (tmp_path / "a.state").is_file()


def test_a_terminal_without_cursor_control(demo_artifact, tmp_path):
    """The reply and the answers of commands arrive without escape codes."""
    terminal = Terminal(demo_artifact, 80, tmp_path, TERM="dumb")
    terminal.child.logfile_read = log = io.BytesIO()
    terminal.child.expect_exact("/help lists the commands.", timeout=SECONDS)
    terminal.child.expect_exact("\n> ", timeout=SECONDS)
    terminal.child.sendline("Once upon a time")
    terminal.child.expect(r"time\r\n.{10}", timeout=SECONDS)
    terminal.child.sendintr()
    terminal.child.expect_exact("[stopped]", timeout=SECONDS)
    terminal.child.sendline("/stats")
    terminal.child.expect_exact("last reply: ", timeout=SECONDS)
    terminal.child.sendline("/quit")
    terminal.child.expect(pexpect.EOF, timeout=SECONDS)
    terminal.child.close()
    assert terminal.child.exitstatus == 0 and b"\x1b" not in log.getvalue()
