"""The batch rows of a session, the job in each row, and their assignment to waiting jobs.

Clients share the rows: a row goes to the client with the fewest; if all rows are taken, from a
client that has two more, whose job is paused. That is cheap, since a state has a fixed size.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from rgexport.chat.admission import Admission
from rgexport.chat.jobs import GenerationJob
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompts import common_prefix
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import Session


class Rows:
    """Jobs in the order of their batch rows, of which the session gets `capacity`.

    Jobs that decode have the first rows, so that a decoding step runs one range of rows. The jobs
    in later rows read their prompts, or wait for the mask of their next token. Only one thread may
    call methods; other threads may read the length.
    """

    def __init__(self, session: Session, capacity: int) -> None:
        session.reset(capacity)
        self._session, self.capacity = session, capacity
        shapes = session.state_shapes
        self._initial: State = {name: np.zeros((1, *shape)) for name, shape in shapes.items()}
        self._initial[POSITION] = np.zeros(1, np.int64)
        self._jobs: list[GenerationJob] = []
        self._num_decoding = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[GenerationJob]:
        return iter(self._jobs)

    @property
    def is_full(self) -> bool:
        return len(self._jobs) == self.capacity

    @property
    def decoding(self) -> list[GenerationJob]:
        """The jobs of the next decoding step; their rows begin at 0."""
        return self._jobs[: self._num_decoding]

    @property
    def not_decoding(self) -> list[GenerationJob]:
        return self._jobs[self._num_decoding :]

    def add(self, job: GenerationJob) -> None:
        self._jobs.append(job)

    def state(self, job: GenerationJob) -> State:
        return self._get(self._jobs.index(job))

    def set_state(self, job: GenerationJob, state: State | None) -> None:
        """Sets the state of a job's row; None is the state before any token."""
        self._set(self._jobs.index(job), self._initial if state is None else state)

    def row_range(self, job: GenerationJob) -> range:
        row = self._jobs.index(job)
        return range(row, row + 1)

    def start_decoding(self, job: GenerationJob) -> None:
        self._swap(self._jobs.index(job), self._num_decoding)
        self._num_decoding += 1

    def stop_decoding(self, job: GenerationJob) -> None:
        self._num_decoding -= 1
        self._swap(self._jobs.index(job), self._num_decoding)

    def remove(self, job: GenerationJob) -> None:
        row = self._jobs.index(job)
        # The last decoding job fills the gap, then the last job fills the gap that this leaves.
        if row < self._num_decoding:
            self._num_decoding -= 1
            self._move(self._num_decoding, row)
            row = self._num_decoding
        self._move(len(self._jobs) - 1, row)
        self._jobs.pop()

    def clear(self) -> list[GenerationJob]:
        """Frees all rows without reading their states; returns their jobs."""
        jobs, self._jobs, self._num_decoding = self._jobs, [], 0
        return jobs

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._set(target, self._get(source))
            self._jobs[target] = self._jobs[source]

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            state_a, state_b = self._get(a), self._get(b)
            self._set(a, state_b)
            self._set(b, state_a)
            self._jobs[a], self._jobs[b] = self._jobs[b], self._jobs[a]

    def _get(self, row: int) -> State:
        return self._session.get_rows(range(row, row + 1))

    def _set(self, row: int, state: State) -> None:
        self._session.set_rows(range(row, row + 1), state)


def count_by_client(jobs: Iterable[GenerationJob]) -> Counter[str]:
    return Counter(job.request.client for job in jobs)


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
