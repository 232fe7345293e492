"""The batch rows of a session, and the jobs in them."""

from collections.abc import Iterator

import numpy as np

from rgexport.chat.jobs import GenerationJob
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import Session


class Rows:
    """Jobs in the order of their batch rows; the session gets `capacity` rows.

    Jobs that decode have the first rows, for one range of rows in a step. Only the scheduler's
    thread may call methods; other threads may read the length.
    """

    def __init__(self, session: Session, capacity: int) -> None:
        session.reset(capacity)
        self._session = session
        self.capacity = capacity
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
        """Whether each row has a job."""
        return len(self._jobs) == self.capacity

    @property
    def decoding(self) -> list[GenerationJob]:
        """The jobs that take part in the next step, in the order of their rows."""
        return self._jobs[: self._num_decoding]

    @property
    def not_decoding(self) -> list[GenerationJob]:
        """The jobs that read their prompts, or wait for a mask."""
        return self._jobs[self._num_decoding :]

    def add(self, job: GenerationJob) -> None:
        """Gives a job the next free row, which does not decode yet."""
        self._jobs.append(job)

    def state(self, job: GenerationJob) -> State:
        """Returns a copy of the state of a job's row."""
        return self._get(self._jobs.index(job))

    def set_state(self, job: GenerationJob, state: State | None) -> None:
        """Sets the state of a job's row; None is the state before any token."""
        if state is None:
            state = self._initial
        self._set(self._jobs.index(job), state)

    def row_range(self, job: GenerationJob) -> range:
        """Returns the range of a job's row alone."""
        row = self._jobs.index(job)
        return range(row, row + 1)

    def start_decoding(self, job: GenerationJob) -> None:
        """Lets a job take part in the next step."""
        self._swap(self._jobs.index(job), self._num_decoding)
        self._num_decoding += 1

    def stop_decoding(self, job: GenerationJob) -> None:
        """Takes a job out of the next step; it keeps a row."""
        self._num_decoding -= 1
        self._swap(self._jobs.index(job), self._num_decoding)

    def remove(self, job: GenerationJob) -> None:
        """Frees the row of a job."""
        row = self._jobs.index(job)
        # The last decoding job fills the gap, then the last job fills the gap that this leaves.
        if row < self._num_decoding:
            self._num_decoding -= 1
            self._move(self._num_decoding, row)
            row = self._num_decoding
        self._move(len(self._jobs) - 1, row)
        self._jobs.pop()

    def clear(self) -> list[GenerationJob]:
        """Frees all rows; returns their jobs."""
        jobs = self._jobs
        self._jobs = []
        self._num_decoding = 0
        return jobs

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._set(target, self._get(source))
            self._jobs[target] = self._jobs[source]

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        state_a = self._get(a)
        state_b = self._get(b)
        self._set(a, state_b)
        self._set(b, state_a)
        self._jobs[a], self._jobs[b] = self._jobs[b], self._jobs[a]

    def _get(self, row: int) -> State:
        return self._session.get_rows(range(row, row + 1))

    def _set(self, row: int, state: State) -> None:
        self._session.set_rows(range(row, row + 1), state)
