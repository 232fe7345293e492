"""What is shown while a long prompt is read."""

import time
from dataclasses import dataclass, field

import pytest

from rgexport import progress
from rgexport.chat import reading


@dataclass(eq=False)
class Job:
    """As much of a job as is read: 20 of 100 tokens were known."""

    fed: int = 40
    cached: int = 20
    ids: range = range(100)
    began: float = field(default_factory=time.perf_counter)

    @property
    def request(self) -> "Job":
        return self


def test_a_reading_counts_the_tokens_that_were_not_known():
    job, heard = Job(), []

    def wait(seconds: float) -> bool:
        job.fed += 20
        return job.fed > 100

    with progress.heard_by(lambda *counts: heard.append(counts)):
        reading.show_reading(job, wait)
    assert heard == [("Reading", done, 80) for done in (0, 60, 80, 80)]


def test_a_quick_reading_shows_nothing_and_an_interrupted_one_says_so(capsys):
    reading.show_reading(Job(), lambda seconds: True)
    assert capsys.readouterr().err == ""
    calls = iter([False])

    def interrupted(seconds: float) -> bool:
        if next(calls, True):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        reading.show_reading(Job(), interrupted)
    assert "Reading cancelled." in capsys.readouterr().err


def test_a_log_line_comes_every_ten_seconds_without_the_text(capsys, monkeypatch):
    log, job = reading.ReadingLog(), Job()
    for seconds in (3, 11, 12, 22):
        monkeypatch.setattr(reading.time, "perf_counter", lambda s=seconds: job.began + s)
        log(job)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"reading a prompt: 40 of 100 tokens in {s} s" for s in (11, 22)]
