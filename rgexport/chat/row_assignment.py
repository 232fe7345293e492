"""Assignment of rows to waiting jobs.

Clients share the rows: a row goes to the client with the fewest; if all rows are taken, from a
client that has two more, whose job is paused. That is cheap, since a state has a fixed size.
"""

from collections.abc import Callable

from rgexport.chat.admission import Admission
from rgexport.chat.jobs import GenerationJob
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompts import common_prefix
from rgexport.chat.rows import Rows, count_by_client


class RowAssignment:
    """Gives rows to the jobs of an `Admission`; only for the scheduler's thread."""

    def __init__(self, admission: Admission, rows: Rows, store: PrefixStore) -> None:
        self._admission, self._rows, self._store = admission, rows, store

    def assign(self, begin: Callable[[GenerationJob], None]) -> None:
        """Calls `begin` with each job that gets a row.

        Jobs wait for a prefix that another row or the folder of states is reading.
        """
        postponed: list[GenerationJob] = []  # includes the current job, lest an error lose it
        try:
            for _ in range(self._rows.capacity):
                job = self._next_job(postponed)
                if job is None:
                    return
                postponed.append(job)
                if job.cancelled or self._is_being_read(job) or self._is_being_fetched(job):
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
        turns = count_by_client([*self._rows, *postponed])
        if not self._rows.is_full:
            return self._admission.take(turns)
        most = max(count_by_client(self._rows).values()) - 2
        if most < 0 or self._admission.paused >= self._rows.capacity:
            return None
        return self._admission.take(turns, most)

    def _pause_one(self) -> None:
        ((client, _),) = count_by_client(self._rows).most_common(1)
        job = max((j for j in self._rows if j.request.client == client), key=lambda j: j.began)
        job.paused = self._rows.state(job)
        self._rows.remove(job)
        self._admission.put_back(job)

    def _is_being_read(self, job: GenerationJob) -> bool:
        """Returns whether another row will soon store a longer prefix than the known one."""
        namespace = job.request.namespace
        reading = [r for r in self._rows.not_decoding if r.request.namespace == namespace]
        if job.paused is not None or job.request.prompt_logits or not reading:
            return False
        known = self._store.length(job.ids, namespace)
        for running in reading:
            shared = common_prefix(job.ids, running.ids)
            if any(known < stop <= shared for stop in running.stops()):
                return True
        return False

    def _is_being_fetched(self, job: GenerationJob) -> bool:
        if job.paused is not None or job.request.prompt_logits:
            return False
        wake, namespace = self._admission.wake, job.request.namespace
        job.fetch = job.fetch or self._store.fetch(job.ids, wake, namespace)
        return job.fetch is not None and job.fetch.pending
