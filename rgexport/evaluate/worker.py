"""Does pieces, in this process or in a worker of a cluster."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from rgexport.errors import RequestError
from rgexport.evaluate.pieces import Piece, Results
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject, open_subject
from rgexport.evaluate.suites import SUITES
from rgexport.runtimes.session import Session

Chain = Sequence[Piece]
"""Pieces that go on from one another: one process does them, one after another."""


class Worker:
    """Keeps the session of the last model, and of its window."""

    def __init__(self, threads: int | None = None):
        """`threads` are those of a session; by default, all that this process may use."""
        self._threads = threads
        self._session: Session | None = None
        self._of: tuple[str, int | None] | None = None

    def do(
        self,
        subject: Subject,
        chain: Chain,
        request: Request,
        results: Results,
        advance: Callable[[int], None],
    ) -> None:
        """Does pieces of one model, and keeps what each gave; `advance` gets the tokens read.

        Raises:
            RequestError: the model cannot be opened or measured.
        """
        for piece in chain:
            session = self._opened(subject, piece.work.get("window"))
            if piece.after:
                session.set_state(results.state(piece.after))
            began = time.perf_counter()
            found = SUITES[piece.suite].measure(subject, session, piece.work, request)
            seconds = time.perf_counter() - began
            if piece.leaves:
                results.keep_state(piece.key, session.get_state())
            results.put(piece, found | {"seconds": seconds})
            if piece.after:
                results.drop_state(piece.after)
            advance(piece.tokens)

    def close(self) -> None:
        """Closes the session."""
        if self._session is not None:
            self._session.close()
        self._session = self._of = None

    def _opened(self, subject: Subject, window: int | None) -> Session:
        of = subject.identity, window
        if self._session is None or self._of != of:
            self.close()
            self._session, self._of = subject.session(window, self._threads), of
        return self._session


@dataclass(frozen=True)
class Job:
    """A chain, and what another process needs for it."""

    argument: str
    chain: Chain
    request: Request
    threads: int | None


_lock = Lock()
_worker: Worker | None = None
"""Of this process: the threads of a Dask worker take turns."""
_subjects: dict[tuple[str, str], Subject] = {}
"""By the argument, and the identity that was asked for."""


def do_job(job: Job) -> None:
    """Does what is missing of a chain; a worker that was lost may have done a part.

    Raises:
        RequestError: this machine does not see the model, the texts or the folder of the results;
            or see `Worker.do`.
    """
    global _worker
    with _lock:
        if not job.request.folder.is_dir():
            raise RequestError(
                f"a worker of the cluster does not see {job.request.folder}; put it where all "
                "workers see it under this path, with -o"
            )
        results = Results(job.request.folder)
        subject = _subject(job.argument, job.chain[0].subject)
        _worker = _worker or Worker(job.threads)
        missing = unfinished(job.chain, results)
        _worker.do(subject, missing, job.request, results, lambda tokens: None)


def _subject(argument: str, identity: str) -> Subject:
    if (argument, identity) not in _subjects:
        try:
            found = open_subject(argument)
        except RequestError as error:
            raise RequestError(
                f"a worker of the cluster cannot open {argument}: {error}; put it where all "
                "workers see it under this path"
            ) from None
        if found.identity != identity:
            raise RequestError(f"a worker of the cluster has other files at {argument}")
        _subjects.clear()
        _subjects[argument, identity] = found
    return _subjects[argument, identity]


def unfinished(chain: Chain, results: Results) -> list[Piece]:
    """The pieces of a chain that have to be done, also again for the sake of a state that is lost.

    A piece that is to be done needs the state of the one before it.
    """
    found: list[Piece] = []
    for piece in reversed(chain):
        needed = bool(found) and found[-1].after == piece.key
        if results.get(piece) is None or (needed and not results.has_state(piece.key)):
            found.append(piece)
    return found[::-1]
