"""From what `bench.onnx` found to `docs/onnx.md`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.onnx_models import STORAGES
from bench.run import DEPTH

Result = dict[str, Any]
READS = "numpy", "c", "weights"

TEXT = """# The native kernels: what they gain

<!-- Written by `make bench`; to change it, change bench/onnx_page.py. -->

An ONNX artifact of rgexport runs in stock ONNX Runtime. Where rgexport's own library of kernels is
built, sessions register it, and the same file runs faster; `--no-native` leaves it out. Here both
take turns, with each other and with what people would use instead. All are medians of rounds in
which each has its turn, so that a machine that slows down does so for all of them. The models are
of a 2B's shape with random weights: speed does not depend on them.

{sections}"""


def write_page(results: dict[str, Result], docs: Path) -> None:
    """Writes the page, from part → what was found, into the folder `docs`."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "onnx.md").write_text(page(results))


def page(results: dict[str, Result]) -> str:
    """The page, in Markdown; it has the parts that there are."""
    sections = (
        "\n\n".join([TITLES[part], *PARTS[part](found["found"]), _machine(found)])
        for part, found in results.items()
    )
    return TEXT.format(sections="\n\n".join(sections)) + "\n"


def _machine(result: Result) -> str:
    found = result["environment"]
    names = "rgexport", "onnxruntime", "numpy", "torch"
    versions = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    busy = ", ".join(f"{load:.1f}" for load in result["load_average"])
    threads = result["found"].get("threads", found["cores"])
    return (
        f"{found['cpu']}, {threads} threads; {found['system']}; {versions}. "
        f"Load of the machine at the start (1, 5, 15 minutes): {busy}."
    )


def _decode(result: Result) -> Iterator[str]:
    yield (
        f"A token reads all weights and states once, behind {DEPTH:,} others, whose state is made "
        "up (llama.cpp's begin a text). The shares are of the memory's read speed between the "
        "turns, by numpy and by `bench/read_speed.c`, both in huge pages. Memory is not equally "
        "fast everywhere, on virtual machines by a tenth and more, and who reads does not choose; "
        "so the C program also reads the very weights, where they lie in memory."
    )
    header = (
        *("2B in", "weights", "native", "stock", "native / stock", "Gemma 2B's shape, llama.cpp"),
        *("native / llama.cpp", "of numpy's reads", "of C's reads", "of C's, of the weights"),
        *("stock, of numpy's", "memory"),
    )
    yield _table(header, [_decode_row(name, found) for name, found in result["models"].items()])
    yield _beside(result)


def _decode_row(name: str, found: Result) -> tuple[str, ...]:
    rates, native = _rates(found), found["facts"]["native"]
    size = native["weight_bytes"] + native["state_bytes"]
    reads = {kind: median(v for entry in found["rounds"] for v in entry[kind]) for kind in READS}
    memory = max(entry["native"]["rss"] for entry in found["rounds"])
    return (
        STORAGES[name].label,
        _gigabytes(native["weight_bytes"]),
        *(f"{rates[kernels]:.2f} tok/s" for kernels in ("native", "stock")),
        f"{rates['native'] / rates['stock']:.2f}",
        f"{rates['llama']:.2f} tok/s",
        f"{rates['native'] / rates['llama']:.2f}",
        *(f"{rates['native'] * size / speed:.3f}" for speed in reads.values()),
        f"{rates['stock'] * size / reads['numpy']:.3f}",
        f"{_gigabytes(memory)} for {_gigabytes(found['artifact_bytes'])}",
    )


def _prefill(result: Result) -> Iterator[str]:
    length = result["test"].removeprefix("pp")
    yield f"A prompt of {length} tokens; llama.cpp takes it in one batch (`-ub 512`)."
    header = (
        *("2B in", "native", "stock", "native / stock"),
        *("Gemma 2B's shape, llama.cpp", "native / llama.cpp"),
    )
    rows = []
    for name, found in result["models"].items():
        rates = _rates(found)
        row = (
            STORAGES[name].label,
            *(f"{rates[kernels]:.1f} tok/s" for kernels in ("native", "stock")),
            f"{rates['native'] / rates['stock']:.2f}",
            f"{rates['llama']:.1f} tok/s",
            f"{rates['native'] / rates['llama']:.2f}",
        )
        rows.append(row)
    yield _table(header, rows)
    yield _beside(result)


def _rates(found: Result) -> dict[str, float]:
    rounds = found["rounds"]
    rates = {kind: median(entry[kind]["rate"] for entry in rounds) for kind in found["facts"]}
    return rates | {"llama": median(r for entry in rounds for r in entry["llama"]["samples_ts"])}


def _beside(result: Result) -> str:
    """Which kernels, and which llama.cpp."""
    found = next(iter(result["models"].values()))
    llama = found["rounds"][0]["llama"]
    return (
        f"Kernels: {found['facts']['native']['kernels']}, and those of "
        f"{found['facts']['stock']['engine']}. llama.cpp {llama['build_commit']}: "
        f"{llama['model_type']}, {_gigabytes(llama['model_size'])}; {len(found['rounds'])} rounds."
    )


def _op(result: Result) -> Iterator[str]:
    yield (
        f"One quantized linear for {result['tokens']} tokens, in G op/s, beside the int8 product "
        "that torch computes with oneDNN: int8 numbers into int32, without scales, its weight laid "
        "out by rows or by columns, whichever is faster."
    )
    header = (
        *("inputs × outputs", "oneDNN int8", "stored as", "native", "of oneDNN"),
        *("of block 128", "stock", "native / stock"),
    )
    yield _table(header, [row for shape in result["shapes"] for row in _op_rows(shape)])


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
        "Single tokens after so many others, all depths in turns; the time is that of the median "
        "repetition, as a multiple of the first row's. Up to the window, 2,048 tokens in a 2B, "
        "attention has ever more to look at; behind it, nothing grows."
    )
    names = {"demo": "The demo, after tokens that were processed:"}
    names["2b"] = f"A 2B in {result['label']}, behind a synthetic state of random numbers:"
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
        yield _table(("depth", "tokens/s", "time", "memory", "of numpy's reads"), rows)
        yield _far(result[name])


def _far(rows: Sequence[Result]) -> str:
    """The deepest row beside the one at 4,096."""
    by_depth = {row["depth"]: row for row in rows}
    near, far = by_depth[4096], rows[-1]
    time = near["median_tokens_per_second"] / far["median_tokens_per_second"]
    growth = (far["rss_bytes"] - near["rss_bytes"]) / 1e6
    return (
        f"At depth {far['depth']:,} a token takes {time:.3f} times as long as at 4,096, and the "
        f"process holds {growth:+.1f} MB. Kernels: {far['kernels']}."
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PARTS: dict[str, Callable[[Result], Iterator[str]]] = {
    "decode": _decode,
    "prefill": _prefill,
    "op": _op,
    "depth": _depth,
}
TITLES = {
    "decode": "## One token after another",
    "prefill": "## A prompt",
    "op": "## The op alone",
    "depth": "## After many tokens",
}
