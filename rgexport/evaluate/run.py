"""Runs suites: measures the missing pieces in this process or on a cluster, and summarizes."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from uuid import uuid4

from rgexport.errors import RequestError
from rgexport.evaluate.models import EvaluatedModel, open_model
from rgexport.evaluate.pieces import (
    Chain,
    EvaluationRequest,
    Measured,
    Piece,
    Result,
    Results,
    Settings,
    chains_of,
)
from rgexport.evaluate.suites import BY_DEFAULT, SUITES, forget_files
from rgexport.progress import note, task
from rgexport.runtimes.cluster import Cluster
from rgexport.runtimes.machine import environment
from rgexport.runtimes.session import Session

Chains = Sequence[tuple[EvaluatedModel, Sequence[Chain]]]
"""Chains to measure of each model."""


def requested_suites(names: Sequence[str], task_names: Sequence[str] = ()) -> list[str]:
    """Returns these suites, by default `BY_DEFAULT`; task names add the suite `tasks`.

    Raises:
        RequestError: there is no such suite, or no task for the suite `tasks`.
    """
    for name in names:
        if name not in SUITES:
            raise RequestError(f"the suite is {name!r}; expected one of {', '.join(SUITES)}")
    if "tasks" in names and not task_names:
        raise RequestError(
            "--suite tasks needs --task NAME: a task of lm_eval, or one of --task-files"
        )
    requested = {*(names or BY_DEFAULT), *(["tasks"] if task_names else [])}
    return [name for name in SUITES if name in requested]


def evaluate(
    models: Sequence[EvaluatedModel],
    names: Sequence[str],
    request: EvaluationRequest,
    *,
    threads: int | None = None,
    workers: Cluster | None = None,
) -> Result:
    """Runs the named suites on all models, which are compared with the first one.

    Results in the request's folder are reused. The cluster measures, or else this process does.
    """
    request = request.for_window(max(model.config.window for model in models))
    pieces = [
        [piece for name in names for piece in SUITES[name].pieces(model, request)]
        for model in models
    ]
    results = Results(request.folder)  # is not created for a wrong request
    missing = [
        (model, [todo for chain in chains_of(planned) if (todo := results.missing(chain))])
        for model, planned in zip(models, pieces, strict=True)
    ]
    total = sum(map(len, pieces))
    remaining = sum(len(chain) for _, chains in missing for chain in chains)
    if remaining < total:
        note(f"{total - remaining} of {total} pieces are done already.")
    if workers:
        _run_on_cluster(missing, request, threads, workers)
    else:
        _run_here(missing, request, threads, results)
    measured = [_by_suite(names, planned, results, request) for planned in pieces]
    figures = [
        _figures(model, suites, measured[0]) for model, suites in zip(models, measured, strict=True)
    ]
    return {"request": request.to_dict(), "environment": environment(), "models": figures}


def _run_here(
    missing: Chains, request: EvaluationRequest, threads: int | None, results: Results
) -> None:
    for model, chains in missing:
        if not chains:
            continue
        with (
            closing(Worker(threads)) as worker,
            task(f"Evaluating {model.label}", _tokens(chains), "tokens") as advance,
        ):
            for chain in chains:
                worker.measure(model, chain, request, results, advance)


def _run_on_cluster(
    missing: Chains, request: EvaluationRequest, threads: int | None, workers: Cluster
) -> None:
    request, run = request.resolved(), uuid4().hex
    jobs = [
        ChainJob(run, model.argument, chain, request, threads, model.allow_foreign)
        for model, chains in missing
        for chain in chains
    ]
    with task("Evaluating on the cluster", _tokens([j.chain for j in jobs]), "tokens") as advance:
        futures = [workers.start(run_job, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            workers.result(future)
            advance(_tokens([job.chain]))
    workers.everywhere(clear_worker)


def _tokens(chains: Sequence[Chain]) -> int:
    return sum(piece.tokens for chain in chains for piece in chain)


def _by_suite(
    names: Sequence[str], pieces: Sequence[Piece], results: Results, request: EvaluationRequest
) -> dict[str, Measured]:
    suites: dict[str, list[tuple[Settings, Result]]] = {name: [] for name in names}
    for piece in pieces:
        if (result := results.get(piece)) is None:
            raise RequestError(
                f"the result of a piece is gone from {request.folder}; run the command again"
            )
        suites[piece.suite].append((piece.settings, result))
    for name, measured in suites.items():
        if scored := getattr(SUITES[name], "scored", None):
            suites[name] = scored(measured, request)
    return {**suites}


def _figures(
    model: EvaluatedModel, measured: Mapping[str, Measured], first: Mapping[str, Measured]
) -> Result:
    suites = {name: SUITES[name].summary(results) for name, results in measured.items()}
    figures: Result = {"label": model.label, "bytes": model.size, "suites": suites}
    if measured is not first:
        figures["differences"] = {
            name: SUITES[name].differences(first[name], rest) for name, rest in measured.items()
        }
    return figures


class Worker:
    """Measures chains; the session of the last model and window stays open."""

    def __init__(self, threads: int | None = None):
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
        """Measures the missing pieces of a chain; `advance` gets the tokens of each piece."""
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
    """A chain, and everything that another process needs to measure it; a command has one `run`."""

    run: str
    argument: str
    chain: Chain
    request: EvaluationRequest
    threads: int | None
    allow_foreign: bool


_lock = RLock()
"""The threads of a Dask worker take turns."""
_workers: dict[str, Worker] = {}
"""The last `ChainJob.run` → its worker, in a process of a cluster."""


def run_job(job: ChainJob) -> None:
    """Measures the missing pieces of a chain; a lost worker may have measured some."""
    folder = job.request.folder
    with _lock:
        if not folder.is_dir():
            raise RequestError(
                f"a worker of the cluster does not see {folder}; put it where all workers see it "
                "under this path, with -o"
            )
        if job.run not in _workers:
            clear_worker()
            forget_files()
            _workers[job.run] = Worker(job.threads)
        model = _model(job.argument, job.allow_foreign)
        if model.identity != job.chain[0].model:
            raise RequestError(
                f"a worker of the cluster has other files at {job.argument}; put the same there"
            )
        _workers[job.run].measure(model, job.chain, job.request, Results(folder))


@lru_cache(maxsize=1)
def _model(argument: str, allow_foreign: bool) -> EvaluatedModel:
    try:
        return open_model(argument, allow_foreign=allow_foreign)
    except RequestError as error:
        raise RequestError(
            f"a worker of the cluster cannot open {argument}: {error}; put it where all workers "
            "see it under this path"
        ) from None


def clear_worker() -> None:
    with _lock:
        for worker in _workers.values():
            worker.close()
        _workers.clear()
        _model.cache_clear()
