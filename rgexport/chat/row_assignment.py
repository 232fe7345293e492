"""The choice of the jobs that get rows.

Clients share the rows: a row goes to the client with the fewest; if all rows are taken, from a
client that has two more, whose job is paused. That is cheap, since a state has a fixed size.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from rgexport.chat.admission import Admission
from rgexport.chat.jobs import GenerationJob
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompts import common_prefix
from rgexport.chat.rows import Rows


class RowAssignment:
    """The assignment of rows to waiting jobs. Only the scheduler's thread may call `assign`."""

    def __init__(self, admission: Admission, rows: Rows, store: PrefixStore) -> None:
        self._admission = admission
        self._rows = rows
        self._store = store

    def assign(self, begin: Callable[[GenerationJob], None]) -> None:
        """Calls `begin` with each job that gets a row."""
        postponed: list[GenerationJob] = []  # includes the current job, lest an error lose it
        try:
            for _ in range(self._rows.capacity):
                job = self._next_job(postponed)
                if job is None:
                    return
                postponed.append(job)
                if job.cancelled or self._waits_for_a_prefix(job):
                    continue
                if self._rows.is_full:
                    self._pause_one()
                begin(postponed.pop())
        finally:
            for job in reversed(postponed):
                self._admission.put_back(job)

    def _next_job(self, postponed: list[GenerationJob]) -> GenerationJob | None:
        """Takes the next job; if all rows are taken, its client must have two fewer."""
        if not self._admission.has_queues:
            return None
        turns = _count_by_client([*self._rows, *postponed])
        if not self._rows.is_full:
            return self._admission.take(turns)
        most = max(_count_by_client(self._rows).values()) - 2
        # The memory is for as many paused states as there are rows.
        if most < 0 or self._admission.paused >= self._rows.capacity:
            return None
        return self._admission.take(turns, most)

    def _pause_one(self) -> None:
        """Frees the row of the latest job of the client with the most rows."""
        counts = _count_by_client(self._rows)
        ((busiest_client, _),) = counts.most_common(1)
        candidates = [job for job in self._rows if job.request.client == busiest_client]
        latest = max(candidates, key=lambda job: job.began)
        latest.paused = self._rows.state(latest)
        self._rows.remove(latest)
        self._admission.put_back(latest)

    def _waits_for_a_prefix(self, job: GenerationJob) -> bool:
        """Returns whether another row or the folder of states is reading a prefix of the prompt."""
        if job.paused is not None or job.request.prompt_logits:
            return False
        if self._a_row_reads_a_prefix(job):
            return True
        if job.fetch is None:
            namespace = job.request.namespace
            job.fetch = self._store.fetch(job.ids, self._admission.wake, namespace)
        return job.fetch is not None and job.fetch.pending

    def _a_row_reads_a_prefix(self, job: GenerationJob) -> bool:
        """Returns whether a row will store a longer prefix of the prompt than is known."""
        namespace = job.request.namespace
        reading = [row for row in self._rows.not_decoding if row.request.namespace == namespace]
        if not reading:
            return False
        known = self._store.length(job.ids, namespace)
        for running in reading:
            shared = common_prefix(job.ids, running.ids)
            if any(known < stop <= shared for stop in running.stops()):
                return True
        return False


def _count_by_client(jobs: Iterable[GenerationJob]) -> Counter[str]:
    return Counter(job.request.client for job in jobs)
