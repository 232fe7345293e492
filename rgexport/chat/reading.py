"""Shows how much of a long prompt has been read, on a terminal or in a server's log."""

import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

from rgexport.chat.jobs import GenerationJob
from rgexport.progress import note, task

_SILENT_SECONDS, _POLL_SECONDS, _LOG_SECONDS = 1.0, 0.2, 10.0


def show_reading(job: GenerationJob, wait: Callable[[float], bool]) -> None:
    """Returns when `wait`, called with seconds, says that what follows the prompt has arrived.

    A reading of less than a second shows nothing. An interrupted one leaves a line that says so.
    """
    if wait(_SILENT_SECONDS):
        return
    total, counted = len(job.request.ids), job.cached
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
    """Logs how far a prompt is read, every ten seconds; its text stays out of the log."""

    def __init__(self) -> None:
        self._due: WeakKeyDictionary[GenerationJob, float] = WeakKeyDictionary()

    def __call__(self, job: GenerationJob) -> None:
        now, total = time.perf_counter(), len(job.request.ids)
        if now >= self._due.setdefault(job, job.began + _LOG_SECONDS) and job.fed < total:
            self._due[job] = now + _LOG_SECONDS
            note(f"reading a prompt: {job.fed:,} of {total:,} tokens in {now - job.began:.0f} s")
