"""Admission of requests, the batch rows of a session, and which job gets a row.

Clients share the rows: a row goes to the client with the fewest; if all rows are taken, from a
client that has two more, whose job is paused. That is cheap, since a state has a fixed size.
"""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from rgexport.chat.jobs import Busy, GenerationJob
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.prompts import common_prefix
from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import Session


class Admission:
    """Jobs from submission to end; those without a row wait in their client's queue.

    A cancelled job, or one that goes first, does not count in `most`.
    """

    def __init__(self, rows: int, max_waiting: int) -> None:
        self._rows, self._max_waiting = rows, max_waiting
        self.most = rows + max_waiting
        self.changed, self._closed = threading.Condition(), False
        self._live: set[GenerationJob] = set()
        self._queues: OrderedDict[str, deque[GenerationJob]] = OrderedDict()

    @property
    def waiting(self) -> int:
        with self.changed:
            return sum(not job.cancelled for queue in self._queues.values() for job in queue)

    @property
    def has_queues(self) -> bool:
        """Whether a job waits, cancelled ones included; takes no lock."""
        return bool(self._queues)

    @property
    def is_crowded(self) -> bool:
        """Whether the maximum is reached, cancelled jobs included; takes no lock."""
        return len(self._live) >= self.most

    @property
    def paused(self) -> int:
        with self.changed:
            return sum(job.paused is not None for queue in self._queues.values() for job in queue)

    def add(self, job: GenerationJob) -> GenerationJob | None:
        """Queues a job; returns the job that it displaces, if any, or raises Busy.

        If the queues are full, the client with the longest one loses its newest job to one with
        less.
        """
        with self.changed:
            if self._closed:
                raise RequestError("the model is closed")
            displaced = self._displaced_by(job) if self._is_full_for(job) else None
            queue = self._queues.setdefault(job.request.client, deque())
            (queue.appendleft if job.request.first else queue.append)(job)
            self._live.add(job)
            self.changed.notify()
        return displaced

    def wait_for_work(self, *, running: bool) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self._closed or running or self._queues)
            return not self._closed

    def wait(self, seconds: float, until: Callable[[], bool]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self._closed or until(), seconds)

    def wait_for_folder(self, seconds: float) -> None:
        with self.changed:
            jobs = [job for queue in self._queues.values() for job in queue]
            if any(job.fetch is not None and job.fetch.pending for job in jobs):
                self.changed.wait(seconds)

    def wake(self) -> None:
        with self.changed:
            self.changed.notify()

    def take(self, running: Mapping[str, int], most: int | None = None) -> GenerationJob | None:
        """Takes the next job of the client with the fewest rows, if not above `most`."""
        with self.changed:
            if not self._queues:
                return None
            client = min(self._queues, key=lambda client: running.get(client, 0))
            if most is not None and running.get(client, 0) > most:
                return None
            queue = self._queues.pop(client)
            job = queue.popleft()
            if queue:
                self._queues[client] = queue
            return job

    def put_back(self, job: GenerationJob) -> None:
        with self.changed:
            self._queues.setdefault(job.request.client, deque()).appendleft(job)

    def take_cancelled(self, *, paused: bool = True) -> list[GenerationJob]:
        cancelled: list[GenerationJob] = []
        with self.changed:
            for client, queue in [*self._queues.items()]:
                leaving = [j for j in queue if j.cancelled and (paused or j.paused is None)]
                cancelled += leaving
                self._set_queue(client, [job for job in queue if job not in leaving])
        return cancelled

    def end(self, job: GenerationJob) -> None:
        with self.changed:
            self._live.discard(job)

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify()

    def busy(self) -> Busy:
        return Busy(f"{self._max_waiting} requests wait already; try again later")

    def _is_full_for(self, job: GenerationJob) -> bool:
        """Returns whether the maximum is reached; jobs that go first have one of their own."""
        first = job.request.first
        most = self._rows if first else self.most
        if len(self._live) < most:
            return False
        return (
            sum(live.request.first == first and not live.cancelled for live in self._live) >= most
        )

    def _displaced_by(self, job: GenerationJob) -> GenerationJob:
        client = max(self._queues, key=lambda client: len(self._queues[client]), default="")
        longest = self._queues.get(client, deque())
        own_length = len(self._queues.get(job.request.client, ()))
        newest = longest[-1] if len(longest) > own_length + 1 else None
        if job.request.first or newest is None or newest.request.first or newest.began:
            raise self.busy()
        self._set_queue(client, [queued for queued in longest if queued is not newest])
        self._live.discard(newest)
        return newest

    def _set_queue(self, client: str, jobs: list[GenerationJob]) -> None:
        if jobs:
            self._queues[client] = deque(jobs)
        else:
            del self._queues[client]


class Rows:
    """Jobs in the order of their batch rows; the session gets `capacity` rows.

    Jobs that decode have the first rows, for one range of rows in a step. Only one thread may call
    methods; other threads may read the length.
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


def _count_by_client(jobs: Iterable[GenerationJob]) -> Counter[str]:
    return Counter(job.request.client for job in jobs)


class RowAssignment:
    def __init__(self, admission: Admission, rows: Rows, store: PrefixStore) -> None:
        self._admission, self._rows, self._store = admission, rows, store

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
        if most < 0 or self._admission.paused >= self._rows.capacity:
            return None
        return self._admission.take(turns, most)

    def _pause_one(self) -> None:
        ((client, _),) = _count_by_client(self._rows).most_common(1)
        job = max((j for j in self._rows if j.request.client == client), key=lambda j: j.began)
        job.paused = self._rows.state(job)
        self._rows.remove(job)
        self._admission.put_back(job)

    def _waits_for_a_prefix(self, job: GenerationJob) -> bool:
        """Returns whether another row or the folder of states is reading a prefix of the prompt."""
        if job.paused is not None or job.request.prompt_logits:
            return False
        namespace = job.request.namespace
        reading = [r for r in self._rows.not_decoding if r.request.namespace == namespace]
        known = self._store.length(job.ids, namespace) if reading else 0
        for running in reading:
            shared = common_prefix(job.ids, running.ids)
            if any(known < stop <= shared for stop in running.stops()):
                return True
        job.fetch = job.fetch or self._store.fetch(job.ids, self._admission.wake, namespace)
        return job.fetch is not None and job.fetch.pending
