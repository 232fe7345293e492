"""The results of `rgexport bench`, one row for each test at each depth, and their formats."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rgexport.reporting.tables import Table, markdown, render
from rgexport.units import amount


@dataclass(frozen=True)
class Row:
    """One test at one depth; the order of the fields is that of the output."""

    test: str
    depth: int
    state: str
    """How the depth was reached: by `processed` tokens, or with a `synthetic` state."""
    repetitions: int
    tokens_per_second: float
    """The mean over the repetitions."""
    deviation: float
    """The standard deviation over the repetitions; 0 for one."""
    median_tokens_per_second: float
    time_ratio: float
    """The median time of a token, relative to the same test at the lowest depth."""
    bytes_per_token: float
    """Bytes of weights read per token; they are read once for each chunk of a prompt."""
    roofline_bytes_per_second: float
    """The memory's read speed: the median of measurements between the timed pieces."""
    roofline_share: float
    """tokens_per_second * bytes_per_token / roofline_bytes_per_second."""
    rss_bytes: int | None
    """The memory of the process at the end of a repetition: the median."""
    peak_rss_bytes: int | None
    """The most memory of the process so far, opening included."""
    load_seconds: float
    """Time to open the session."""
    artifact_bytes: int
    artifact: str
    engine: str
    engine_version: str
    kernels: str
    """See `SessionInfo.kernels`."""
    threads: int
    cpu: str


def as_json(rows: Sequence[Row]) -> str:
    """A list of rows, each an object with the fields of `Row`."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """A line with the fields of `Row`, and a line for each row."""
    buffer = io.StringIO()
    records = [asdict(row) for row in rows]
    writer = csv.DictWriter(buffer, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def as_table(rows: Sequence[Row]) -> str:
    """A title and a table for a terminal."""
    columns = _columns(rows)
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    header = tuple(columns)
    *titles, machine = _titles(rows[0])
    table = Table(machine, header, map(tuple, cells), header[1:])
    return render([*titles, table]).rstrip() + "\n"


def as_markdown(rows: Sequence[Row]) -> str:
    """The same in Markdown."""
    columns = _columns(rows)
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    return f"{'; '.join(_titles(rows[0]))}\n\n{markdown(list(columns), cells)}\n"


def _titles(row: Row) -> tuple[str, str, str]:
    """The artifact, the engine, and the machine."""
    size, engine = amount(row.artifact_bytes), f"{row.engine} {row.engine_version}"
    kernels = f"{row.kernels} kernels"
    return (
        f"{row.artifact}, {size}, opened in {row.load_seconds:.2f} s",
        f"{engine}, {kernels}, {row.threads} threads",
        row.cpu,
    )


def _memory(size: int | None) -> str:
    return "unknown" if size is None else amount(size)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "test": lambda row: row.test,
    "depth": lambda row: f"{row.depth:,}" + (" (synthetic)" if row.state == "synthetic" else ""),
    "tokens/s": lambda row: f"{row.tokens_per_second:.2f} ± {row.deviation:.2f}",
    "time": lambda row: f"{row.time_ratio:.3f}",
    "weights/token": lambda row: amount(row.bytes_per_token),
    "read speed": lambda row: f"{row.roofline_bytes_per_second / 1e9:.1f} GB/s",
    "share": lambda row: f"{row.roofline_share:.3f}",
    "memory": lambda row: _memory(row.rss_bytes),
    "peak": lambda row: _memory(row.peak_rss_bytes),
}
"""The columns of the tables for people.

`time` is the time of a token relative to that at the lowest depth, and `share` how much of the
memory's read speed the weights take."""


def _columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """The columns, without the comparison of depths if there is only one depth."""
    several = len({row.depth for row in rows}) > 1
    return {name: cell for name, cell in COLUMNS.items() if several or name != "time"}


WRITERS: dict[str, Callable[[Sequence[Row]], str]] = {
    "table": as_table,
    "md": as_markdown,
    "json": as_json,
    "csv": as_csv,
}
"""The argument of `-o` → the writer."""
