"""The arithmetic of the page about llama.cpp."""

import pytest

from bench.llama_page import page, write_page
from rgexport.runtimes.environment import environment

TRANSFORMER = {"peak_rss_bytes": 5e9, "state": "doubled", "bytes_per_token": 2.5e9}


def run_of(rates: list[float], size: int) -> dict:
    return {
        "build_commit": "abc1234",
        "model_size": size,
        "n_gen": 32,
        "samples_ts": rates,
        "peak_bytes": 2 * size,
    }


@pytest.fixture
def result() -> dict:
    session = {"bytes_per_token": 2e9, "tokens_per_second": 9.0, "roofline_share": 0.91}
    entries = [
        {
            "huge_pages": [20e9, 25e9],
            "small_pages": [15e9],
            "recurrent": run_of([rate, rate + 1], 2_000_000_000),
            "transformer": run_of([10.0, 10.0], 2_500_000_000),
            "session": session,
        }
        for rate in (9.0, 11.0)
    ]
    rows = [
        {
            "depth": depth,
            "bytes_per_token": 2e9,
            "state": "processed",
            "tokens_per_second": 9.5,
            "deviation": 0.25,
            "peak_rss_bytes": 4e9,
            "roofline_bytes_per_second": 22.5e9,
        }
        for depth in (0, 4096)
    ]
    return {
        "environment": environment(),
        "threads": 2,
        "load_average": [0.1, 0.2, 0.3],
        "decode": entries,
        "depths": {
            "recurrent": rows,
            "transformer": [row | TRANSFORMER for row in rows],
        },
    }


def rows(text: str) -> dict[str, list[str]]:
    lines = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    return {first: rest for first, *rest in lines}


def test_decode_is_compared_by_bytes(result):
    found = rows(page(result))
    # the median of 9, 10, 11 and 12 tokens a second, of 22.5 GB/s and of 25 GB/s
    assert found["RecurrentGemma 2B"] == [
        "2.000 GB",
        "10.50",
        "21.0 GB/s",
        "0.933",
        "1.400",
        "0.840",
    ]
    assert found["Gemma 2B's shape"] == [
        "2.500 GB",
        "10.00",
        "25.0 GB/s",
        "1.111",
        "1.667",
        "1.000",
    ]
    ours = found["RecurrentGemma 2B, `rgexport bench`"]
    assert "22.5 GB/s in huge pages" in page(result) and "15.0 GB/s in pages" in page(result)
    assert ours == ["2.000 GB", "9.00", "18.0 GB/s", "0.910", "1.200", "0.720"]


def test_depths_are_rows(result):
    found = rows(page(result))
    rate, speed = "9.50 ± 0.25", "22.5 GB/s"
    assert (
        found["0"]
        == found["4,096"]
        == [rate, f"{rate} (doubled)", "4.00 GB", "5.00 GB", speed, speed]
    )


def test_page_says_where(result):
    text = page(result)
    assert environment()["cpu"] in text and "abc1234" in text and "0.1, 0.2, 0.3" in text


def test_same_figures_give_the_same_files(result, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        write_page(result, tmp_path / name)
    files = ["llama_cpp.md", "llama_cpp.svg"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert b"<svg" in (tmp_path / "one" / "llama_cpp.svg").read_bytes()
