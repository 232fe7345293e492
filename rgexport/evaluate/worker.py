"""Does pieces, in this process or in a worker of a cluster."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from rgexport.errors import RequestError
from rgexport.evaluate.harness.tasks import load_tasks
from rgexport.evaluate.pieces import Chain, Piece, Results, unfinished
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject, open_subject
from rgexport.evaluate.suites import SUITES
from rgexport.evaluate.suites.text import documents
from rgexport.runtimes.session import Session


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
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Does what is missing of a chain of one model, and keeps what each piece gave.

        `advance` gets the tokens of each.

        Raises:
            RequestError: the model cannot be opened or measured.
        """
        with results.alone(chain):
            missing = unfinished(chain, results)
            advance(sum(piece.tokens for piece in chain if piece not in missing))
            followed = {piece.after for piece in missing}
            for piece in missing:
                self._do(subject, piece, request, results, piece.key in followed)
                advance(piece.tokens)

    def close(self) -> None:
        """Closes the session."""
        if self._session is not None:
            self._session.close()
        self._session = self._of = None

    def _do(
        self, subject: Subject, piece: Piece, request: Request, results: Results, followed: bool
    ) -> None:
        """Does one piece; its state is kept if another one goes on from it."""
        session = self._opened(subject, piece.work.get("window"))
        if piece.after:
            session.set_state(results.state(piece.after))
        began = time.perf_counter()
        found = SUITES[piece.suite].measure(subject, session, piece.work, request)
        seconds = time.perf_counter() - began
        if followed:
            results.keep_state(piece.key, session.get_state())
        results.put(piece, found | {"seconds": seconds, "threads": session.info.threads})
        if piece.after:
            results.drop_state(piece.after)

    def _opened(self, subject: Subject, window: int | None) -> Session:
        of = subject.identity, window
        if self._session is None or self._of != of:
            self.close()
            self._session, self._of = subject.session(window, self._threads), of
        return self._session


@dataclass(frozen=True)
class Job:
    """A chain, and what another process needs for it.

    `run` is another text for each command: files may change between them.
    """

    run: str
    argument: str
    chain: Chain
    request: Request
    threads: int | None
    allow_foreign: bool = False


class _Kept:
    """What a process of a cluster keeps from job to job of one command."""

    def __init__(self, run: str, threads: int | None):
        self.run, self.worker = run, Worker(threads)
        self._subjects: dict[str, Subject] = {}
        for function in (documents, load_tasks):
            function.cache_clear()

    def subject(self, job: Job) -> Subject:
        argument, identity = job.argument, job.chain[0].subject
        if argument not in self._subjects:
            try:
                opened = open_subject(argument, allow_foreign=job.allow_foreign)
                self._subjects = {argument: opened}
            except RequestError as error:
                raise RequestError(
                    f"a worker of the cluster cannot open {argument}: {error}; put it where all "
                    "workers see it under this path"
                ) from None
        if self._subjects[argument].identity != identity:
            raise RequestError(
                f"a worker of the cluster has other files at {argument}; put the same there"
            )
        return self._subjects[argument]


_lock = Lock()
"""The threads of a Dask worker take turns."""
_kept: _Kept | None = None


def do_job(job: Job) -> None:
    """Does what is missing of a chain; a worker that was lost may have done a part.

    Raises:
        RequestError: this machine does not see the model, the texts or the folder of the results;
            or see `Worker.do`.
    """
    global _kept
    with _lock:
        if not job.request.folder.is_dir():
            raise RequestError(
                f"a worker of the cluster does not see {job.request.folder}; put it where all "
                "workers see it under this path, with -o"
            )
        if _kept is None or _kept.run != job.run:
            _close()
            _kept = _Kept(job.run, job.threads)
        subject = _kept.subject(job)
        _kept.worker.do(subject, job.chain, job.request, Results(job.request.folder))


def forget() -> None:
    """Gives back what a process of a cluster has kept."""
    with _lock:
        _close()


def _close() -> None:
    global _kept
    if _kept is not None:
        _kept.worker.close()
    _kept = None
