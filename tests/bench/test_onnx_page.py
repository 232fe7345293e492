"""The arithmetic of the page about the native kernels."""

import pytest

from bench.onnx_page import page, write_page
from rgexport.runtimes.environment import environment

SIZES = {"weight_bytes": 1.9e9, "state_bytes": 1e8}
FACTS = {
    "native": {"kernels": "native avx2", "engine": "onnxruntime 1.0", **SIZES},
    "stock": {"kernels": "stock", "engine": "onnxruntime 1.0", **SIZES},
}
LLAMA = {"build_commit": "abc1234", "model_type": "gemma 2B Q4_0", "model_size": 1.4e9}


def turn(native: float, stock: float, llama: float, numpy: float, c: float) -> dict:
    return {
        "native": {"rate": native, "rss": 2.25e9},
        "stock": {"rate": stock, "rss": 3e9},
        "llama": {"samples_ts": [llama], **LLAMA},
        "numpy": [numpy, numpy],
        "c": [c],
        "weights": [c / 2],
    }


def turns(test: str) -> dict:
    rounds = [turn(9, 5, 4, 20e9, 25e9), turn(10, 6, 5, 20e9, 25e9), turn(30, 7, 6, 60e9, 25e9)]
    model = {"artifact_bytes": 2.1e9, "facts": FACTS, "rounds": rounds}
    return {"test": test, "threads": 2, "models": {"int4-32": model}}


def op() -> dict:
    rates = {"oneDNN rows": [1e12, 2e12], "oneDNN columns": [1e12, 1e12]}
    for name, native in {"int4-128": 1.2e12, "int4-32": 0.9e12, "int8": 0.75e12}.items():
        rates |= {f"{name} native": [native, native], f"{name} stock": [6e11, 6e11]}
    return {
        "tokens": 512,
        "threads": 2,
        "shapes": [{"inputs": 2560, "outputs": 64, "rates": rates}],
    }


def row(depth: int, rate: float, ratio: float, rss: float) -> dict:
    return {
        "depth": depth,
        "median_tokens_per_second": rate,
        "time_ratio": ratio,
        "rss_bytes": rss,
        "roofline_share": 0.875,
        "kernels": "native avx2",
    }


def depth() -> dict:
    rows = [row(0, 50, 1, 100e6), row(4096, 41, 1.25, 103e6), row(131072, 40, 1.275, 104.5e6)]
    return {"demo": rows, "2b": rows, "label": "int4, block 128"}


def result(found: dict) -> dict:
    return {"environment": environment(), "load_average": [0.1, 0.2, 0.3], "found": found}


@pytest.fixture
def results() -> dict:
    parts = {"decode": turns("tg32"), "prefill": turns("pp512"), "op": op(), "depth": depth()}
    return {part: result(found) for part, found in parts.items()}


def table_rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def rows(text: str) -> dict[str, list[str]]:
    return {first: rest for first, *rest in table_rows(text)}


def test_decode(results):
    found = table_rows(page({"decode": results["decode"]}))
    # medians: 10, 6 and 5 tokens a second of 2 GB with states, of 20 GB/s and 25 GB/s
    assert [rest for first, *rest in found if first == "int4, block 32"] == [
        ["10.00", "6.00", "1.67", "5.00", "2.00"],
        ["1.90 GB", "1.000", "0.800", "1.600", "0.600", "2.25 GB", "2.10 GB"],
    ]


def test_prefill(results):
    text = page({"prefill": results["prefill"]})
    assert rows(text)["int4, block 32"] == [
        *("10.0", "6.0", "1.67", "5.0", "2.00"),
    ]
    assert "a prompt of 512 tokens" in text


def test_op(results):
    lines = [
        line for line in page({"op": results["op"]}).splitlines() if line.startswith("| 2,560")
    ]
    # of the better layout's 1,500 G op/s
    assert [line.strip("| ").split(" | ")[1:] for line in lines] == [
        ["1,500", "int4, block 128", "1,200", "0.80", "1.00", "600", "2.00"],
        ["1,500", "int4, block 32", "900", "0.60", "0.75", "600", "1.50"],
        ["1,500", "int8, block 128", "750", "0.50", "1.00", "600", "1.25"],
    ]


def test_depth(results):
    text = page({"depth": results["depth"]})
    assert rows(text)["131,072"] == ["40.0", "1.275", "104 MB", "0.875"]
    assert (
        "131,072 a token takes 1.025 times as long as at 4,096, and memory changes by +1.5 MB"
        in text
    )
    assert "random numbers" in text


def test_page_says_where_and_has_the_parts_that_there_are(results, tmp_path):
    write_page(results, tmp_path / "docs")
    text = (tmp_path / "docs" / "onnx.md").read_text()
    assert text.count(str(environment()["cpu"])) == 5 and "0.1, 0.2, 0.3" in text
    assert "native avx2" in text and "onnxruntime 1.0" in text and "abc1234" in text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(titles) == 4
    del results["op"]
    assert "oneDNN" not in page(results) and page(results).count("## ") == 3
