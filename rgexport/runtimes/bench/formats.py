"""Writes the rows of a benchmark: a table, Markdown, JSON or CSV."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rgexport.reporting.tables import Table, markdown, render
from rgexport.runtimes.bench.measure import BenchRow
from rgexport.units import amount

_COLUMNS = (
    "test",
    "depth",
    "tokens/s",
    "time",
    "weights/token",
    "read speed",
    "share",
    "memory",
    "peak",
)
"""The columns of `as_table` and `as_markdown`."""
_TIME = _COLUMNS.index("time")
"""The column that compares depths; it is left out if there is one depth."""


def as_json(rows: Sequence[BenchRow]) -> str:
    """Returns a JSON list with an object for each row."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def as_csv(rows: Sequence[BenchRow]) -> str:
    """Returns CSV with a header; unknown values are empty."""
    buffer = io.StringIO()
    records = [asdict(row) for row in rows]
    writer = csv.DictWriter(buffer, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def as_table(rows: Sequence[BenchRow]) -> str:
    """Returns a table for the terminal, under the artifact, the engine and the processor."""
    header, cells = _header_and_cells(rows)
    artifact, engine, machine = _titles(rows[0])
    table = Table(machine, header, cells, header[1:])
    return render([artifact, engine, table]).rstrip() + "\n"


def as_markdown(rows: Sequence[BenchRow]) -> str:
    """Returns a Markdown table, under a line with the artifact, the engine and the processor."""
    titles = "; ".join(_titles(rows[0]))
    header, cells = _header_and_cells(rows)
    return f"{titles}\n\n{markdown(header, cells)}\n"


def _header_and_cells(rows: Sequence[BenchRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the columns' names, and their texts for each row."""
    cells = [_cells(row) for row in rows]
    depths = {row.depth for row in rows}
    if len(depths) > 1:
        return _COLUMNS, cells
    return _without_time(_COLUMNS), [_without_time(texts) for texts in cells]


def _without_time(texts: tuple[str, ...]) -> tuple[str, ...]:
    return texts[:_TIME] + texts[_TIME + 1 :]


def _cells(row: BenchRow) -> tuple[str, ...]:
    """Returns the texts of a row, in the order of `_COLUMNS`."""
    depth = f"{row.depth:,}"
    if row.state == "synthetic":
        depth += " (synthetic)"
    return (
        row.test,
        depth,
        f"{row.tokens_per_second:.2f} ± {row.deviation:.2f}",
        f"{row.time_ratio:.3f}",
        amount(row.bytes_per_token),
        f"{row.roofline_bytes_per_second / 1e9:.1f} GB/s",
        f"{row.roofline_share:.3f}",
        _memory_text(row.rss_bytes),
        _memory_text(row.peak_rss_bytes),
    )


def _memory_text(size: int | None) -> str:
    return "unknown" if size is None else amount(size)


def _titles(row: BenchRow) -> tuple[str, str, str]:
    """Returns the artifact, the engine and the processor in words; they are equal in all rows."""
    size = amount(row.artifact_bytes)
    return (
        f"{row.artifact}, {size}, opened in {row.load_seconds:.2f} s",
        f"{row.engine} {row.engine_version}, {row.kernels} kernels, {row.threads} threads",
        row.cpu,
    )


WRITERS: dict[str, Callable[[Sequence[BenchRow]], str]] = {
    "table": as_table,
    "md": as_markdown,
    "json": as_json,
    "csv": as_csv,
}
"""Value of `--format` → the function that writes rows in it."""
