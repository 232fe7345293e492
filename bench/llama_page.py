"""Writes the results of `bench.llama` as a page in Markdown."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rgexport.reporting.tables import markdown

Result = dict[str, Any]

NAMES = {
    "recurrent": "RecurrentGemma 2B",
    "transformer": "Gemma 2B's shape",
}


def write_page(result: Result, folder: Path) -> None:
    """Writes the page into a folder."""
    (folder / "llama_cpp.md").write_text(page(result))


def page(result: Result) -> str:
    """The page, in Markdown."""
    return TEXT.format(
        cpu=result["environment"]["cpu"],
        machine=_machine(result),
        decode=_decode(result),
        depths=_depths(result),
        even=_even(result),
        tokens=_first(result, "recurrent")["n_gen"],
        rounds=len(result["decode"]),
    )


TEXT = """# Speed in llama.cpp: {cpu}

{machine}

Two models of about the same size, with random weights and all matrices in Q4_0: RecurrentGemma 2B
as `rgexport gguf --type q4_0 --pure` writes it, and a transformer of Gemma 2B's shape. Speed
does not depend on the values of the weights. Both run in stock `llama-bench`, built from the
patched tree, {tokens} tokens at a time. The memory's read speed is measured before and after each
run; the shares compare medians of the same minutes.

## Decoding

{decode}

The figures are medians of {rounds} rounds; in each, all candidates are timed once. The last row is
the same file through `rgexport bench`, with the read speed that it measured itself.

## Long contexts

Tokens per second after so many other tokens, the peak memory of the process, and the memory's read
speed in those minutes. Both models run in the same library with llama-bench's settings, from states
that `bench/any_gguf.py` computed once from random tokens. At a depth marked as *doubled*, the
transformer's cache holds the tokens of half the depth twice, because processing a prompt of the
full length would take too long.

{depths}

The weights of both lie in huge pages here. At depth 0, RecurrentGemma reads {even:.2f} times as
many bytes per second as the transformer.

RecurrentGemma's state does not grow beyond its window of 2,048 tokens. The transformer reads the
keys and values of all earlier tokens again for each new one.
"""


def _machine(result: Result) -> str:
    found, build = result["environment"], _first(result, "recurrent")["build_commit"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("rgexport", "numpy"))
    busy = ", ".join(f"{load:.1f}" for load in result["load_average"])
    return (
        f"Measured on {found['cpu']}, {result['threads']} threads; {found['system']}; llama.cpp "
        f"{build} with rgexport's patch; {versions}. Load averages at the start (1, 5, 15 "
        f"minutes): {busy}."
    )


def _first(result: Result, model: str) -> dict[str, Any]:
    return dict(result["decode"][0][model])


def _decode(result: Result) -> str:
    rounds = result["decode"]
    reads, small = (_median(rounds, kind) for kind in ("huge_pages", "small_pages"))
    rates = {name: _rate(rounds, name) for name in NAMES}
    sizes = {name: _first(result, name)["model_size"] for name in NAMES}
    flows = {name: rates[name] * sizes[name] for name in NAMES}
    rows = [
        (
            NAMES[name],
            f"{sizes[name] / 1e9:.3f} GB",
            f"{rates[name]:.2f}",
            f"{flows[name] / 1e9:.1f} GB/s",
            f"{flows[name] / reads:.3f}",
            f"{flows[name] / small:.3f}",
            f"{flows[name] / flows['transformer']:.3f}",
        )
        for name in NAMES
    ]
    rows.append(_session(rounds, small, flows["transformer"]))
    header = (
        *("", "weights", "tokens/s", "bytes/s", "share, huge pages", "share, 4 kB pages"),
        "relative to the transformer",
    )
    return f"""{markdown(header, rows)}

The shares compare a model's bytes per second with the memory's read speed:
{reads / 1e9:.1f} GB/s in huge pages
and {small / 1e9:.1f} GB/s in pages of 4 kB. Stock llama.cpp maps the weights in pages
of 4 kB; `rgexport bench` asks the operating system to move them into huge pages."""


def _median(rounds: Sequence[Result], kind: str) -> float:
    return median(speed for entry in rounds for speed in entry[kind])


def _session(rounds: Sequence[Result], small: float, transformer: float) -> tuple[str, ...]:
    rows = [entry["session"] for entry in rounds]
    size, rate = rows[0]["bytes_per_token"], median(row["tokens_per_second"] for row in rows)
    share = median(row["roofline_share"] for row in rows)
    return (
        "RecurrentGemma 2B, `rgexport bench`",
        f"{size / 1e9:.3f} GB",
        f"{rate:.2f}",
        f"{rate * size / 1e9:.1f} GB/s",
        f"{share:.3f}",
        f"{rate * size / small:.3f}",
        f"{rate * size / transformer:.3f}",
    )


def _rate(entries: Sequence[Result], model: str) -> float:
    return median(rate for entry in entries for rate in entry[model]["samples_ts"])


def _depths(result: Result) -> str:
    rows = [
        (
            f"{entries[0]['depth']:,}",
            *map(_rate_at, entries),
            *(f"{entry['peak_rss_bytes'] / 1e9:.2f} GB" for entry in entries),
            *(f"{entry['roofline_bytes_per_second'] / 1e9:.1f} GB/s" for entry in entries),
        )
        for entries in zip(*(result["depths"][name] for name in NAMES), strict=True)
    ]
    kinds = "tokens/s", "peak memory", "read speed"
    return markdown(
        ("depth", *(f"{name}: {kind}" for kind in kinds for name in NAMES.values())), rows
    )


def _even(result: Result) -> float:
    """Bytes per second at the first depth, as a share of the transformer's."""
    first = (result["depths"][name][0] for name in NAMES)
    ours, theirs = (row["tokens_per_second"] * row["bytes_per_token"] for row in first)
    return float(ours / theirs)


def _rate_at(row: Result) -> str:
    mark = "" if row["state"] == "processed" else f" ({row['state']})"
    return f"{row['tokens_per_second']:.2f} ± {row['deviation']:.2f}{mark}"
