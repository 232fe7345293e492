"""Measures pieces, in this process or in a worker of a cluster."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from rgexport.errors import RequestError
from rgexport.evaluate.harness.tasks import load_tasks
from rgexport.evaluate.models import EvaluatedModel, open_model
from rgexport.evaluate.pieces import Chain, Results
from rgexport.evaluate.request import EvaluationRequest
from rgexport.evaluate.suites import SUITES
from rgexport.evaluate.suites.text import documents
from rgexport.runtimes.session import Session


class Worker:
    """Measures chains; the session of the last model and window stays open."""

    def __init__(self, threads: int | None = None):
        """Opens sessions with `threads` threads; by default, with all that this process may use."""
        self._threads = threads
        self._session: Session | None = None
        self._opened: tuple[str, int | None] | None = None

    def measure(
        self,
        model: EvaluatedModel,
        chain: Chain,
        request: EvaluationRequest,
        results: Results,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        """Measures the missing pieces of a chain; `advance` gets the tokens of each piece.

        Raises:
            RequestError: the model cannot be opened or measured.
        """
        with results.lock(chain):
            missing = results.missing(chain)
            advance(sum(piece.tokens for piece in chain if piece not in missing))
            states = {piece.after for piece in missing}
            for piece in missing:
                session = self._session_of(model, piece.settings.get("window"))
                if piece.after:
                    session.set_state(results.state(piece.after))
                began = time.perf_counter()
                result = SUITES[piece.suite].measure(model, session, piece.settings, request)
                seconds = time.perf_counter() - began
                if piece.key in states:
                    results.keep_state(piece.key, session.get_state())
                results.put(piece, result | {"seconds": seconds, "threads": session.info.threads})
                if piece.after:
                    results.drop_state(piece.after)
                advance(piece.tokens)

    def close(self) -> None:
        """Closes the session."""
        if self._session is not None:
            self._session.close()
        self._session = self._opened = None

    def _session_of(self, model: EvaluatedModel, window: int | None) -> Session:
        if self._session is None or self._opened != (model.identity, window):
            self.close()
            self._session = model.session(window, self._threads)
            self._opened = model.identity, window
        return self._session


@dataclass(frozen=True)
class ChainJob:
    """A chain, and what another process needs to measure it.

    `run` differs between commands: files may change between them.
    """

    run: str
    argument: str
    chain: Chain
    request: EvaluationRequest
    threads: int | None
    allow_foreign: bool = False


class _RunCache:
    """The session and the models of one command, in a process of a cluster."""

    def __init__(self, run: str, threads: int | None):
        self.run, self.worker = run, Worker(threads)
        self._models: dict[str, EvaluatedModel] = {}
        for function in (documents, load_tasks):
            function.cache_clear()

    def model(self, job: ChainJob) -> EvaluatedModel:
        argument = job.argument
        if argument not in self._models:
            try:
                self._models = {argument: open_model(argument, allow_foreign=job.allow_foreign)}
            except RequestError as error:
                raise RequestError(
                    f"a worker of the cluster cannot open {argument}: {error}; put it where all "
                    "workers see it under this path"
                ) from None
        if self._models[argument].identity != job.chain[0].model:
            raise RequestError(
                f"a worker of the cluster has other files at {argument}; put the same there"
            )
        return self._models[argument]


_lock = Lock()
"""The threads of a Dask worker take turns."""
_cache: _RunCache | None = None


def run_job(job: ChainJob) -> None:
    """Measures the missing pieces of a chain; a lost worker may have measured some.

    Raises:
        RequestError: this machine does not see the model, the texts or the folder of the results,
            or `Worker.measure` fails.
    """
    global _cache
    with _lock:
        if not job.request.folder.is_dir():
            raise RequestError(
                f"a worker of the cluster does not see {job.request.folder}; put it where all "
                "workers see it under this path, with -o"
            )
        if _cache is None or _cache.run != job.run:
            _close_cache()
            _cache = _RunCache(job.run, job.threads)
        model = _cache.model(job)
        _cache.worker.measure(model, job.chain, job.request, Results(job.request.folder))


def clear_worker() -> None:
    """Closes the session and the models that a process of a cluster keeps open."""
    with _lock:
        _close_cache()


def _close_cache() -> None:
    global _cache
    if _cache is not None:
        _cache.worker.close()
    _cache = None
