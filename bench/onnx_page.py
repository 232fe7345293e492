"""Writes the results of `bench.onnx` as a page in Markdown."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.onnx_models import STORAGES
from bench.run import DEPTH
from rgexport.reporting.tables import markdown

Result = dict[str, Any]
READS = "numpy", "c", "weights"

TEXT = """# Speed of the ONNX kernels: {cpu}

An ONNX artifact runs in stock ONNX Runtime. Where the
native kernels are built, the same file runs faster; `--no-native`
turns them off. This page compares the two with each other and with other engines.

- **native** is ONNX Runtime with the native kernels, **stock** is ONNX Runtime alone.
- **llama.cpp** runs a transformer of Gemma 2B's shape in Q4_0, since stock llama.cpp cannot run
  RecurrentGemma.
- All models have random weights; speed does not depend on their values.
- In each round every candidate is timed once. The tables show medians over the rounds, so a machine
  that slows down affects all candidates alike.

{sections}"""


def write_page(results: dict[str, Result], folder: Path) -> None:
    """Writes the page, from part → what was found, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "onnx.md").write_text(page(results))


def page(results: dict[str, Result]) -> str:
    """The page, in Markdown; it has the parts that there are."""
    sections = (
        "\n\n".join([TITLES[part], *PARTS[part](found["found"]), _machine(found)])
        for part, found in results.items()
    )
    cpu = next(iter(results.values()))["environment"]["cpu"]
    return TEXT.format(cpu=cpu, sections="\n\n".join(sections)) + "\n"


def _machine(result: Result) -> str:
    found = result["environment"]
    names = "rgexport", "onnxruntime", "numpy", "torch"
    versions = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    busy = ", ".join(f"{load:.1f}" for load in result["load_average"])
    threads = result["found"].get("threads", found["cores"])
    return (
        f"Measured on {found['cpu']}, {threads} threads; {found['system']}; {versions}. "
        f"Load averages at the start (1, 5, 15 minutes): {busy}."
    )


def _decode(result: Result) -> Iterator[str]:
    yield (
        f"Tokens per second after {DEPTH:,} others, from a state of random numbers; llama.cpp's "
        "are the first ones of a text."
    )
    header = "2B in", "native", "stock", "native / stock", "llama.cpp", "native / llama.cpp"
    yield markdown(header, [_rate_row(name, found, 2) for name, found in result["models"].items()])
    yield (
        "One token reads all weights and states once, so memory bandwidth is the limit. The shares "
        "compare the bytes that a model reads per second with the memory's read speed, which is "
        "measured between the turns in three ways, all in huge pages: by numpy, by "
        "`bench/read_speed.c` (C), and by the same program on the pages that hold the model's "
        "weights (same pages). A column names the candidate and the way of reading. Bandwidth "
        "differs between pages, on virtual machines by 10 % and more."
    )
    header = (
        *("2B in", "weights", "native: numpy", "native: C", "native: same pages"),
        *("stock: numpy", "memory", "size on disk"),
    )
    yield markdown(header, [_share_row(name, found) for name, found in result["models"].items()])
    yield _beside(result)


def _share_row(name: str, found: Result) -> tuple[str, ...]:
    rates, native = _rates(found), found["facts"]["native"]
    size = native["weight_bytes"] + native["state_bytes"]
    reads = {kind: median(v for entry in found["rounds"] for v in entry[kind]) for kind in READS}
    return (
        STORAGES[name].label,
        _gigabytes(native["weight_bytes"]),
        *(f"{rates['native'] * size / speed:.3f}" for speed in reads.values()),
        f"{rates['stock'] * size / reads['numpy']:.3f}",
        _gigabytes(max(entry["native"]["rss"] for entry in found["rounds"])),
        _gigabytes(found["artifact_bytes"]),
    )


def _prefill(result: Result) -> Iterator[str]:
    length = result["test"].removeprefix("pp")
    yield (
        f"Tokens per second of a prompt of {length} tokens. llama.cpp processes it in one batch "
        "(`-ub 512`)."
    )
    header = "2B in", "native", "stock", "native / stock", "llama.cpp", "native / llama.cpp"
    yield markdown(header, [_rate_row(name, found, 1) for name, found in result["models"].items()])
    yield _beside(result)


def _rate_row(name: str, found: Result, digits: int) -> tuple[str, ...]:
    rates = _rates(found)
    return (
        STORAGES[name].label,
        *(f"{rates[kernels]:.{digits}f}" for kernels in ("native", "stock")),
        f"{rates['native'] / rates['stock']:.2f}",
        f"{rates['llama']:.{digits}f}",
        f"{rates['native'] / rates['llama']:.2f}",
    )


def _rates(found: Result) -> dict[str, float]:
    rounds = found["rounds"]
    rates = {kind: median(entry[kind]["rate"] for entry in rounds) for kind in found["facts"]}
    return rates | {"llama": median(r for entry in rounds for r in entry["llama"]["samples_ts"])}


def _beside(result: Result) -> str:
    """Which kernels and which llama.cpp were compared."""
    found = next(iter(result["models"].values()))
    llama = found["rounds"][0]["llama"]
    return (
        f"Kernels: {found['facts']['native']['kernels']}; stock: "
        f"{found['facts']['stock']['engine']}. llama.cpp {llama['build_commit']}: "
        f"{llama['model_type']}, {_gigabytes(llama['model_size'])}. {len(found['rounds'])} rounds."
    )


def _op(result: Result) -> Iterator[str]:
    yield (
        f"One quantized linear layer for {result['tokens']} tokens, in G op/s. The oneDNN column "
        "is the plain int8 matrix product of torch (int8 inputs, int32 result, no scales), with "
        "the weight laid out by rows or by columns, whichever is faster."
    )
    header = (
        *("inputs × outputs", "oneDNN int8", "stored as", "native", "native / oneDNN"),
        *("native / block 128", "stock", "native / stock"),
    )
    yield markdown(header, [row for shape in result["shapes"] for row in _op_rows(shape)])


def _op_rows(shape: Result) -> Iterator[tuple[str, ...]]:
    rates = {name: median(found) for name, found in shape["rates"].items()}
    onednn = max(rate for name, rate in rates.items() if name.startswith("oneDNN"))
    for name, storage in STORAGES.items():
        native, stock = rates[f"{name} native"], rates[f"{name} stock"]
        wide = rates[f"{name.split('-')[0]}-128 native"] if storage.block != 128 else native
        yield (
            f"{shape['inputs']:,} × {shape['outputs']:,}",
            f"{onednn / 1e9:,.0f}",
            storage.label,
            f"{native / 1e9:,.0f}",
            f"{native / onednn:.2f}",
            f"{native / wide:.2f}",
            f"{stock / 1e9:,.0f}",
            f"{native / stock:.2f}",
        )


def _depth(result: Result) -> Iterator[str]:
    yield (
        "Single tokens at several depths, that is, after so many other tokens; the depths take "
        "turns. The time is that of the median repetition, relative to the first row. Attention "
        "costs more up to its window (2,048 tokens in a 2B); from there on nothing grows."
    )
    names = {"demo": "The demo model, after tokens that it processed:"}
    names["2b"] = f"A 2B in {result['label']}, starting from a state of random numbers:"
    for name, title in names.items():
        rows = [
            (
                f"{row['depth']:,}",
                f"{row['median_tokens_per_second']:.1f}",
                f"{row['time_ratio']:.3f}",
                f"{row['rss_bytes'] / 1e6:,.0f} MB",
                f"{row['roofline_share']:.3f}",
            )
            for row in result[name]
        ]
        yield title
        yield markdown(("depth", "tokens/s", "relative time", "memory", "share, numpy"), rows)
        yield _far(result[name])


def _far(rows: Sequence[Result]) -> str:
    """The deepest row beside the one at 4,096."""
    by_depth = {row["depth"]: row for row in rows}
    near, far = by_depth[4096], rows[-1]
    time = near["median_tokens_per_second"] / far["median_tokens_per_second"]
    growth = (far["rss_bytes"] - near["rss_bytes"]) / 1e6
    return (
        f"At depth {far['depth']:,} a token takes {time:.3f} times as long as at 4,096, and "
        f"memory changes by {growth:+.1f} MB. Kernels: {far['kernels']}."
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


PARTS: dict[str, Callable[[Result], Iterator[str]]] = {
    "decode": _decode,
    "prefill": _prefill,
    "op": _op,
    "depth": _depth,
}
TITLES = {
    "decode": "## Decoding",
    "prefill": "## Prompt processing",
    "op": "## The quantized linear layer alone",
    "depth": "## Long contexts",
}
