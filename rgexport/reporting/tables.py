"""Tables for a terminal and for Markdown."""

import io
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rgexport.errors import printable
from rgexport.printing import wrapped

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, ...]
_GAP = 3  # characters between two columns


@dataclass(frozen=True)
class Table:
    """A table; the columns named in `numbers` are aligned to the right."""

    title: str
    header: Row
    rows: Iterable[Row]
    numbers: Collection[str] = ()


@dataclass(frozen=True, kw_only=True)
class BarTable(Table):
    """A table that has a bar in each row on a page; `bar` is its meaning.

    `shares` are the lengths of the bars, 1 being the whole length; longer ones turn red.
    """

    bar: str
    shares: list[float]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; all columns but the first are set flush right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def render(blocks: Iterable[str | Table]) -> str:
    """Returns lines and tables as wide as the terminal, or 120; escapes control characters."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns if terminal else 120
    buffer = io.StringIO()
    console = Console(file=buffer, width=columns, highlight=False, markup=False)
    for block in blocks:
        if isinstance(block, str):
            text = printable(block, allowed="\n")
            console.print(wrapped(text, columns) if terminal else text, soft_wrap=True)
        else:
            _print_table(console, block)
    return buffer.getvalue()


def _print_table(console: "Console", table: Table) -> None:
    rows = [tuple(map(printable, row)) for row in table.rows]
    console.print(wrapped(printable(table.title), console.width), soft_wrap=True)
    widths = [max(map(len, column)) for column in zip(table.header, *rows, strict=True)]
    if sum(widths) + _GAP * (len(widths) - 1) <= console.width:
        _print_grid(console, table, rows)
    else:
        _print_lists(console, table, rows)
    console.print()


def _print_lists(console: "Console", table: Table, rows: Iterable[Row]) -> None:
    """Prints each row's cells below its name, for narrow terminals."""
    for name, *cells in rows:
        console.print(name, soft_wrap=True)
        for label, cell in zip(table.header[1:], cells, strict=True):
            if cell:
                text, width = f"{printable(label)}: {cell}", console.width - 2
                if len(text) > width:
                    text = f"{printable(label)}:\n{cell}"
                console.print(textwrap.indent(wrapped(text, width), "  "))


def _print_grid(console: "Console", table: Table, rows: Iterable[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    grid = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    grid.show_header = any(table.header)
    for index, name in enumerate(table.header):
        # On a narrow terminal names are broken; numbers are never cut.
        grid.add_column(
            printable(name),
            justify="right" if name in table.numbers else "left",
            no_wrap=index > 0,
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
