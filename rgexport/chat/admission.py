"""Admission of requests: limits their number and chooses the next one."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping

from rgexport.chat.jobs import Busy, Job
from rgexport.errors import RequestError


class Admission:
    """Jobs from their submission to their end; those without a row wait in their client's queue.

    A cancelled job no longer counts, although the scheduler notices it only after a step or chunk.
    """

    def __init__(self, rows: int, max_waiting: int) -> None:
        self._rows, self._max_waiting = rows, max_waiting
        self.changed, self._closed = threading.Condition(), False
        """Notified when there is work, or when there will be no more."""
        self._live: set[Job] = set()
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()

    @property
    def most(self) -> int:
        """Largest number of jobs at once, those that go first aside."""
        return self._rows + self._max_waiting

    @property
    def waiting(self) -> int:
        """Number of jobs that wait for a row."""
        with self.changed:
            return sum(not job.cancelled for queue in self._queues.values() for job in queue)

    @property
    def has_queues(self) -> bool:
        """Whether a job waits, cancelled ones included; takes no lock."""
        return bool(self._queues)

    @property
    def is_crowded(self) -> bool:
        """Whether there are as many jobs as may be, cancelled ones included; takes no lock."""
        return len(self._live) >= self.most

    @property
    def paused(self) -> int:
        """Number of jobs that had a row and wait for another one."""
        with self.changed:
            return sum(job.paused is not None for queue in self._queues.values() for job in queue)

    def add(self, job: Job) -> Job | None:
        """Lets a job wait; returns the job that loses its turn for it, if there is one.

        Where too many wait, the client that has most in its queue loses the newest of them to a
        client that has fewer.

        Raises:
            Busy: too many wait, and this client has as many in its queue as any other.
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
        """Waits at most so long, or until a call in another thread makes `until` true."""
        with self.changed:
            self.changed.wait_for(lambda: self._closed or until(), seconds)

    def wait_for_folder(self, seconds: float) -> None:
        """Waits at most so long if the folder of states still reads for a job."""
        with self.changed:
            jobs = [job for queue in self._queues.values() for job in queue]
            if any(job.fetch is not None and job.fetch.pending for job in jobs):
                self.changed.wait(seconds)

    def wake(self) -> None:
        """Ends the scheduler's waiting."""
        with self.changed:
            self.changed.notify()

    def take(self, running: Mapping[str, int], most: int | None = None) -> Job | None:
        """Takes the next job of the client with the fewest rows; equal clients take turns.

        Args:
            running: number of rows by client.
            most: most rows that this client may have.
        """
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

    def put_back(self, job: Job) -> None:
        """Lets a job be the next one of its client."""
        with self.changed:
            self._queues.setdefault(job.request.client, deque()).appendleft(job)

    def take_cancelled(self, *, paused: bool = True) -> list[Job]:
        """Takes the cancelled jobs out of the queues, perhaps without those that are paused."""
        taken: list[Job] = []
        with self.changed:
            for client, queue in [*self._queues.items()]:
                leaving = {j for j in queue if j.cancelled and (paused or j.paused is None)}
                if not leaving:
                    continue
                taken += [job for job in queue if job in leaving]
                if staying := [job for job in queue if job not in leaving]:
                    self._queues[client] = deque(staying)
                else:
                    del self._queues[client]
        return taken

    def end(self, job: Job) -> None:
        """Frees the place of a job that has left its row or its queue."""
        with self.changed:
            self._live.discard(job)

    def close(self) -> None:
        """Refuses further jobs and wakes the scheduler."""
        with self.changed:
            self._closed = True
            self.changed.notify()

    def _is_full_for(self, job: Job) -> bool:
        """Returns whether as many jobs as may be are under way.

        Readings that go first follow a reply and count by themselves: at most one for each row.
        """
        first = job.request.first
        most = self._rows if first else self.most
        if len(self._live) < most:
            return False
        return (
            sum(each.request.first == first and not each.cancelled for each in self._live) >= most
        )

    def _displaced_by(self, job: Job) -> Job:
        longest = max(self._queues.values(), key=len, default=deque[Job]())
        mine = self._queues.get(job.request.client, ())
        newest = longest[-1] if len(longest) > len(mine) + 1 else None
        if job.request.first or newest is None or newest.request.first or newest.began:
            raise self.busy()
        self._remove(newest)
        self._live.discard(newest)
        return newest

    def busy(self) -> Busy:
        """Returns the error for a request that cannot wait."""
        return Busy(f"{self._max_waiting} requests wait already; try again later")

    def _remove(self, job: Job) -> None:
        queue = self._queues[job.request.client]
        queue.remove(job)
        if not queue:
            del self._queues[job.request.client]
