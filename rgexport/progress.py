"""Prints progress and remarks to stderr; results alone go to stdout."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rgexport.errors import printable
from rgexport.printing import terminal_columns, wrapped
from rgexport.units import amount, duration

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

FIRST_LINE = 30.0
"""Seconds until a running task prints a first line, where no line can be rewritten."""
LATER_LINES = 1.25
"""Factor of the running time until the next line, which comes at least `FIRST_LINE` later."""
_BAR = range(8, 31)

Advance = Callable[[int], None]
Listener = Callable[[str, int, int], None]
"""Gets a task's label, and how many of how many units are done."""

verbose = False
quiet = False  # whether stderr shows warnings and errors alone
_no_warnings = False
_listener: Listener | None = None


def note(text: str) -> None:
    if not quiet and _listener is None:
        print_error(text)


def print_error(text: str) -> None:
    """Prints to stderr, with `--quiet` too."""
    lines = wrapped(printable(text, allowed="\n\t"), terminal_columns(sys.stderr))
    print(lines, file=sys.stderr, flush=True)


def detail(text: str) -> None:
    if verbose:
        note(text)


def warn(text: str) -> None:
    if not _no_warnings:
        print_error(f"Warning: {text}")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Drops warnings while the steps of an export are repeated for a comparison."""
    global _no_warnings
    before, _no_warnings = _no_warnings, True
    try:
        yield
    finally:
        _no_warnings = before


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """Calls `listener` instead of printing progress and remarks; does nothing without one."""
    global _listener
    before, _listener = _listener, listener or _listener
    try:
        yield
    finally:
        _listener = before


@dataclass
class TaskProgress:
    label: str
    total: int = 0
    unit: str = ""
    number: str | None = None
    done: int = 0
    began: float = field(default_factory=lambda: time.monotonic())

    @property
    def title(self) -> str:
        return f"{self.number or ''}{printable(self.label)}"

    def line(self, columns: int | None = None, *, ended: bool = False) -> str:
        texts = self._texts(ended)
        for text in texts:
            line = f"{self.title}: {text}"
            if not columns or len(line) <= columns:
                return line
        end, width = f"...: {texts[-1]}", columns or 0  # any terminal has dots
        return f"{self.title[: max(0, width - len(end))]}{end}"[:width]

    def _texts(self, ended: bool) -> list[str]:
        """Returns how much is done in how much time, as a long text and as a short one."""
        passed = time.monotonic() - self.began
        if not self.total:
            return [duration(passed)]
        size = amount(self.total, self.unit)
        if ended:
            return [f"{size}, {duration(passed)}", duration(passed)]
        share = f"{100 * self.done // self.total} %"
        if not self.done:
            return [f"{share} of {size}", share]
        remaining = f"{duration(passed * (self.total - self.done) / self.done)} left"
        return [f"{share} of {size}, {duration(passed)}, {remaining}", f"{share}, {remaining}"]


_numbers: Iterator[str] = iter(())
_open: list[TaskProgress] = []  # tasks and groups that run, the outermost first
_lock = threading.Lock()
_display: "Progress | None" = None


def expect_stages(total: int, done: int = 0) -> None:
    """Numbers the next outermost tasks, as in `[2/4] Quantizing`; does nothing inside of one."""
    global _numbers
    if not _open:
        _numbers = iter([f"[{number}/{total}] " for number in range(done + 1, total + 1)])


@contextmanager
def group(label: str) -> Iterator[None]:
    """Makes one stage of the tasks inside; prints nothing without any."""
    with _running(TaskProgress(label)):
        yield


@contextmanager
def task(
    label: str, total: int = 0, unit: str = "bytes", *, leaves_line: bool = True
) -> Iterator[Advance]:
    """Shows a task's progress, or its time if the total is unknown; leaves one line at its end.

    On a terminal a bar moves; elsewhere, a long task prints a line now and then. A task inside
    another one, or inside a `group`, leaves no line. Any thread may call `advance`.
    """
    current = TaskProgress(label, total, unit)
    with _running(current):
        if _open[0].number is None and leaves_line:
            _open[0].number = next(_numbers, "")
        current.number = _open[0].number
        listener = _listener
        show = _bar if _can_rewrite_lines() else _lines
        with show(current) if listener is None else _calls(current, listener) as advance:
            yield advance


@contextmanager
def _running(current: TaskProgress) -> Iterator[None]:
    _open.append(current)
    try:
        yield
    finally:
        _open.remove(current)
    if not _open and current.number is not None:  # a group without tasks has no number
        note(current.line(terminal_columns(sys.stderr), ended=True))


def moves_cursor() -> bool:
    """Returns whether the terminal obeys escape codes, by its TERM."""
    return os.environ.get("TERM") not in ("dumb", "unknown")


def _can_rewrite_lines() -> bool:
    return sys.stderr.isatty() and moves_cursor() and not quiet


@contextmanager
def _calls(current: TaskProgress, listener: Listener) -> Iterator[Advance]:
    def advance(step: int) -> None:
        with _lock:
            current.done += step
            listener(current.label, current.done, current.total)

    listener(current.label, 0, current.total or 1)
    yield advance
    if not current.total:
        listener(current.label, 1, 1)


@contextmanager
def _lines(current: TaskProgress) -> Iterator[Advance]:
    due = current.began + FIRST_LINE

    def advance(step: int) -> None:
        nonlocal due
        with _lock:
            current.done += step
            now = time.monotonic()
            if now >= due and current.done < current.total:
                note(current.line(terminal_columns(sys.stderr)))
                due = max(now + FIRST_LINE, current.began + LATER_LINES * (now - current.began))

    yield advance


@contextmanager
def _bar(current: TaskProgress) -> Iterator[Advance]:
    global _display
    display = _display = _display or _new_display()
    bar = display.add_task(current.label, total=current.total, current=current)
    display.start()

    def advance(step: int) -> None:
        with _lock:
            current.done += step
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

    width = (terminal_columns(sys.stderr) or 80) - 1

    class Line(ProgressColumn):
        def render(self, task: Task) -> "Table":
            return _bar_line(task.fields["current"], width)

    return Progress(Line(), console=Console(stderr=True), redirect_stdout=False, transient=True)


def _bar_line(current: TaskProgress, width: int) -> "Table":
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line, text = Table.grid(padding=(0, 1, 0, 0), pad_edge=False), current.line(width)
    free = width - len(text) - 1
    if current.total and free >= _BAR.start:
        bar = ProgressBar(current.total, current.done, width=min(free, _BAR.stop - 1))
        numbers = text.removeprefix(f"{current.title}: ")
        line.add_row(Text(current.title), bar, Text(numbers))
    else:
        line.add_row(Text(text, no_wrap=True))
    return line
