"""Runs suites: does what is missing, here or on a cluster, and sums up."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from rgexport.errors import RequestError
from rgexport.evaluate.pieces import Chain, Piece, Result, Results, unfinished
from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import Subject
from rgexport.evaluate.suites import BY_DEFAULT, SUITES, memory, tasks
from rgexport.evaluate.worker import Job, Worker, do_job, forget
from rgexport.progress import note, task
from rgexport.runtimes.cluster import Cluster
from rgexport.runtimes.environment import environment

Found = tuple[Mapping[str, Any], Result]
"""The work of a piece, and what it gave."""


def require_known(names: Sequence[str], asked: Sequence[str] = ()) -> list[str]:
    """The suites that are asked for; those of `BY_DEFAULT` where none is.

    `asked` are the tasks of the suite `tasks`.

    Raises:
        RequestError: there is no such suite, or no task for it.
    """
    for name in names:
        if name not in SUITES:
            raise RequestError(f"--suite is {name!r}; expected one of {', '.join(SUITES)}")
    if tasks.NAME in names and not asked:
        raise RequestError(
            "--suite tasks needs --task NAME: a task of lm_eval, or one of --task-files"
        )
    wanted = {*(names or BY_DEFAULT), *([tasks.NAME] if asked else [])}
    return [name for name in SUITES if name in wanted]


def evaluate(
    subjects: Sequence[Subject],
    names: Sequence[str],
    request: Request,
    *,
    threads: int | None = None,
    workers: Cluster | None = None,
) -> Result:
    """All suites on all models; what the folder has is not done again.

    Args:
        subjects: the first is what the others are compared with.
        names: of the suites.
        request: for all of them.
        threads: of a session; by default, all that a process may use.
        workers: of a cluster, that do the work; by default, this process does.

    Raises:
        RequestError: a model or a text does not fit a suite, or cannot be opened.
    """
    if request.farthest is None:
        window = max(subject.window for subject in subjects)
        request = replace(request, farthest=memory.farthest(window))
    planned = [
        (subject, [piece for name in names for piece in SUITES[name].pieces(subject, request)])
        for subject in subjects
    ]
    results = Results(request.folder)  # which is not made for a wrong request
    _do(planned, request, results, threads, workers)
    found = [_by_suite(names, own, results, request) for _, own in planned]
    models = [_summed(subject, own, found[0]) for subject, own in zip(subjects, found, strict=True)]
    return {"request": request.to_dict(), "environment": environment(), "models": models}


def _do(
    planned: Sequence[tuple[Subject, Sequence[Piece]]],
    request: Request,
    results: Results,
    threads: int | None,
    workers: Cluster | None,
) -> None:
    missing = [
        (subject, [todo for chain in _chains(own) if (todo := unfinished(chain, results))])
        for subject, own in planned
    ]
    every = sum(len(own) for _, own in planned)
    left = sum(len(chain) for _, chains in missing for chain in chains)
    if left < every:
        note(f"{every - left} of {every} pieces are done already.")
    if workers:
        _spread(missing, request, threads, workers)
    else:
        _here(missing, request, results, threads)


def _chains(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in their order; those that go on from the one before are in one chain."""
    chains: list[list[Piece]] = []
    for piece in pieces:
        if piece.after and chains and chains[-1][-1].key == piece.after:
            chains[-1].append(piece)
        else:
            chains.append([piece])
    return chains


Missing = Sequence[tuple[Subject, Sequence[Chain]]]


def _here(missing: Missing, request: Request, results: Results, threads: int | None) -> None:
    for subject, chains in missing:
        if not chains:
            continue
        worker = Worker(threads)
        try:
            with task(f"Evaluating {subject.label}", _tokens(chains), "tokens") as advance:
                for chain in chains:
                    worker.do(subject, chain, request, results, advance)
        finally:
            worker.close()


def _spread(missing: Missing, request: Request, threads: int | None, workers: Cluster) -> None:
    """Each chain is a job; the workers keep what pieces gave, in the folder of the results."""
    request, run = request.resolved(), uuid4().hex
    jobs = [
        Job(run, subject.argument, chain, request, threads, subject.allow_foreign)
        for subject, chains in missing
        for chain in chains
    ]
    with task("Evaluating on the cluster", _tokens([j.chain for j in jobs]), "tokens") as advance:
        futures = [workers.start(do_job, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            workers.result(future)
            advance(_tokens([job.chain]))
    workers.everywhere(forget)


def _tokens(chains: Sequence[Chain]) -> int:
    return sum(piece.tokens for chain in chains for piece in chain)


def _by_suite(
    names: Sequence[str], own: Sequence[Piece], results: Results, request: Request
) -> dict[str, list[Found]]:
    """What pieces gave; of `tasks`, what lm_eval makes of it."""
    found: dict[str, list[Found]] = {name: [] for name in names}
    for piece in own:
        result = results.get(piece)
        if result is None:
            raise RequestError(f"the result of a piece is gone from {results}; run it again")
        found[piece.suite].append((piece.work, result))
    if tasks.NAME in found:
        found[tasks.NAME] = tasks.scored(found[tasks.NAME], request)
    return found


def _summed(
    subject: Subject, own: Mapping[str, list[Found]], first: Mapping[str, list[Found]]
) -> Result:
    """The figures of a model, and how they differ from the first one's."""
    suites = {name: SUITES[name].summary(found) for name, found in own.items()}
    model = {"label": subject.label, "bytes": subject.size, "suites": suites}
    if own is first:
        return model
    gaps = {name: SUITES[name].differences(first[name], found) for name, found in own.items()}
    return model | {"differences": gaps}
