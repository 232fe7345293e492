"""Admission of requests: limits their number and chooses the next one."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping

from rgexport.chat.jobs import Busy, GenerationJob
from rgexport.errors import RequestError


class Admission:
    """Jobs from submission to end; those without a row wait in their client's queue.

    A cancelled job no longer counts, although the scheduler notices it only after a step or chunk.

    Attributes:
        most: maximum number of jobs, not counting those that go first.
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
        """Queues a job; returns the job that it displaces, if any.

        If the queues are full, the client with the longest one loses its newest job to one with
        less.

        Raises:
            Busy: the queues are full, and this client has as many jobs as any other.
            RequestError: the scheduler is closed.
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
        """Returns True once there is work, False when the scheduler is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self._closed or running or self._queues)
            return not self._closed

    def wait(self, seconds: float, until: Callable[[], bool]) -> None:
        """Waits at most `seconds`, or until a call in another thread makes `until` true."""
        with self.changed:
            self.changed.wait_for(lambda: self._closed or until(), seconds)

    def wait_for_folder(self, seconds: float) -> None:
        """Waits at most `seconds` if the folder of states is reading for a job."""
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
        """Takes the cancelled jobs out of the queues; leaves paused ones if `paused` is False."""
        cancelled: list[GenerationJob] = []
        with self.changed:
            for client, queue in [*self._queues.items()]:
                is_leaving = [job.cancelled and (paused or job.paused is None) for job in queue]
                if not any(is_leaving):
                    continue
                jobs = [*zip(queue, is_leaving, strict=True)]
                cancelled += [job for job, leaves in jobs if leaves]
                self._set_queue(client, [job for job, leaves in jobs if not leaves])
        return cancelled

    def end(self, job: GenerationJob) -> None:
        """Stops counting a job."""
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
