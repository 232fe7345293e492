"""Text and tables on a terminal."""

import io
import shutil
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rgexport.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; columns whose name is in `numbers` are set flush right."""

    title: str
    header: Row
    rows: Iterable[Row]
    numbers: Collection[str] = ()


def render(parts: Iterable[str | Table]) -> str:
    """Lines and tables one below another, as wide as the terminal (110 columns elsewhere).

    What a terminal would obey is not among them, whatever names a file has.
    """
    from rich.console import Console

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 110
    buffer = io.StringIO()
    console = Console(file=buffer, width=columns, highlight=False, markup=False)
    for part in parts:
        if isinstance(part, str):
            console.print(printable(part, kept="\n"), soft_wrap=True)
        else:
            _print_table(console, part)
    return buffer.getvalue()


def _print_table(console: "Console", table: Table) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    grid = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    grid.show_header = any(table.header)
    for index, name in enumerate(table.header):
        # Where there is no room, it is names that are broken, not numbers that are cut.
        grid.add_column(
            printable(name),
            justify="right" if name in table.numbers else "left",
            no_wrap=index > 0,
            overflow="fold",
        )
    for row in table.rows:
        grid.add_row(*(printable(cell) for cell in row))
    console.print(printable(table.title))
    console.print(grid)
    console.print()
