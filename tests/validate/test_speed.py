from collections.abc import Callable

import pytest

from rgexport.export.opening import open_artifact
from rgexport.validate import speed
from rgexport.validate.opening import Request
from rgexport.validate.run import validate_artifact
from rgexport.validate.speed import Speed, measure_speed
from tests.validate.toys import ToySession, WholeChunksSession


class Clocked:
    """Sessions that are opened, and the seconds that each of their calls takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, session: ToySession, took: float) -> None:
        self.session, self.closed, self.took = session, 0, took
        session.close = self._close
        monkeypatch.setattr(speed, "open_session", lambda artifact: session)
        monkeypatch.setattr(speed, "seconds", self._seconds)

    def _close(self) -> None:
        self.closed += 1

    def _seconds(self, run: Callable[[], None]) -> float:
        before = len(self.session.chunks)
        run()
        return self.took * sum(self.session.chunks[before:])


def measured(clocked: Clocked) -> Speed:
    return measure_speed(None)  # the session is a toy's


def test_rates_are_those_of_the_calls(monkeypatch):
    clocked = Clocked(monkeypatch, ToySession(), took=0.25)
    assert measured(clocked) == Speed(decode=4, prefill=4, prompt_tokens=128)
    # Eight steps take the two seconds, first to warm up; a prompt alone takes more.
    assert clocked.session.chunks == [1] * 16 + [128]
    assert clocked.closed == 1


def test_a_slow_engine_takes_two_tokens_and_a_chunk(monkeypatch):
    clocked = Clocked(monkeypatch, WholeChunksSession(chunk_logits=True), took=20)
    found = measured(clocked)
    assert clocked.session.chunks == [1, 1, 64]
    assert found == Speed(decode=1 / 20, prefill=1 / 20, prompt_tokens=64)


def test_a_session_is_closed_after_an_error(monkeypatch):
    def fail(session: ToySession, logits: object) -> None:
        raise RuntimeError("the engine broke")

    clocked = Clocked(monkeypatch, ToySession(fault=fail), took=1)
    with pytest.raises(RuntimeError, match="the engine broke"):
        measured(clocked)
    assert clocked.closed == 1


def test_an_artifact(clean, monkeypatch):
    monkeypatch.setattr(speed, "SECONDS", 0.05)
    found = measure_speed(open_artifact(clean("int4")))
    assert found.decode > 1 and found.prefill > 1 and found.prompt_tokens == 128
    result = validate_artifact(clean("int4"), Request(max_tokens=12, bench=True))
    assert result.speed.prompt_tokens == 128
    assert validate_artifact(clean("int4"), Request(max_tokens=12)).speed is None


def test_an_odd_call_does_not_count(monkeypatch):
    clocked = Clocked(monkeypatch, ToySession(), took=0.001)
    calls = 0

    def seconds(run: Callable[[], None]) -> float:
        nonlocal calls
        calls += 1
        return 0.9 if calls % 7 == 0 else clocked._seconds(run)

    monkeypatch.setattr(speed, "seconds", seconds)
    found = measured(clocked)
    assert found.decode == pytest.approx(1000) and found.prefill == pytest.approx(1000)
