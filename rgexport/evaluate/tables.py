"""The figures of suites as tables."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from rgexport.evaluate.pieces import Result
from rgexport.reporting.tables import Row, Table
from rgexport.units import amount

_COLUMNS = 10
"""Most distances in a table of `memory`: ten fit a terminal."""
Models = Sequence[Result]


def _differences(model: Result, suite: str, key: str) -> list[Result]:
    """Returns the differences of a model to the first one; none for the first itself."""
    entries: list[Result] = model.get("differences", {}).get(suite, {key: []})[key]
    return entries


def _difference(gap: Result | None) -> str:
    """Returns a difference and half of its interval; empty without one."""
    if gap is None:
        return ""
    error = "" if gap["high"] is None else f" ± {gap['high'] - gap['value']:.4f}"
    return f"{gap['value']:+.4f}{error}"


def _is_significant(p: float | None) -> bool:
    return p is not None and p < 0.05


_MODE = "domain", "context", "stride"


def text_tables(models: Models) -> Iterator[Table]:
    """Yields a row for each domain, mode of reading and model."""
    groups: dict[Row, list[Row]] = defaultdict(list)
    for model in models:
        gaps = {
            tuple(gap[key] for key in _MODE): gap["nll"]
            for gap in _differences(model, "text", "domains")
        }
        for entry in model["suites"]["text"]["domains"]:
            bits = entry["bits_per_byte"]
            groups[entry["domain"], _mode_name(entry)].append(
                (
                    model["label"],
                    f"{entry['tokens']:,}",
                    f"{entry['perplexity']:.3f}",
                    "" if bits is None else f"{bits:.4f}",
                    _difference(gaps.get(tuple(entry[key] for key in _MODE))),
                    amount(model["bytes"]),
                )
            )
    rows = [(*group, *cells) for group, entries in groups.items() for cells in entries]
    header = ("domain", "read", "model", "tokens", "perplexity", "bits/byte", "more nats", "size")
    title = f"Texts; more nats per token than {models[0]['label']}, with their 95 % interval"
    yield Table(title, header, rows, header[3:])


def _mode_name(entry: Result) -> str:
    if entry["context"] is None:
        return "continuous"
    if entry["stride"] is None:
        return f"chunks of {entry['context']}"
    return f"{entry['context']}, stride {entry['stride']}"


def memory_tables(models: Models) -> Iterator[Table]:
    """Yields a table for each task: a row for each model, columns for distances.

    A star marks a significant difference to the first model: p below 0.05.
    """
    for index, first in enumerate(models[0]["suites"]["memory"]["tasks"]):
        count = len(first["points"])
        # Every other distance has a column, if they are many.
        columns = range(count) if count <= _COLUMNS else range((count - 1) % 2, count, 2)
        rows: list[Row] = []
        for model in models:
            curve = model["suites"]["memory"]["tasks"][index]
            differing = {
                point["distance"]
                for point in _differences(model, "memory", "points")
                if point["task"] == curve["task"] and _is_significant(point["p"])
            }
            points = [curve["points"][column] for column in columns]
            cells = [f"{p['value']:.2f}{'*' * (p['distance'] in differing)}" for p in points]
            rows.append((model["label"], *cells, _half(curve)))
        title = (
            f"Memory, {first['task']}: right answers after so many tokens; "
            f"{first['chance']:.2f} by chance; * differs from {models[0]['label']} (p < 0.05)"
        )
        distances = [f"{first['points'][column]['distance']:,}" for column in columns]
        header = ("model", *distances, "half at")
        yield Table(title, header, rows, header[1:])


def _half(curve: Result) -> str:
    if curve["half"] is not None:
        return f"{curve['half']:,.0f}"
    return "at chance" if curve["points"][0]["low"] <= curve["chance"] else "beyond"


def noise_tables(models: Models) -> Iterator[Table]:
    """Yields a row for each kind of noise, two columns for each model."""
    rows: list[Row] = []
    for index, first in enumerate(models[0]["suites"]["noise"]["noises"]):
        cells = []
        for model in models:
            entry = model["suites"]["noise"]["noises"][index]
            cells += [_difference(entry["more"]), f"{100 * entry['flips']['value']:.1f} %"]
        if first["noise"] != "none":
            rows.append((first["noise"], *cells))
    columns = [f"{model['label']}{end}" for model in models for end in (", nats", ", flips")]
    title = "Noise: more nats per token than after a clean text, and other likeliest tokens"
    yield Table(title, ("noise", *columns), rows, columns)


def window_tables(models: Models) -> Iterator[Table]:
    """Yields loss, state and speed by window; then tables of memory, a row for each window."""
    rows = [
        (
            model["label"],
            f"{row['window']:,}",
            f"{row['all_texts']['perplexity']:.3f}",
            _difference(row["all_texts_above_full"]),
            amount(row["state_bytes"]),
            f"{1000 * row['step_seconds']:.2f}",
        )
        for model in models
        for row in model["suites"]["window"]["windows"]
    ]
    header = ("model", "window", "perplexity", "more nats", "state", "ms/token")
    title = "Windows: perplexity of all texts, nats above the full window, state, time of a step"
    yield Table(title, header, rows, header[1:])
    for model in models:
        yield from memory_tables(by_window(model))


def by_window(model: Result) -> list[Result]:
    """Returns the figures of a model's windows in the form of several models' figures."""
    return [
        {
            "label": f"{model['label']}, {row['window']:,}",
            "suites": {"memory": row["memory"]},
            "differences": {"memory": row["memory_above_full"]},
        }
        for row in model["suites"]["window"]["windows"]
    ]


def length_tables(models: Models) -> Iterator[Table]:
    """Yields losses and states, then speeds, a row for each model and mark."""
    losses: list[Row] = []
    speeds: list[Row] = []
    turns: list[Row] = []
    for model in models:
        gaps = {gap["to"]: gap for gap in _differences(model, "length", "points")}
        figures = model["suites"]["length"]
        for point in figures["points"]:
            names = (model["label"], f"{point['to']:,}")
            losses.append((*names, *_loss_cells(point, gaps.get(point["to"]))))
            speeds.append((*names, *_speed_cells(point)))
        if times := figures["turns"]:
            milliseconds = [f"{1000 * seconds:.3f}" for seconds in times["step_seconds"]]
            turns.append((model["label"], *milliseconds, f"{times['ratio']:.3f}"))
            ends = [f"ms at {position:,}" for position in times["positions"]]
    first = models[0]["label"]
    title = (
        f"Length: loss since the line above, and beside {first}; how far recurrent states are off "
        f"from those of {first}, in parts of a layer's largest value"
    )
    header: Row = ("model", "tokens", "nats", "more nats", "states off", "largest norm")
    yield Table(title, header, losses, header[1:])
    header = ("model", "tokens", "prefill tokens/s", "ms/token", "memory")
    yield Table("Length: speed and memory", header, speeds, header[1:])
    if turns:
        header = ("model", *ends, "ratio")
        yield Table("A step at both ends, timed in turns", header, turns, header[1:])


def _loss_cells(point: Result, gap: Result | None) -> Row:
    states = gap and gap["states"]
    return (
        f"{point['nll'][0]:.4f}",
        _difference(gap and gap["nll"]),
        "" if states is None else f"{states:.1e}",
        f"{max(point['norms'].values()):.3g}" if point["norms"] else "",
    )


def _speed_cells(point: Result) -> Row:
    return (
        f"{point['prefill_tokens_per_second']:,.0f}",
        f"{1000 * point['step_seconds']:.2f}",
        "" if point["rss_bytes"] is None else amount(point["rss_bytes"]),
    )


def tasks_tables(models: Models) -> Iterator[Table]:
    """Yields a row for each figure of a task or a group, and one for the tokens that were read."""
    rows: list[Row] = []
    for index, first in enumerate(models[0]["suites"]["tasks"]["tasks"]):
        entries = [model["suites"]["tasks"]["tasks"][index] for model in models]
        for metric, figure in enumerate(first["metrics"]):
            count = "" if figure["count"] is None else f"{figure['count']:,}"
            cells = [
                _figure(entry["metrics"][metric], model, entry["task"])
                for entry, model in zip(entries, models, strict=True)
            ]
            rows.append((first["task"], figure["metric"], count, *cells))
        if first["tokens"]:
            cells = ["{:,} of {:,}".format(*entry["tokens"]) for entry in entries]
            rows.append((first["task"], "tokens read", "", *cells))
    labels = [model["label"] for model in models]
    title = (
        "Tasks of lm_eval, with their 95 % interval; of their tokens, those that begin alike are "
        f"read once; * differs from {labels[0]} (p < 0.05)"
    )
    header = ("task", "figure", "examples", *labels)
    yield Table(title, header, rows, header[2:])


def _figure(figure: Result, model: Result, task: str) -> str:
    if figure["value"] is None:
        return "unknown"
    significant = any(
        _is_significant(gap["p"])
        for gap in _differences(model, "tasks", "metrics")
        if (gap["task"], gap["metric"]) == (task, figure["metric"])
    )
    known = figure["low"] is not None and figure["high"] is not None
    error = f" ± {_short((figure['high'] - figure['low']) / 2)}" if known else ""
    return f"{_short(figure['value'])}{error}{'*' * significant}"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


TABLES: dict[str, Callable[[Models], Iterator[Table]]] = {
    "text": text_tables,
    "memory": memory_tables,
    "noise": noise_tables,
    "window": window_tables,
    "length": length_tables,
    "tasks": tasks_tables,
}
"""Suite → its tables."""
