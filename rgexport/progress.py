"""Progress and remarks for people, always on stderr: results alone go to stdout."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from rgexport.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = (2.0, 15.0)
"""Where there is no terminal: least and most seconds between two lines of a task."""
_SCALES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))

Advance = Callable[[int], None]

verbose = False
"""Whether details are shown; `-v` sets it."""


def note(text: str) -> None:
    """Prints a remark, without what a terminal would obey."""
    print(printable(text, kept="\n\t"), file=sys.stderr, flush=True)


def detail(text: str) -> None:
    """Prints a remark for those who asked for detail."""
    if verbose:
        note(text)


def warn(text: str) -> None:
    """Prints a remark that should not be overlooked."""
    note(f"Warning: {text}")


def amount(value: float, unit: str = "bytes") -> str:
    """`1.51 GB` for bytes (decimal units), `1,234 tokens` for anything else."""
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    for scale, name in _SCALES:
        if (scaled := value / scale) >= 1:
            return f"{scaled:.{2 - (scaled >= 10) - (scaled >= 100)}f} {name}"
    return f"{value:.0f} bytes"


def task(label: str, total: int, unit: str = "bytes") -> AbstractContextManager[Advance]:
    """Shows how far a piece of work has come: a bar on a terminal, plain lines elsewhere.

    Args:
        label: what is being done, such as `Quantizing`.
        total: how much there is to do, in `unit`.
        unit: `bytes`, or the plural of what is counted.

    Returns:
        A context manager that gives `advance(done)`, which any thread may call.
    """
    return (_bar if sys.stderr.isatty() else _lines)(label, total, unit)


@contextmanager
def _lines(label: str, total: int, unit: str) -> Iterator[Advance]:
    lock = threading.Lock()
    began = last = time.monotonic()
    done = shown = 0
    least, most = LINE_SECONDS

    def advance(step: int) -> None:
        nonlocal done, shown, last
        with lock:
            done += step
            now = time.monotonic()
            tenth = done - shown >= total / 10
            if done < total and now - last >= (least if tenth else most):
                note(f"{label}: {100 * done // max(total, 1)} % of {amount(total, unit)}")
                shown, last = done, now

    note(f"{label}: {amount(total, unit)}")
    yield advance
    if (took := time.monotonic() - began) >= least:
        note(f"{label}: done in {took:.1f} s")


_display_lock = threading.Lock()
_display: "Progress | None" = None
"""One live display for all bars: a task that runs inside another adds a line to it."""


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    with _shared_display() as display:
        bar = display.add_task(label, total=total, amount=amount(total, unit))
        try:
            yield lambda step: display.advance(bar, step)
        finally:
            display.stop_task(bar)


@contextmanager
def _shared_display() -> "Iterator[Progress]":
    global _display
    with _display_lock:
        owner = _display is None
        display = _display = _display or _new_display()
    if not owner:
        yield display
        return
    try:
        with display:
            yield display
    finally:
        _display = None


def _new_display() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("of {task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=False,
    )
