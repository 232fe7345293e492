"""The figures of suites as tables."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from rgexport.evaluate.pieces import Result
from rgexport.tables import Row, Table
from rgexport.units import amount

_COLUMNS = 10
"""Most distances in a table of `memory`: ten are as wide as a terminal."""


def text_tables(models: Sequence[Result]) -> Iterator[Table]:
    """A row for each domain, way of reading and model."""
    entries: dict[Row, list[tuple[Result, Result]]] = defaultdict(list)
    for model in models:
        for entry in model["suites"]["text"]["domains"]:
            entries[entry["domain"], _way(entry)].append((model, entry))
    rows = [
        (*place, model["label"], *_text_cells(model, entry))
        for place, alike in entries.items()
        for model, entry in alike
    ]
    header = ("domain", "read", "model", "tokens", "perplexity", "bits/byte", "more nats", "size")
    title = f"Texts; more nats per token than {models[0]['label']}, with their 95 % interval"
    yield Table(title, header, rows, header[3:])


def _text_cells(model: Result, entry: Result) -> Row:
    bits, gap = entry["bits_per_byte"], _gap_of(model, entry)
    return (
        f"{entry['tokens']:,}",
        f"{entry['perplexity']:.3f}",
        "" if bits is None else f"{bits:.4f}",
        "" if gap is None else _with_error(gap),
        amount(model["bytes"]),
    )


def _gap_of(model: Result, entry: Result) -> Result | None:
    """The difference to the first model in a row of the table."""
    gaps = model.get("differences", {}).get("text", {"domains": []})["domains"]
    same = (gap for gap in gaps if all(gap[key] == entry[key] for key in _PLACE))
    return next((gap["nll"] for gap in same), None)


_PLACE = "domain", "context", "stride"


def _way(entry: Result) -> str:
    if entry["context"] is None:
        return "continuous"
    if entry["stride"] is None:
        return f"chunks of {entry['context']}"
    return f"{entry['context']}, stride {entry['stride']}"


def _with_error(gap: Result) -> str:
    error = "" if gap["high"] is None else f" ± {gap['high'] - gap['value']:.4f}"
    return f"{gap['value']:+.4f}{error}"


def memory_tables(models: Sequence[Result]) -> Iterator[Table]:
    """A table for each task: a row for each model, columns for distances.

    A star marks what differs from the first model by more than chance: p below 0.05.
    """
    for index, first in enumerate(models[0]["suites"]["memory"]["tasks"]):
        shown = _shown(len(first["points"]))
        distances = [f"{first['points'][place]['distance']:,}" for place in shown]
        rows: list[Row] = []
        for model in models:
            one = model["suites"]["memory"]["tasks"][index]
            sure = _differing(model, one["task"])
            points = [one["points"][place] for place in shown]
            cells = [f"{p['value']:.2f}{'*' * (p['distance'] in sure)}" for p in points]
            rows.append((model["label"], *cells, _half(one)))
        title = (
            f"Memory, {first['task']}: right answers after so many tokens; "
            f"{first['chance']:.2f} by chance; * differs from {models[0]['label']} (p < 0.05)"
        )
        header = ("model", *distances, "half at")
        yield Table(title, header, rows, header[1:])


def _shown(count: int) -> range:
    """Places of the distances that have a column: every other one where they are many."""
    return range(count) if count <= _COLUMNS else range((count - 1) % 2, count, 2)


def _half(one: Result) -> str:
    if one["half"] is not None:
        return f"{one['half']:,.0f}"
    return "at chance" if one["points"][0]["low"] <= one["chance"] else "beyond"


def _differing(model: Result, task: str) -> set[int]:
    """The distances at which a model differs from the first one."""
    points = model.get("differences", {}).get("memory", {"points": []})["points"]
    own = (point for point in points if point["task"] == task)
    return {point["distance"] for point in own if point["p"] is not None and point["p"] < 0.05}


def noise_tables(models: Sequence[Result]) -> Iterator[Table]:
    """A row for each kind of noise, two columns for each model."""
    rows: list[Row] = []
    for index, first in enumerate(models[0]["suites"]["noise"]["noises"]):
        cells = []
        for model in models:
            one = model["suites"]["noise"]["noises"][index]
            cells += [_with_error(one["more"]), f"{100 * one['flips']['value']:.1f} %"]
        if first["noise"] != "none":
            rows.append((first["noise"], *cells))
    columns = [f"{model['label']}{end}" for model in models for end in (", nats", ", flips")]
    title = "Noise: more nats per token than after a clean text, and other likeliest tokens"
    yield Table(title, ("noise", *columns), rows, columns)


def window_tables(models: Sequence[Result]) -> Iterator[Table]:
    """Loss, state and speed by window; then tables of memory, a row for each window."""
    rows = [
        (
            model["label"],
            f"{row['window']:,}",
            f"{row['all_texts']['perplexity']:.3f}",
            _with_error(row["all_texts_above_full"]),
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
    """A model's windows as models that are compared with the full one."""
    return [
        {
            "label": f"{model['label']}, {row['window']:,}",
            "suites": {"memory": row["memory"]},
            "differences": {"memory": row["memory_above_full"]},
        }
        for row in model["suites"]["window"]["windows"]
    ]


def length_tables(models: Sequence[Result]) -> Iterator[Table]:
    """Losses and states, then speeds, a row for each model and mark."""
    first = models[0]["label"]
    title = (
        f"Length: loss since the line above, and beside {first}; how far recurrent states are off "
        f"from those of {first}, in parts of a layer's largest value"
    )
    header = ("model", "tokens", "nats", "more nats", "states off", "largest norm")
    yield Table(title, header, _each_mark(models, _loss_cells), header[1:])
    speeds = ("model", "tokens", "prefill tokens/s", "ms/token", "memory")
    yield Table("Length: speed and memory", speeds, _each_mark(models, _speed_cells), speeds[1:])
    if turns := [model for model in models if model["suites"]["length"]["turns"]]:
        yield _turns(turns)


Cells = Callable[[Result, Result | None], Row]
"""Of a mark, and of the difference to the first model there."""


def _each_mark(models: Sequence[Result], cells: Cells) -> list[Row]:
    rows = []
    for model in models:
        gaps = model.get("differences", {}).get("length", {"points": []})["points"]
        by_mark = {gap["to"]: gap for gap in gaps}
        for point in model["suites"]["length"]["points"]:
            mark = point["to"]
            rows.append((model["label"], f"{mark:,}", *cells(point, by_mark.get(mark))))
    return rows


def _loss_cells(point: Result, gap: Result | None) -> Row:
    apart = gap and gap["states"]
    return (
        f"{point['nll'][0]:.4f}",
        _with_error(gap["nll"]) if gap else "",
        "" if apart is None else f"{apart:.1e}",
        f"{max(point['norms'].values()):.3g}" if point["norms"] else "",
    )


def _speed_cells(point: Result, gap: Result | None) -> Row:
    return (
        f"{point['prefill_tokens_per_second']:,.0f}",
        f"{1000 * point['step_seconds']:.2f}",
        "" if point["rss_bytes"] is None else amount(point["rss_bytes"]),
    )


def _turns(models: Sequence[Result]) -> Table:
    rows = []
    for model in models:
        found = model["suites"]["length"]["turns"]
        each = [f"{1000 * seconds:.3f}" for seconds in found["step_seconds"]]
        rows.append((model["label"], *each, f"{found['ratio']:.3f}"))
    ends = models[0]["suites"]["length"]["turns"]["positions"]
    header = ("model", *(f"ms at {end:,}" for end in ends), "ratio")
    return Table("A step at both ends, timed in turns", header, rows, header[1:])


def tasks_tables(models: Sequence[Result]) -> Iterator[Table]:
    """A row for each figure of a task or a group, and one for the tokens that were read."""
    rows: list[Row] = []
    for index, first in enumerate(models[0]["suites"]["tasks"]["tasks"]):
        each = [model["suites"]["tasks"]["tasks"][index] for model in models]
        for place, figure in enumerate(first["metrics"]):
            count = "" if figure["count"] is None else f"{figure['count']:,}"
            cells = [
                _figure(one["metrics"][place], model, one["task"])
                for one, model in zip(each, models, strict=True)
            ]
            rows.append((first["task"], figure["metric"], count, *cells))
        if first["tokens"]:
            cells = ["{:,} of {:,}".format(*one["tokens"]) for one in each]
            rows.append((first["task"], "tokens read", "", *cells))
    labels = [model["label"] for model in models]
    title = (
        "Tasks of lm_eval, with their 95 % interval; of their tokens, those that begin alike are "
        f"read once; * differs from {labels[0]} (p < 0.05)"
    )
    header = ("task", "figure", "examples", *labels)
    yield Table(title, header, rows, header[2:])


def _figure(figure: Result, model: Result, task: str) -> str:
    gaps = model.get("differences", {}).get("tasks", {"metrics": []})["metrics"]
    own = (g["p"] for g in gaps if (g["task"], g["metric"]) == (task, figure["metric"]))
    p = next(own, None)
    if figure["value"] is None:
        return "unknown"
    known = figure["low"] is not None and figure["high"] is not None
    error = f" ± {_short((figure['high'] - figure['low']) / 2)}" if known else ""
    return f"{_short(figure['value'])}{error}{'*' * (p is not None and p < 0.05)}"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


TABLES: dict[str, Callable[[Sequence[Result]], Iterator[Table]]] = {
    "text": text_tables,
    "memory": memory_tables,
    "noise": noise_tables,
    "window": window_tables,
    "length": length_tables,
    "tasks": tasks_tables,
}
"""Suite → its tables."""
