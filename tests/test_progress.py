"""Progress on a terminal and elsewhere."""

import contextlib
import os
import re
import subprocess
import sys

import pytest

from rgexport import progress, units
from rgexport.progress import TaskProgress
from tests.command_line import ROOT


@pytest.fixture(autouse=True)
def no_numbers():
    progress.expect_stages(0)
    yield
    progress.expect_stages(0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when `clock.now` does."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (units.amount(999), "999 bytes"),
        (units.amount(65_536), "65.5 kB"),
        (units.amount(1_512_000_000), "1.51 GB"),
        (units.amount(256_000, "tokens"), "256,000 tokens"),
        (units.duration(0.04), "0.0 s"),
        (units.duration(9.96), "10 s"),
        (units.duration(59.6), "1 min 00 s"),
        (units.duration(7651), "2 h 07 min"),
    ],
)
def test_amounts_and_durations_are_short(shown, text):
    assert shown == text


def test_a_short_stage_is_one_line(capsys, clock):
    with progress.task("Quantizing", 100, "rows") as advance:
        for _ in range(4):
            advance(25)
            clock.now += 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Quantizing: 100 rows, 8.0 s\n")


def test_a_stage_may_leave_no_line_and_takes_no_number(capsys, clock):
    progress.expect_stages(1)
    with progress.task("Loading", leaves_line=False):
        clock.now += 2
    with progress.task("Quantizing"):
        clock.now += 3
    assert capsys.readouterr().err == "[1/1] Quantizing: 3.0 s\n"


def test_a_long_stage_tells_ever_more_seldom_that_it_goes_on(capsys, clock):
    with progress.task("Quantizing", 1000, "rows") as advance:
        for _ in range(1000):
            clock.now += 1
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Quantizing: 3 % of 1,000 rows, 30 s, 16 min 10 s left"
    assert lines[-1] == "Quantizing: 1,000 rows, 16 min 40 s"
    shares = [int(line.split()[1]) for line in lines[:-1]]
    assert shares[:6] == [3, 6, 9, 12, 15, 18] and len(shares) == 13


def test_what_runs_inside_is_no_stage_of_its_own(capsys, clock):
    progress.expect_stages(2)
    with progress.task("Outer", 2, "steps"), progress.task("Inner", 10):
        clock.now += 3
    with progress.group("Self-check"):
        for label in ("Weights", "Tokens"):
            with progress.task(label, 10) as advance:
                clock.now += 31
                advance(5)
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] Outer: 2 steps, 3.0 s",
        "[2/2] Weights: 50 % of 10 bytes, 31 s, 31 s left",
        "[2/2] Tokens: 50 % of 10 bytes, 31 s, 31 s left",
        "[2/2] Self-check: 1 min 02 s",
    ]


def test_stages_are_numbered_until_there_are_no_more(capsys, clock):
    with pytest.raises(ValueError, match="broken"), progress.task("Without an end", 0):
        raise ValueError("broken")
    progress.expect_stages(1)
    with progress.group("Without tasks"):
        pass
    for label in ("Reading", "Something else"):
        with progress.task(label, 1, "steps"):
            pass
    assert capsys.readouterr().err.splitlines() == [
        "[1/1] Reading: 1 steps, 0.0 s",
        "Something else: 1 steps, 0.0 s",
    ]


@pytest.mark.parametrize("columns", [30, 80])
@pytest.mark.parametrize("label", ["Quantizing", "Running the dequantized reference"])
@pytest.mark.parametrize("ended", [False, True])
def test_a_line_fits(clock, columns, label, ended):
    work = TaskProgress(label, 1_512_000_000, "bytes", "[2/4] ", done=653_000_000)
    clock.now += 12
    line = work.line(columns, ended=ended)
    assert len(line) <= columns and line.startswith("[2/4] ")
    assert line.endswith("12 s" if ended else "16 s left")
    if columns == 80:
        numbers = "1.51 GB, 12 s" if ended else "43 % of 1.51 GB, 12 s, 16 s left"
        assert line == f"[2/4] {label}: {numbers}"


SHOW = """
import time
from rgexport import progress, units
progress.expect_stages(1)
with progress.task("Running the dequantized reference", 1 << 30) as advance:
    for _ in range(4):
        advance(1 << 28)
        time.sleep(0.25)
"""


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal")
@pytest.mark.parametrize(("term", "columns"), [("xterm", 40), ("xterm", 80), ("dumb", 40)])
def test_on_a_terminal_each_stage_leaves_one_line(term, columns):
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    variables |= {"TERM": term, "PYTHONPATH": str(ROOT)}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with subprocess.Popen([sys.executable, "-c", SHOW], env=variables, **streams) as process:
        os.close(theirs)
        found = b""
        with contextlib.suppress(OSError):  # how Linux tells that nobody writes any more
            while part := os.read(ours, 1 << 16):
                found += part
    os.close(ours)
    assert process.returncode == 0
    shown = found.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    lines = [line for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert all(len(line) <= columns for line in lines), lines
    assert lines[-1].startswith("[1/1] Running the dequan") and lines[-1].endswith(" s")
    assert ("\x1b" in shown) == (term != "dumb")
    if term == "dumb":
        assert len(lines) == 1
    else:
        assert any("50 %" in line for line in lines) and any("left" in line for line in lines)
