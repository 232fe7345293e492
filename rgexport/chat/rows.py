"""The rows of a session, and the jobs that have them."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from rgexport.chat.jobs import Job
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import Session


class Rows:
    """Jobs in the order of their rows: first those that write, so that a step takes one range.

    The others read their prompts, or wait for a mask. One thread calls it; others may ask for its
    length.
    """

    def __init__(self, session: Session, capacity: int) -> None:
        """Empties the session.

        Args:
            session: whose rows they are.
            capacity: most jobs at once.
        """
        session.reset(capacity)
        self._session, self._capacity = session, capacity
        self._empty: State = {name: np.zeros((1, *s)) for name, s in session.state_shapes.items()}
        self._empty[POSITION] = np.zeros(1, np.int64)
        self._jobs: list[Job] = []
        self._writing = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    @property
    def is_full(self) -> bool:
        """Whether there is no row for another job."""
        return len(self._jobs) == self._capacity

    @property
    def writing(self) -> list[Job]:
        """The jobs of the next step, which have the rows from 0 on."""
        return self._jobs[: self._writing]

    @property
    def others(self) -> list[Job]:
        """The jobs that are not in the next step."""
        return self._jobs[self._writing :]

    def add(self, job: Job) -> None:
        """Gives a job the next row, whose state is not set yet."""
        self._jobs.append(job)

    def state(self, job: Job) -> State:
        """Returns the state of a job's row, with a batch of 1."""
        return self._get(self._jobs.index(job))

    def set_state(self, job: Job, state: State | None) -> None:
        """Sets the state of a job's row; None sets the one before any token."""
        self._set(self._jobs.index(job), self._empty if state is None else state)

    def range(self, job: Job) -> range:
        """Returns the row of a job, as a session takes it."""
        row = self._jobs.index(job)
        return range(row, row + 1)

    def start_writing(self, job: Job) -> None:
        """Lets a job take part in the next step."""
        self._swap(self._jobs.index(job), self._writing)
        self._writing += 1

    def stop_writing(self, job: Job) -> None:
        """Lets a job that wrote take no part in the next step."""
        self._writing -= 1
        self._swap(self._jobs.index(job), self._writing)

    def remove(self, job: Job) -> None:
        """Gives a row back."""
        row = self._jobs.index(job)
        if row < self._writing:
            self._writing -= 1
            self._move(self._writing, row)
            row = self._writing
        self._move(len(self._jobs) - 1, row)
        self._jobs.pop()

    def clear(self) -> list[Job]:
        """Gives all rows back and leaves their states; returns the jobs that had them."""
        jobs, self._jobs, self._writing = self._jobs, [], 0
        return jobs

    def _move(self, source: int, target: int) -> None:
        """Lets a row take the place of another one, which is not needed any more."""
        if source != target:
            self._set(target, self._get(source))
            self._jobs[target] = self._jobs[source]

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            first, second = self._get(one), self._get(other)
            self._set(one, second)
            self._set(other, first)
            self._jobs[one], self._jobs[other] = self._jobs[other], self._jobs[one]

    def _get(self, row: int) -> State:
        return self._session.get_rows(range(row, row + 1))

    def _set(self, row: int, state: State) -> None:
        self._session.set_rows(range(row, row + 1), state)


def count_by_client(jobs: Iterable[Job]) -> Counter[str]:
    """Returns the number of jobs by client."""
    return Counter(job.request.client for job in jobs)
