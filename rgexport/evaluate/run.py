"""Runs suites: measures the missing pieces in this process or on a cluster, and summarizes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from uuid import uuid4

from rgexport.errors import RequestError
from rgexport.evaluate.models import EvaluatedModel
from rgexport.evaluate.pieces import Chain, Measured, Piece, Result, Results, chains_of
from rgexport.evaluate.request import EvaluationRequest
from rgexport.evaluate.suites import BY_DEFAULT, SUITES, memory, tasks
from rgexport.evaluate.worker import ChainJob, Worker, clear_worker, run_job
from rgexport.progress import note, task
from rgexport.runtimes.cluster import Cluster
from rgexport.runtimes.machine import environment


def require_known(names: Sequence[str], task_names: Sequence[str] = ()) -> list[str]:
    """Returns the requested suites, by default `BY_DEFAULT`; task names add the suite `tasks`.

    Raises:
        RequestError: there is no such suite, or no task for the suite `tasks`.
    """
    for name in names:
        if name not in SUITES:
            raise RequestError(f"--suite is {name!r}; expected one of {', '.join(SUITES)}")
    if tasks.NAME in names and not task_names:
        raise RequestError(
            "--suite tasks needs --task NAME: a task of lm_eval, or one of --task-files"
        )
    requested = {*(names or BY_DEFAULT), *([tasks.NAME] if task_names else [])}
    return [name for name in SUITES if name in requested]


def evaluate(
    models: Sequence[EvaluatedModel],
    names: Sequence[str],
    request: EvaluationRequest,
    *,
    threads: int | None = None,
    workers: Cluster | None = None,
) -> Result:
    """Runs all suites on all models, and reuses the results in the folder.

    Args:
        models: the first is what the others are compared with.
        names: of the suites.
        request: for all of them.
        threads: of a session; by default, all processors that a process may use.
        workers: the cluster that measures; by default, this process does.

    Raises:
        RequestError: a model or a text does not fit a suite, or cannot be opened.
    """
    if request.farthest is None:
        window = max(model.window for model in models)
        request = replace(request, farthest=memory.farthest(window))
    pieces = [
        [piece for name in names for piece in SUITES[name].pieces(model, request)]
        for model in models
    ]
    results = Results(request.folder)  # is not created for a wrong request
    missing = [
        [todo for chain in chains_of(planned) if (todo := results.missing(chain))]
        for planned in pieces
    ]
    total = sum(map(len, pieces))
    remaining = sum(len(chain) for chains in missing for chain in chains)
    if remaining < total:
        note(f"{total - remaining} of {total} pieces are done already.")
    if workers:
        _run_on_cluster(models, missing, request, threads, workers)
    else:
        _run_here(models, missing, request, results, threads)
    measured = [_by_suite(names, planned, results, request) for planned in pieces]
    summaries = [
        _summary(model, suites, measured[0]) for model, suites in zip(models, measured, strict=True)
    ]
    return {"request": request.to_dict(), "environment": environment(), "models": summaries}


def _run_here(
    models: Sequence[EvaluatedModel],
    missing: Sequence[Sequence[Chain]],
    request: EvaluationRequest,
    results: Results,
    threads: int | None,
) -> None:
    for model, chains in zip(models, missing, strict=True):
        if not chains:
            continue
        worker = Worker(threads)
        try:
            with task(f"Evaluating {model.label}", _tokens(chains), "tokens") as advance:
                for chain in chains:
                    worker.measure(model, chain, request, results, advance)
        finally:
            worker.close()


def _run_on_cluster(
    models: Sequence[EvaluatedModel],
    missing: Sequence[Sequence[Chain]],
    request: EvaluationRequest,
    threads: int | None,
    workers: Cluster,
) -> None:
    """Makes a job of each chain; the workers write the results into the folder."""
    request, run = request.resolved(), uuid4().hex
    jobs = [
        ChainJob(run, model.argument, chain, request, threads, model.allow_foreign)
        for model, chains in zip(models, missing, strict=True)
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
    """Groups the results of all pieces by suite; lm_eval scores the suite `tasks`."""
    suites: dict[str, list[tuple[Mapping[str, object], Result]]] = {name: [] for name in names}
    for piece in pieces:
        result = results.get(piece)
        if result is None:
            raise RequestError(
                f"the result of a piece is gone from {request.folder}; run the command again"
            )
        suites[piece.suite].append((piece.settings, result))
    if tasks.NAME in suites:
        suites[tasks.NAME] = tasks.scored(suites[tasks.NAME], request)
    return {**suites}


def _summary(
    model: EvaluatedModel, measured: Mapping[str, Measured], first: Mapping[str, Measured]
) -> Result:
    """Returns the figures of a model, and its differences to the first model."""
    suites = {name: SUITES[name].summary(results) for name, results in measured.items()}
    summary = {"label": model.label, "bytes": model.size, "suites": suites}
    if measured is first:
        return summary
    differences = {
        name: SUITES[name].differences(first[name], results) for name, results in measured.items()
    }
    return summary | {"differences": differences}
