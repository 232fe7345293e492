"""Sizes, counts and durations as text."""

_SCALES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def amount(value: float, unit: str = "bytes") -> str:
    """`1.51 GB` for bytes (decimal units), `1,234 tokens` for anything else."""
    if unit != "bytes":
        return f"{value:,.0f} {unit}"
    for scale, name in _SCALES:
        if (scaled := value / scale) >= 1:
            return f"{scaled:.{2 - (scaled >= 10) - (scaled >= 100)}f} {name}"
    return f"{value:.0f} bytes"


def duration(seconds: float) -> str:
    """`0.4 s`, `27 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
