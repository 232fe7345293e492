"""Measuring: the arithmetic with a session that takes known times, and real runs of the demo."""

import csv
import io
import json
from dataclasses import fields, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.runtimes.bench import measure as bench
from rgexport.runtimes.bench.formats import WRITERS
from rgexport.runtimes.bench.measure import BenchMeasurement, BenchRow
from rgexport.runtimes.bench.request import BenchRequest, BenchTest
from rgexport.runtimes.bench.roofline import roofline
from rgexport.runtimes.session import SessionInfo
from tests.artifacts import export_demo
from tests.llama_tools import needs_llama_cpp
from tests.toy_session import ToySession

WEIGHTS = 1000
ARTIFACT = Mock(path=Path("model-int4"), nbytes=5000)


class Timed(ToySession):
    """A toy whose k-th call of `step` or `prefill` takes the k-th of `times`, by its own clock."""

    def __init__(self):
        super().__init__(16)
        self.info = SessionInfo("toy", "1", 2, "float32", WEIGHTS, 0, 64)
        self.now, self.times, self.seen = 0.0, repeat(1.0), []

    def perf_counter(self):
        return self.now

    def prefill(self, tokens, num_logits=1):
        self._spend("prefill", tokens.shape[1])
        return super().prefill(tokens, num_logits)

    def step(self, tokens):
        self._spend("step", 1)
        return super().step(tokens)

    def _spend(self, call, count):
        self.now += next(self.times)
        self.seen.append((call, int(self.position[0]), count))


@pytest.fixture
def session(monkeypatch):
    timed = Timed()
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr("time.perf_counter", timed.perf_counter)
    return timed


def measured(session, speeds, **request):
    asked = BenchRequest(**request)
    measuring = BenchMeasurement(session, asked, lambda: next(speeds), ARTIFACT, 1.5)
    return list(measuring.rows())


def test_rate_is_the_mean_and_share_is_of_the_median(session):
    session.times = iter([9.0, *[1.0] * 4, *[3.0] * 4])  # a warm-up step, two repetitions of four
    speeds = iter([500.0, 501, 502, 503, 504, 5000, 5001, 5002, 5003])
    (row,) = measured(session, speeds, prompts=(0,), tokens=(4,), repetitions=2)
    assert row.test == "tg4" and row.repetitions == 2 and row.bytes_per_token == WEIGHTS
    assert row.tokens_per_second == pytest.approx((4 / 4 + 4 / 12) / 2)
    assert row.deviation == pytest.approx((1 - 1 / 3) / np.sqrt(2))
    assert row.median_tokens_per_second == row.tokens_per_second and row.time_ratio == 1
    # before, after each second but the last, at last; what lies between both counts for both
    assert row.roofline_bytes_per_second == 504
    assert row.roofline_share == pytest.approx(row.tokens_per_second * WEIGHTS / 504)
    assert row.load_seconds == 1.5 and row.artifact_bytes == 5000
    assert next(speeds, None) is None


def test_every_repetition_starts_at_its_depth(session, monkeypatch):
    monkeypatch.setattr(bench, "PIECE", 4)
    lengths = {"prompts": (3,), "tokens": (2,), "depths": (9, 0)}
    rows = measured(session, repeat(100.0), **lengths, repetitions=2)
    assert [(row.test, row.depth) for row in rows] == [
        *(("pp3", 0), ("tg2", 0), ("pp3", 9), ("tg2", 9))
    ]
    way = [("prefill", 0, 4), ("prefill", 4, 4), ("prefill", 8, 1)]
    warm_up, in_turns = [], []
    for depth in (0, 9):
        warm_up += [("prefill", depth, 3), ("step", depth, 1)]
        in_turns += [("prefill", depth, 3), ("step", depth, 1), ("step", depth + 1, 1)]
    assert session.seen == [*way, *warm_up, *in_turns, *in_turns]


def test_times_at_depths_are_compared_by_medians(session):
    """The second depth takes twice as long in two rounds of three, and far longer in one."""
    session.times = iter([0.0, 1.0, 1.0, *(1.0, 2.0), *(3.0, 6.0), *(5.0, 90.0)])
    lengths = {"prompts": (), "tokens": (1,), "depths": (0, 1)}
    rows = measured(session, repeat(100.0), **lengths, repetitions=3)
    assert [row.median_tokens_per_second for row in rows] == pytest.approx([1 / 3, 1 / 6])
    assert [row.time_ratio for row in rows] == pytest.approx([1, 2])


def test_synthetic_depth_processes_nothing_and_says_so(session, capsys):
    session.times = repeat(20.0)
    lengths = {"prompts": (), "tokens": (2,), "repetitions": 1}
    rows = measured(session, repeat(100.0), **lengths, depths=(0, 1 << 20), synthetic=True)
    assert [row.state for row in rows] == ["processed", "synthetic"]
    positions = [position for _, position, _ in session.seen if position > 1]
    assert positions == [1 << 20, 1 << 20, (1 << 20) + 1]
    assert "1,048,576 (synthetic)" in WRITERS["table"](rows)
    measured(session, repeat(100.0), **lengths, depths=(5120,))
    assert "about 3 minutes; --synthetic" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["", "12,", "1.5", "-3", "²", "16777217", "9" * 5000])
def test_lengths(length):
    request = BenchRequest.parse("8,0,8,4", "0", "5")
    assert request.tests == [BenchTest("pp", 8), BenchTest("pp", 4)] and request.depths == (5,)
    for option, texts in {"-p": (length, "1", "1"), "-d": ("1", "1", length)}.items():
        with pytest.raises(RequestError, match=f"^{option} is .* numbers from 0 to 16777216"):
            BenchRequest.parse(*texts)
    with pytest.raises(RequestError, match="nothing to measure"):
        BenchRequest.parse("0", "0", "5")
    with pytest.raises(RequestError, match="--synthetic changes nothing at depth 0"):
        BenchRequest.parse("8", "0", "0", synthetic=True)


ROW = BenchRow("tg8", 4096, "processed", 2, 12.5, 0.5, 12.25, 1.02, 2e9, 3e10, 0.8333, 1 << 30,
          *(2 << 30, 1, 3 << 30, "model", "engine", "1.0", "native avx2", 2, "a CPU"))  # fmt: skip


def test_the_ways_to_write_rows():
    rows = [ROW, replace(ROW, depth=0, peak_rss_bytes=None)]
    names = [field.name for field in fields(BenchRow)]
    written = json.loads(WRITERS["json"](rows))
    assert [BenchRow(**entry) for entry in written] == rows and list(written[0]) == names
    first, second = csv.DictReader(io.StringIO(WRITERS["csv"](rows)))
    assert list(first) == names and float(first["roofline_share"]) == 0.8333
    assert (second["depth"], second["peak_rss_bytes"]) == ("0", "")
    table = WRITERS["table"]([ROW, replace(ROW, peak_rss_bytes=None)])
    assert "12.50 ± 0.50" in table and "30.0 GB/s" in table and "unknown" in table
    assert "engine 1.0, native avx2 kernels, 2 threads\na CPU\n" in table
    *_, head, line, _, row = WRITERS["md"]([replace(ROW, depth=0), ROW]).splitlines()
    assert head.count("|") == line.count("|") == row.count("|")


@pytest.mark.parametrize(
    ("kind", "engine"),
    [("onnx", "onnxruntime"), pytest.param("gguf", "llama.cpp", marks=needs_llama_cpp)],
)
def test_demo(kind, engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(bench, "roofline", partial(roofline, nbytes=1 << 24))
    export_demo(demo := tmp_path / "demo", kind, "--int8", "--no-check")
    capsys.readouterr()
    options = "-p", "5,3", "-n", "4", "-d", "0,300", "-r", "1", "-o", "json", "--threads", "1"
    assert run(["bench", str(demo), *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["test"], row["depth"]) for row in rows] == [
        (test, depth) for depth in (0, 300) for test in ("pp5", "pp3", "tg4")
    ]
    files = [*demo.iterdir()] if demo.is_dir() else [demo]
    size = sum(file.stat().st_size for file in files)
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["roofline_share"] > 0
        assert (row["artifact"], row["artifact_bytes"]) == (demo.name, size)
        assert (row["engine"], row["threads"]) == (engine, 1)
        assert 1.01 * row["peak_rss_bytes"] > row["rss_bytes"] > row["bytes_per_token"] > 0
    # A token reads all but the head of the file, and of an ONNX artifact no tokenizer.
    assert rows[0]["bytes_per_token"] * 5 == rows[2]["bytes_per_token"] < size
    assert rows[2]["bytes_per_token"] > (0.8 if kind == "gguf" else 0.5) * size
