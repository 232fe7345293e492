"""The rows of a session, and the jobs that have them."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from rgexport.chat.jobs import GenerationJob
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import Session


class Rows:
    """Jobs in the order of their rows; those that decode come first, so that a step is one range.

    The others read their prompts, or wait for a mask. Only one thread may change it; other threads
    may read its length.
    """

    def __init__(self, session: Session, capacity: int) -> None:
        """Empties the session, and takes the maximum number of jobs."""
        session.reset(capacity)
        self._session, self.capacity = session, capacity
        self._empty: State = {name: np.zeros((1, *s)) for name, s in session.state_shapes.items()}
        self._empty[POSITION] = np.zeros(1, np.int64)
        self._jobs: list[GenerationJob] = []
        self._writing = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[GenerationJob]:
        return iter(self._jobs)

    @property
    def is_full(self) -> bool:
        return len(self._jobs) == self.capacity

    @property
    def writing(self) -> list[GenerationJob]:
        """The jobs of the next step, which have the rows from 0 on."""
        return self._jobs[: self._writing]

    @property
    def reading(self) -> list[GenerationJob]:
        """The jobs that are not in the next step."""
        return self._jobs[self._writing :]

    def add(self, job: GenerationJob) -> None:
        """Gives a job the next row, whose state is not set yet."""
        self._jobs.append(job)

    def state(self, job: GenerationJob) -> State:
        return self._get(self._jobs.index(job))

    def set_state(self, job: GenerationJob, state: State | None) -> None:
        """Sets the state of a job's row; None sets the state before any token."""
        self._set(self._jobs.index(job), self._empty if state is None else state)

    def range(self, job: GenerationJob) -> range:
        row = self._jobs.index(job)
        return range(row, row + 1)

    def start_writing(self, job: GenerationJob) -> None:
        self._swap(self._jobs.index(job), self._writing)
        self._writing += 1

    def stop_writing(self, job: GenerationJob) -> None:
        self._writing -= 1
        self._swap(self._jobs.index(job), self._writing)

    def remove(self, job: GenerationJob) -> None:
        row = self._jobs.index(job)
        if row < self._writing:
            self._writing -= 1
            self._move(self._writing, row)
            row = self._writing
        self._move(len(self._jobs) - 1, row)
        self._jobs.pop()

    def clear(self) -> list[GenerationJob]:
        """Frees all rows without reading their states; returns the jobs that had them."""
        jobs, self._jobs, self._writing = self._jobs, [], 0
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
