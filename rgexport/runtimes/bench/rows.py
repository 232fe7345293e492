"""The results of `rgexport bench`, one row for each test at each depth, and their formats."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rgexport.reporting.tables import Table, markdown, render
from rgexport.units import amount


@dataclass(frozen=True)
class BenchRow:
    """A test at a depth; the output has the fields in this order.

    Attributes:
        state: how the depth was reached: by `processed` tokens, or with a `synthetic` state.
        deviation: the standard deviation over the repetitions; 0 for one.
        time_ratio: the median time of a token, relative to the same test at the lowest depth.
        bytes_per_token: weights read per token; they are read once for each chunk of a prompt.
        roofline_bytes_per_second: the median of the memory's read speed between the timed pieces.
        roofline_share: tokens_per_second * bytes_per_token / roofline_bytes_per_second.
        rss_bytes: memory of the process at the end of a repetition: the median.
        peak_rss_bytes: the most memory of the process so far, opening included.
    """

    test: str
    depth: int
    state: str
    repetitions: int
    tokens_per_second: float
    deviation: float
    median_tokens_per_second: float
    time_ratio: float
    bytes_per_token: float
    roofline_bytes_per_second: float
    roofline_share: float
    rss_bytes: int | None
    peak_rss_bytes: int | None
    load_seconds: float
    artifact_bytes: int
    artifact: str
    engine: str
    engine_version: str
    kernels: str
    threads: int
    cpu: str


COLUMNS: dict[str, Callable[[BenchRow], str]] = {
    "test": lambda row: row.test,
    "depth": lambda row: f"{row.depth:,}" + (" (synthetic)" if row.state == "synthetic" else ""),
    "tokens/s": lambda row: f"{row.tokens_per_second:.2f} ± {row.deviation:.2f}",
    "time": lambda row: f"{row.time_ratio:.3f}",
    "weights/token": lambda row: amount(row.bytes_per_token),
    "read speed": lambda row: f"{row.roofline_bytes_per_second / 1e9:.1f} GB/s",
    "share": lambda row: f"{row.roofline_share:.3f}",
    "memory": lambda row: _memory_text(row.rss_bytes),
    "peak": lambda row: _memory_text(row.peak_rss_bytes),
}
"""The columns of the tables for people; `time` and `share` are the row's ratios."""


def as_json(rows: Sequence[BenchRow]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def as_csv(rows: Sequence[BenchRow]) -> str:
    buffer = io.StringIO()
    records = [asdict(row) for row in rows]
    writer = csv.DictWriter(buffer, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def as_table(rows: Sequence[BenchRow]) -> str:
    header, cells = _cells(rows)
    *titles, machine = _titles(rows[0])
    return render([*titles, Table(machine, header, cells, header[1:])]).rstrip() + "\n"


def as_markdown(rows: Sequence[BenchRow]) -> str:
    return f"{'; '.join(_titles(rows[0]))}\n\n{markdown(*_cells(rows))}\n"


def _cells(rows: Sequence[BenchRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns header and cells; depths are compared only if there are several."""
    several = len({row.depth for row in rows}) > 1
    names = tuple(name for name in COLUMNS if several or name != "time")
    return names, [tuple(COLUMNS[name](row) for name in names) for row in rows]


def _titles(row: BenchRow) -> tuple[str, str, str]:
    size, engine = amount(row.artifact_bytes), f"{row.engine} {row.engine_version}"
    return (
        f"{row.artifact}, {size}, opened in {row.load_seconds:.2f} s",
        f"{engine}, {row.kernels} kernels, {row.threads} threads",
        row.cpu,
    )


def _memory_text(size: int | None) -> str:
    return "unknown" if size is None else amount(size)


WRITERS: dict[str, Callable[[Sequence[BenchRow]], str]] = {
    "table": as_table,
    "md": as_markdown,
    "json": as_json,
    "csv": as_csv,
}
"""The argument of `-o` → the writer."""
