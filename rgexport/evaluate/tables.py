"""The figures of suites as tables."""

from collections.abc import Iterator, Sequence

from rgexport.evaluate.pieces import Result
from rgexport.progress import amount
from rgexport.tables import Row, Table


def text_table(models: Sequence[Result]) -> Table:
    rows: list[Row] = []
    for model in models:
        for entry in model["suites"]["text"]["domains"]:
            bits = entry["bits_per_byte"]
            gap = _gap_of(model, entry)
            way = "continuous" if entry["context"] is None else f"chunks of {entry['context']}"
            rows.append(
                (
                    model["label"],
                    entry["domain"],
                    way,
                    f"{entry['tokens']:,}",
                    f"{entry['perplexity']:.3f}",
                    "" if bits is None else f"{bits:.4f}",
                    "" if gap is None else _with_error(gap),
                    amount(model["bytes"]),
                )
            )
    header = ("model", "domain", "read", "tokens", "perplexity", "bits/byte", "more nats", "size")
    title = f"Texts; more nats per token than {models[0]['label']}, with their 95 % interval"
    return Table(title, header, rows, header[3:])


def _gap_of(model: Result, entry: Result) -> Result | None:
    """The difference to the first model in a row of the table."""
    place = entry["domain"], entry["context"]
    gaps = model.get("differences", {}).get("text", {"domains": []})["domains"]
    return next((gap["nll"] for gap in gaps if (gap["domain"], gap["context"]) == place), None)


def _with_error(gap: Result) -> str:
    error = "" if gap["high"] is None else f" ± {gap['high'] - gap['value']:.4f}"
    return f"{gap['value']:+.4f}{error}"


def memory_tables(models: Sequence[Result]) -> Iterator[Table]:
    """A table for each task: a row for each model, a column for each distance.

    A star marks what differs from the first model by more than chance: p below 0.05.
    """
    for index, first in enumerate(models[0]["suites"]["memory"]["tasks"]):
        distances = [f"{point['distance']:,}" for point in first["points"]]
        rows: list[Row] = []
        for model in models:
            one = model["suites"]["memory"]["tasks"][index]
            sure = _differing(model, one["task"])
            cells = [f"{p['value']:.2f}{'*' * (p['distance'] in sure)}" for p in one["points"]]
            rows.append((model["label"], *cells, _half(one)))
        title = (
            f"Memory, {first['task']}: right answers after so many tokens; "
            f"{first['chance']:.2f} by chance; * differs from {models[0]['label']} (p < 0.05)"
        )
        header = ("model", *distances, "half at")
        yield Table(title, header, rows, header[1:])


def _half(one: Result) -> str:
    if one["half"] is not None:
        return f"{one['half']:,.0f}"
    return "at chance" if one["points"][0]["low"] <= one["chance"] else "beyond"


def _differing(model: Result, task: str) -> set[int]:
    """The distances at which a model differs from the first one."""
    points = model.get("differences", {}).get("memory", {"points": []})["points"]
    own = (point for point in points if point["task"] == task)
    return {point["distance"] for point in own if point["p"] is not None and point["p"] < 0.05}


def noise_table(models: Sequence[Result]) -> Table:
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
    return Table(title, ("noise", *columns), rows, columns)
