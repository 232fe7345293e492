"""Admission of requests: a queue for each client, and a limit for all of them."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping

from rgexport.chat.jobs import Busy, GenerationJob
from rgexport.errors import RequestError


class Admission:
    """Jobs from submission to end; those without a row wait in their client's queue.

    A cancelled job, or one that goes first, does not count in `most`. Any thread may call `add`,
    `end`, `close`, `busy`, `wake` and `take_cancelled`, and read the properties. Only the
    scheduler's thread calls `take`, `put_back` and the methods that wait.
    """

    def __init__(self, rows: int, max_waiting: int) -> None:
        self._rows = rows
        self._max_waiting = max_waiting
        self.most = rows + max_waiting
        """The most jobs that run or wait."""
        self._closed = False
        self._live: set[GenerationJob] = set()
        self._queues: OrderedDict[str, deque[GenerationJob]] = OrderedDict()
        """Client → its waiting jobs; the client whose turn came last is last."""
        self._changed = threading.Condition()
        """Guards `_live`, `_queues` and `_closed`, and wakes the scheduler's thread."""

    @property
    def waiting(self) -> int:
        """The number of jobs without a row, paused ones included, cancelled ones not."""
        with self._changed:
            return sum(not job.cancelled for job in self._queued_jobs())

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
        """The number of jobs that had a row and wait for another one."""
        with self._changed:
            return sum(job.paused is not None for job in self._queued_jobs())

    def add(self, job: GenerationJob) -> GenerationJob | None:
        """Queues a job; returns the job that it displaces, if any.

        If the queues are full, the client with the longest one loses its newest job to one with
        less.

        Raises:
            Busy: the queues are full, and the job displaces no other one.
            RequestError: the model is closed.
        """
        with self._changed:
            if self._closed:
                raise RequestError("the model is closed")
            displaced = None
            if self._is_full_for(job):
                displaced = self._displace_for(job)

            queue = self._queues.setdefault(job.request.client, deque())
            if job.request.first:
                queue.appendleft(job)
            else:
                queue.append(job)
            self._live.add(job)
            self._changed.notify()
        return displaced

    def wait_for_work(self, *, running: bool) -> bool:
        """Waits for a job unless some are `running`; returns False when closed."""

        def has_work() -> bool:
            return self._closed or running or bool(self._queues)

        with self._changed:
            self._changed.wait_for(has_work)
            return not self._closed

    def wait(self, seconds: float, until: Callable[[], bool]) -> None:
        """Waits for a condition, which is evaluated after each `wake`, at most so many seconds."""

        def is_over() -> bool:
            return self._closed or until()

        with self._changed:
            self._changed.wait_for(is_over, seconds)

    def wait_for_folder(self, seconds: float) -> None:
        """Waits for a wake if a job waits for its saved state, at most so many seconds."""
        with self._changed:
            if any(job.fetch and job.fetch.pending for job in self._queued_jobs()):
                self._changed.wait(seconds)

    def wake(self) -> None:
        """Wakes the scheduler's thread."""
        with self._changed:
            self._changed.notify()

    def take(self, running: Mapping[str, int], most: int | None = None) -> GenerationJob | None:
        """Takes the next job of the client with the fewest rows, if not above `most`.

        `running` has the number of rows of each client. Clients with equally many take turns.
        """
        with self._changed:
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
        """Queues a job that was taken as the next one of its client."""
        with self._changed:
            queue = self._queues.setdefault(job.request.client, deque())
            queue.appendleft(job)

    def take_cancelled(self, *, paused: bool = True) -> list[GenerationJob]:
        """Takes all cancelled jobs from the queues; paused ones only with `paused`."""
        cancelled: list[GenerationJob] = []
        with self._changed:
            for client, queue in list(self._queues.items()):
                staying = []
                for job in queue:
                    if job.cancelled and (paused or job.paused is None):
                        cancelled.append(job)
                    else:
                        staying.append(job)
                self._set_queue(client, staying)
        return cancelled

    def end(self, job: GenerationJob) -> None:
        """Frees the place of a job that has ended."""
        with self._changed:
            self._live.discard(job)

    def close(self) -> None:
        """Refuses further jobs, and ends all waiting of the scheduler's thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def busy(self) -> Busy:
        """Returns the error of a job for which the queues are full."""
        return Busy(f"{self._max_waiting} requests wait already; try again later")

    def _queued_jobs(self) -> Iterator[GenerationJob]:
        """Yields all jobs in the queues; the lock is held."""
        for queue in self._queues.values():
            yield from queue

    def _is_full_for(self, job: GenerationJob) -> bool:
        """Returns whether the maximum is reached; jobs that go first have one of their own."""
        first = job.request.first
        most = self._rows if first else self.most
        if len(self._live) < most:
            return False
        count = sum(live.request.first == first and not live.cancelled for live in self._live)
        return count >= most

    def _displace_for(self, job: GenerationJob) -> GenerationJob:
        """Removes the newest job of the longest queue, or raises Busy if it must stay."""
        longest_client = max(self._queues, key=lambda client: len(self._queues[client]), default="")
        longest = self._queues.get(longest_client, deque())
        own_length = len(self._queues.get(job.request.client, ()))
        if job.request.first or len(longest) <= own_length + 1:
            raise self.busy()
        newest = longest[-1]
        if newest.request.first or newest.began:
            raise self.busy()

        staying = [queued for queued in longest if queued is not newest]
        self._set_queue(longest_client, staying)
        self._live.discard(newest)
        return newest

    def _set_queue(self, client: str, jobs: list[GenerationJob]) -> None:
        if jobs:
            self._queues[client] = deque(jobs)
        else:
            del self._queues[client]
