"""Measuring: the arithmetic with a session that takes known times, and real runs of the demo."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION
from rgexport.runtimes.bench import measure as bench
from rgexport.runtimes.bench.measure import BenchRequest, Measuring, Trial, synthetic_state
from rgexport.runtimes.bench.roofline import Reader, roofline
from rgexport.runtimes.bench.rows import WRITERS, Row
from rgexport.runtimes.session import SessionInfo
from tests.chat.conftest import ToySession
from tests.llama_tools import needs_llama_cpp

CHUNK, WEIGHTS = 64, 1000


class Timed(ToySession):
    """A toy whose k-th call of `step` or `prefill` takes the k-th of `times`, by its own clock."""

    def __init__(self) -> None:
        super().__init__(16)
        self.info = SessionInfo("toy", "1", 2, "float32", WEIGHTS, 0, CHUNK)
        self.now, self.times, self.seen = 0.0, repeat(1.0), []

    def perf_counter(self) -> float:
        return self.now

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        self._spend("prefill", tokens.shape[1])
        return super().prefill(tokens, num_logits)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        self._spend("step", 1)
        return super().step(tokens)

    def _spend(self, call: str, count: int) -> None:
        self.now += next(self.times)
        self.seen.append((call, int(self.position[0]), count))


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Timed:
    timed = Timed()
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr("time.perf_counter", timed.perf_counter)
    return timed


def measured(session: Timed, speeds: Iterator[float], **request: Any) -> list[Row]:
    asked = BenchRequest(**request)
    measuring = Measuring(session, asked, lambda: next(speeds), Path(__file__), 1.5)
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
    assert row.load_seconds == 1.5 and row.artifact_bytes == Path(__file__).stat().st_size
    assert next(speeds, None) is None


@pytest.mark.parametrize(
    ("whole_chunks", "readings"),
    [(False, [1 / 3, 1 / CHUNK, 2 / (CHUNK + 2)]), (True, [1, 1 / CHUNK, 3 / (CHUNK + 2)])],
)
def test_a_chunk_shares_one_reading_of_the_weights(session, whole_chunks, readings):
    """Some engines take what fills no chunk one by one."""
    session.info = replace(session.info, whole_chunks=whole_chunks)
    lengths = (3, CHUNK, CHUNK + 2)
    rows = measured(session, repeat(100.0), prompts=lengths, tokens=(), repetitions=1)
    assert [row.test for row in rows] == ["pp3", "pp64", "pp66"]
    shares = [WEIGHTS * reading for reading in readings]
    assert [row.bytes_per_token for row in rows] == pytest.approx(shares)
    assert [row.deviation for row in rows] == [0, 0, 0]


def test_every_repetition_starts_at_its_depth(session, monkeypatch):
    monkeypatch.setattr(bench, "PIECE", 4)
    request = {"prompts": (3,), "tokens": (2,), "depths": (9, 0), "repetitions": 2}
    rows = measured(session, repeat(100.0), **request)
    assert [(row.test, row.depth, row.state) for row in rows] == [
        *[("pp3", 0, "processed"), ("tg2", 0, "processed")],
        *[("pp3", 9, "processed"), ("tg2", 9, "processed")],
    ]
    way = [("prefill", 0, 4), ("prefill", 4, 4), ("prefill", 8, 1)]
    warm_up = [piece for depth in (0, 9) for piece in (("prefill", depth, 3), ("step", depth, 1))]
    in_turns = [piece for depth in (0, 9) for piece in trials_at(depth)]
    assert session.seen == [*way, *warm_up, *in_turns, *in_turns]


def trials_at(depth: int) -> list[tuple[str, int, int]]:
    return [("prefill", depth, 3), ("step", depth, 1), ("step", depth + 1, 1)]


def test_times_at_depths_are_compared_by_medians(session):
    """The second depth takes twice as long in two rounds of three, and far longer in one."""
    rounds = [1.0, 2.0], [3.0, 6.0], [5.0, 90.0]
    session.times = iter([0.0, 1.0, 1.0, *(time for pair in rounds for time in pair)])
    request = {"prompts": (), "tokens": (1,), "depths": (0, 1), "repetitions": 3}
    rows = measured(session, repeat(100.0), **request)
    assert [row.median_tokens_per_second for row in rows] == pytest.approx([1 / 3, 1 / 6])
    assert [row.time_ratio for row in rows] == pytest.approx([1, 2])


def test_depths_go_on_from_each_other(session):
    measured(session, repeat(100.0), prompts=(), tokens=(1,), depths=(600, 700, 600), repetitions=1)
    way = [(position, count) for call, position, count in session.seen if call == "prefill"]
    assert way == [(0, 512), (512, 88), (600, 100)]


def test_synthetic_depth_processes_nothing_and_says_so(session):
    depths = (0, 1 << 20)
    rows = measured(
        session,
        repeat(100.0),
        prompts=(),
        tokens=(2,),
        depths=depths,
        repetitions=1,
        synthetic=True,
    )
    assert [row.state for row in rows] == ["processed", "synthetic"]
    positions = [position for _, position, _ in session.seen if position > 1]
    assert positions == [1 << 20, 1 << 20, (1 << 20) + 1]
    assert "1,048,576 (synthetic)" in WRITERS["table"](rows)


def test_synthetic_state_has_the_shapes_and_types():
    like = {"a": np.zeros((1, 3), np.float16), "b": np.zeros((1, 2), np.float32)}
    like[POSITION] = np.zeros(1, np.int64)
    state = synthetic_state(like, 77, np.random.default_rng(0))
    assert {name: (a.shape, a.dtype) for name, a in state.items()} == {
        name: (a.shape, a.dtype) for name, a in like.items()
    }
    assert state[POSITION] == [77] and np.all(state["a"] != 0) and not like["a"].any()


def test_long_way_is_told(session, capsys):
    session.times = repeat(20.0)
    measured(session, repeat(100.0), prompts=(), tokens=(1,), depths=(5120,), repetitions=1)
    assert "about 3 minutes; --synthetic" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "12,", "1.5", "-3", "²", "16777217", "9" * 5000])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_no_length(text, place):
    texts = ["1", "1", "1"]
    texts[place] = text
    with pytest.raises(RequestError, match=f"^{('-p', '-n', '-d')[place]} is "):
        BenchRequest.parse(*texts)


def test_lengths_are_taken_once_and_zeros_left_out():
    request = BenchRequest.parse("8,0,8,4", "0", "5")
    assert request.trials == [Trial("pp", 8), Trial("pp", 4)] and request.depths == (5,)
    with pytest.raises(RequestError, match="nothing to measure"):
        BenchRequest.parse("0", "0", "5")


def test_a_synthetic_state_needs_a_depth():
    with pytest.raises(RequestError, match="--synthetic changes nothing at depth 0"):
        BenchRequest.parse("8", "0", "0", synthetic=True)


ROW = Row("tg8", 4096, "processed", 2, 12.5, 0.5, 12.25, 1.02, 2e9, 3e10, 0.8333, 1 << 30, 2 << 30,
          *(1.0, 3 << 30, "model", "engine", "1.0", "native avx2", 2, "a processor"))  # fmt: skip


def test_json_and_csv_hold_every_field():
    rows = [ROW, replace(ROW, depth=0, peak_rss_bytes=None)]
    names = [field.name for field in fields(Row)]
    found = json.loads(WRITERS["json"](rows))
    assert [Row(**entry) for entry in found] == rows and list(found[0]) == names
    first, second = csv.DictReader(io.StringIO(WRITERS["csv"](rows)))
    assert list(first) == names and float(first["roofline_share"]) == 0.8333
    assert (second["depth"], second["peak_rss_bytes"]) == ("0", "")


def test_tables_for_people():
    shown = WRITERS["table"]([ROW, replace(ROW, peak_rss_bytes=None)])
    assert "12.50 ± 0.50" in shown and "30.0 GB/s" in shown and "unknown" in shown
    assert "engine 1.0, native avx2 kernels, 2 threads\na processor\n" in shown
    *_, head, line, _, row = WRITERS["md"]([replace(ROW, depth=0), ROW]).splitlines()
    assert head.count("|") == line.count("|") == row.count("|")


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_read_speed_counts_what_was_read(threads, huge, monkeypatch):
    reader = Reader(threads, 1 << 20, huge)
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert reader.read_speed(3) == pytest.approx(1 << 20, rel=1e-4)


def test_read_speed_from_a_process_of_its_own():
    with roofline(2, 1 << 22) as read_speed:
        assert all(1e8 < read_speed() < 1e13 for _ in range(2))


def bench_rows(artifact: Path, capsys: pytest.CaptureFixture[str], **asked: str) -> list[dict]:
    options = {"-n": "4", "-d": "0,300", "-r": "2", "-o": "json"} | asked
    capsys.readouterr()
    assert run(["bench", str(artifact), *(word for pair in options.items() for word in pair)]) == 0
    rows = json.loads(capsys.readouterr().out)
    prompts = options["-p"].split(",")
    assert [(row["test"], row["depth"]) for row in rows] == [
        (test, depth) for depth in (0, 300) for test in [*(f"pp{p}" for p in prompts), "tg4"]
    ]
    files = [artifact] if artifact.is_file() else artifact.iterdir()
    size = sum(file.stat().st_size for file in files)
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["roofline_share"] > 0
        assert row["artifact"] == artifact.name and row["artifact_bytes"] == size
    return rows


def test_demo(demo_artifact, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)
    before = {path: path.read_bytes() for path in demo_artifact.iterdir()}
    rows = bench_rows(demo_artifact, capsys, **{"-p": "5,3"})
    for row in rows:
        assert 1.01 * row["peak_rss_bytes"] > row["rss_bytes"] > row["bytes_per_token"] > 0
        assert row["engine"] == "onnxruntime"
    assert rows[0]["bytes_per_token"] * 5 == rows[2]["bytes_per_token"]
    assert {path: path.read_bytes() for path in demo_artifact.iterdir()} == before


@needs_llama_cpp
def test_demo_in_llama_cpp(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)
    demo = tmp_path / "demo.gguf"
    assert run(["gguf", "--size", "demo", "--type", "q8_0", "--no-check", "-o", str(demo)]) == 0
    rows = bench_rows(demo, capsys, **{"-p": "5", "--threads": "1"})
    assert {(row["engine"], row["threads"]) for row in rows} == {("llama.cpp", 1)}
    # All of the file but its head is read for a token: the vocabulary, too, with the head.
    assert 0.8 * demo.stat().st_size < rows[1]["bytes_per_token"] < demo.stat().st_size


def test_wrong_request(demo_artifact, capsys):
    assert run(["bench", str(demo_artifact), "-p", "many"]) == 2
    captured = capsys.readouterr()
    line = "Error: -p is 'many'; expected numbers from 0 to 16777216"
    assert captured.out == "" and captured.err.startswith(line)
