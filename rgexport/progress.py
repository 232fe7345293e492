"""Progress and remarks for people, always on stderr: results alone go to stdout."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rgexport.errors import printable
from rgexport.units import amount, duration

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

FIRST_LINE = 30.0
"""Seconds after which a running stage prints a line, where no line can be rewritten."""
LATER_LINES = 1.25
"""The next line follows when the stage has run so many times longer, and `FIRST_LINE` later."""
_BAR = range(8, 31)
"""Columns that a bar may have; with less room there is none."""

Advance = Callable[[int], None]

verbose = False
"""Whether details are shown; `-v` sets it."""
_no_warnings = False


def note(text: str) -> None:
    """Prints a remark, without control characters."""
    print(printable(text, kept="\n\t"), file=sys.stderr, flush=True)


def detail(text: str) -> None:
    """Prints a remark if `-v` was given."""
    if verbose:
        note(text)


def warn(text: str) -> None:
    """Prints a remark that should not be overlooked, unless inside `without_warnings`."""
    if not _no_warnings:
        note(f"Warning: {text}")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Drops warnings, where the steps of an export are repeated to compare what they made."""
    global _no_warnings
    before, _no_warnings = _no_warnings, True
    try:
        yield
    finally:
        _no_warnings = before


@dataclass
class Work:
    """A piece of work that is shown: how much of it is done, and since when it runs."""

    label: str
    total: int = 0
    unit: str = ""
    number: str | None = None
    done: int = 0
    began: float = field(default_factory=lambda: time.monotonic())

    @property
    def title(self) -> str:
        """The label after its number."""
        return f"{self.number or ''}{printable(self.label)}"

    def line(self, columns: int | None = None, *, ended: bool = False) -> str:
        """Label, size, time and time left, in one line of at most so many columns."""
        texts = self._ended() if ended or not self.total else self._running()
        for text in texts:
            line = f"{self.title}: {text}"
            if not columns or len(line) <= columns:
                return line
        end, room = f"...: {texts[-1]}", columns or 0  # any terminal has dots
        return f"{self.title[: max(0, room - len(end))]}{end}"[:room]

    def _running(self) -> list[str]:
        """How far it is: a long text, and a short one."""
        passed = time.monotonic() - self.began
        share, size = f"{100 * self.done // self.total} %", amount(self.total, self.unit)
        if not self.done:
            return [f"{share} of {size}", share]
        left = f"{duration(passed * (self.total - self.done) / self.done)} left"
        return [f"{share} of {size}, {duration(passed)}, {left}", f"{share}, {left}"]

    def _ended(self) -> list[str]:
        passed = duration(time.monotonic() - self.began)
        return [f"{amount(self.total, self.unit)}, {passed}", passed] if self.total else [passed]


_numbers: Iterator[str] = iter(())
"""The numbers of the stages that have not begun."""
_open: list[Work] = []
"""What is under way, the outermost first."""
_lock = threading.Lock()
_display: "Progress | None" = None
"""One live display for all bars: a task that runs inside another adds a line to it."""


def expect_stages(total: int) -> None:
    """Numbers the next `total` outermost tasks, as in `[2/4] Quantizing`; 0 ends a numbering.

    Inside a task or a group it changes nothing, for what runs there is no stage.
    """
    global _numbers
    if _open:
        return
    _numbers = iter([f"[{number}/{total}] " for number in range(1, total + 1)])


@contextmanager
def group(label: str) -> Iterator[None]:
    """Makes one stage of the tasks inside; nothing is shown where there are none."""
    with _under_way(Work(label)):
        yield


@contextmanager
def task(label: str, total: int, unit: str = "bytes") -> Iterator[Advance]:
    """Shows how far a piece of work has come, and leaves one line when it is done.

    On a terminal a bar moves; elsewhere, long work prints a line now and then. A task inside
    another one, or inside a `group`, leaves no line.

    Args:
        label: what is being done, such as `Quantizing`.
        total: how much there is to do, in `unit`.
        unit: `bytes`, or the plural of what is counted.

    Yields:
        `advance(done)`, which any thread may call.
    """
    work = Work(label, total, unit)
    with _under_way(work):
        if _open[0].number is None:
            _open[0].number = next(_numbers, "")
        work.number = _open[0].number
        with (_bar if _can_rewrite_lines() else _lines)(work) as advance:
            yield advance


@contextmanager
def _under_way(work: Work) -> Iterator[None]:
    _open.append(work)
    try:
        yield
    finally:
        _open.remove(work)
    if not _open and work.number is not None:  # a group without tasks has no number
        note(work.line(columns(), ended=True))


def columns() -> int | None:
    """How wide the terminal is that remarks go to; None where they go elsewhere."""
    if not sys.stderr.isatty():
        return None
    with suppress(OSError, ValueError):
        if "COLUMNS" not in os.environ:
            return os.get_terminal_size(sys.stderr.fileno()).columns
    return shutil.get_terminal_size().columns


def _can_rewrite_lines() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def _lines(work: Work) -> Iterator[Advance]:
    due = work.began + FIRST_LINE

    def advance(step: int) -> None:
        nonlocal due
        with _lock:
            work.done += step
            now = time.monotonic()
            if now >= due and work.done < work.total:
                note(work.line(columns()))
                due = max(now + FIRST_LINE, work.began + LATER_LINES * (now - work.began))

    yield advance


@contextmanager
def _bar(work: Work) -> Iterator[Advance]:
    global _display
    display = _display = _display or _new_display()
    bar = display.add_task(work.label, total=work.total, work=work)
    display.start()

    def advance(step: int) -> None:
        with _lock:
            work.done += step
        display.advance(bar, step)

    try:
        yield advance
    finally:
        display.remove_task(bar)
        if not display.tasks:
            display.stop()
            _display = None


def _new_display() -> "Progress":
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task

    width = columns() or 80

    class Line(ProgressColumn):
        def render(self, task: Task) -> "Table":
            return _bar_line(task.fields["work"], width - 1)

    return Progress(Line(), console=Console(stderr=True), redirect_stdout=False, transient=True)


def _bar_line(work: Work, width: int) -> "Table":
    """A line with a bar between its label and its numbers, if there is room for one."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
    text = work.line(width)
    room = width - len(text) - 1
    if work.total and room >= _BAR.start:
        numbers = text.removeprefix(f"{work.title}: ")
        bar = ProgressBar(work.total, work.done, width=min(room, _BAR.stop - 1))
        line.add_row(Text(work.title), bar, Text(numbers))
    else:
        line.add_row(Text(text, no_wrap=True))
    return line
