"""Readings of prompts: their ends as futures, and how much of a long one has been read."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from weakref import WeakKeyDictionary

import numpy as np

from rgexport.chat.jobs import End, GenerationJob
from rgexport.progress import note, task

_SILENT_SECONDS = 1.0
"""A shorter reading shows nothing."""

_POLL_SECONDS = 0.2
"""Interval at which a terminal's progress bar is updated."""

_LOG_SECONDS = 10.0
"""Interval of the lines in a server's log."""


class Reading(Future[End]):
    """The end of a `job` that only reads.

    It is the job's listener, so the scheduler's thread calls `token` and `end`; any thread may wait
    for the result, or cancel it.
    """

    job: GenerationJob

    def token(self, token: int, logits: np.ndarray) -> bool:
        """Ends the reply, if there is one, at its first token."""
        return False

    def end(self, end: End) -> None:
        """Sets the result, or the error, unless the reading was cancelled."""
        if not self.set_running_or_notify_cancel():
            return
        if end.error is not None:
            self.set_exception(end.error)
        else:
            self.set_result(end)


def show_reading(job: GenerationJob, wait: Callable[[float], bool]) -> None:
    """Returns when `wait`, called with seconds, says that the reply or the end has arrived.

    Shows the progress on a terminal after the first second. An interrupted reading leaves a line
    that says so.
    """
    if wait(_SILENT_SECONDS):
        return
    total = len(job.request.ids)
    counted = job.cached
    with task("Reading", total - counted, "tokens") as advance:
        try:
            while not wait(_POLL_SECONDS):
                advance(min(job.fed, total) - counted)
                counted = min(job.fed, total)
        except KeyboardInterrupt:
            note("Reading cancelled.")
            raise
        advance(total - counted)


class ReadingLog:
    """Logs how far a prompt is read, every ten seconds; its text stays out of the log.

    Only the scheduler's thread calls it, after each chunk.
    """

    def __init__(self) -> None:
        self._due: WeakKeyDictionary[GenerationJob, float] = WeakKeyDictionary()
        """Job → time of its next line."""

    def __call__(self, job: GenerationJob) -> None:
        now = time.perf_counter()
        total = len(job.request.ids)
        due = self._due.setdefault(job, job.began + _LOG_SECONDS)
        if now >= due and job.fed < total:
            self._due[job] = now + _LOG_SECONDS
            note(f"reading a prompt: {job.fed:,} of {total:,} tokens in {now - job.began:.0f} s")
