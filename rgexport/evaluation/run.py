"""Runs suites: measures the missing pieces in this process or on a cluster, and summarizes."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby
from threading import RLock
from typing import NamedTuple
from uuid import uuid4

from rgexport.errors import RequestError
from rgexport.evaluation.models import EvaluatedModel, Opener, open_model
from rgexport.evaluation.pieces import Chain, EvaluationRequest, Measured, Result, Results, Settings
from rgexport.evaluation.suites import BY_DEFAULT, SUITES, forget_files
from rgexport.progress import note, task
from rgexport.runtimes.cluster import Cluster
from rgexport.runtimes.machine import environment
from rgexport.runtimes.session import Session
from rgexport.units import amount


class Job(NamedTuple):
    """An unfinished chain of a model, with the indices of the missing pieces."""

    model: EvaluatedModel
    chain: Chain
    missing: Sequence[int]

    @property
    def tokens(self) -> int:
        return sum(self.chain[index].tokens for index in self.missing)


def requested_suites(names: Sequence[str], task_names: Sequence[str] = ()) -> list[str]:
    """Returns these suites, by default `BY_DEFAULT`; task names add the suite `tasks`.

    Raises RequestError: there is no task for the suite `tasks`.
    """
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
    chains = [
        [chain for name in names for chain in SUITES[name].chains(model, request)]
        for model in models
    ]
    results = Results(request.folder)  # is not created for a wrong request
    jobs = [
        Job(model, chain, missing)
        for model, planned in zip(models, chains, strict=True)
        for chain in planned
        if (missing := results.missing(chain))
    ]
    _announce(jobs, sum(len(chain) for planned in chains for chain in planned))
    try:
        if workers:
            _run_on_cluster(jobs, request, threads, workers)
        elif jobs:
            _run_here(jobs, request, threads, results)
    except KeyboardInterrupt:
        note("Interrupted. The same command goes on from here.")
        raise
    measured = [_by_suite(names, planned, results, request) for planned in chains]
    figures = [
        _figures(model, suites, measured[0]) for model, suites in zip(models, measured, strict=True)
    ]
    return {"request": asdict(request), "environment": environment(), "models": figures}


def _announce(jobs: Sequence[Job], total: int) -> None:
    """Notes how much is done already, and how many tokens each suite reads, which take the time."""
    if done := total - sum(len(job.missing) for job in jobs):
        note(f"{done} of {total} pieces are done already.")
    tokens: Counter[str] = Counter()
    for piece in (job.chain[index] for job in jobs for index in job.missing):
        tokens[piece.suite] += piece.tokens
    if len(tokens) > 1:
        counts = ", ".join(f"{amount(size, 'tokens')} in {name}" for name, size in tokens.items())
        (shortest, _) = tokens.most_common()[-1]
        note(f"To read: {counts}. To read less, name a suite: --suite {shortest}")


def _run_here(
    jobs: Sequence[Job], request: EvaluationRequest, threads: int | None, results: Results
) -> None:
    labels = ", ".join(dict.fromkeys(job.model.label for job in jobs))
    with task(f"Evaluating {labels}", sum(job.tokens for job in jobs), "tokens") as advance:
        for model, of_model in groupby(jobs, lambda job: job.model):
            with closing(Worker(threads)) as worker:
                for job in of_model:
                    worker.measure(model, job.chain, request, results, advance)


def _run_on_cluster(
    jobs: Sequence[Job], request: EvaluationRequest, threads: int | None, workers: Cluster
) -> None:
    request, run = request.resolved(), uuid4().hex
    tokens = sum(job.tokens for job in jobs)
    with task("Evaluating on the cluster", tokens, "tokens") as advance:
        futures = [
            workers.start(run_job, run, job.model.opener, job.chain, request, threads)
            for job in jobs
        ]
        for job, future in zip(jobs, futures, strict=True):
            workers.result(future)
            advance(job.tokens)
    workers.everywhere(clear_worker)


def _by_suite(
    names: Sequence[str], chains: Sequence[Chain], results: Results, request: EvaluationRequest
) -> dict[str, Measured]:
    suites: dict[str, list[tuple[Settings, Result]]] = {name: [] for name in names}
    for chain in chains:
        for piece in chain:
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
            for index in missing:
                piece, before = chain[index], chain[index - 1] if index else None
                session = self._session_of(model, piece.settings.get("window"))
                if before:
                    session.set_state(results.state(before))
                began = time.perf_counter()
                result = SUITES[piece.suite].measure(model, session, piece.settings, request)
                seconds = time.perf_counter() - began
                if index + 1 in missing:
                    results.keep_state(piece, session.get_state())
                results.put(piece, result | {"seconds": seconds, "threads": session.info.threads})
                if before:
                    results.drop_state(before)
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


_lock = RLock()  # the threads of a Dask worker take turns
_workers: dict[str, Worker] = {}  # the last run → its worker, in a process of a cluster


def run_job(
    run: str, opener: Opener, chain: Chain, request: EvaluationRequest, threads: int | None
) -> None:
    """Measures the missing pieces of a chain; a lost worker may have measured some.

    `run` differs between commands, between which files may change.
    """
    folder = request.folder
    with _lock:
        if not folder.is_dir():
            raise RequestError(
                f"a worker of the cluster does not see {folder}; put it where all workers see it "
                "under this path, with -o"
            )
        if run not in _workers:
            clear_worker()
            forget_files()
            _workers[run] = Worker(threads)
        model = _model(opener)
        if model.identity != chain[0].model:
            raise RequestError(
                f"a worker of the cluster has other files at {opener[0]}; put the same there"
            )
        _workers[run].measure(model, chain, request, Results(folder))


@lru_cache(maxsize=1)
def _model(opener: Opener) -> EvaluatedModel:
    argument, allow_foreign = opener
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
