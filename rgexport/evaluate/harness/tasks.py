"""EleutherAI's lm_eval: what its tasks ask of a model, and what it makes of the answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.evaluate.harness.answers import Asked
from rgexport.evaluate.harness.confinement import require_installed, within
from rgexport.evaluate.harness.task_files import copy_tasks
from rgexport.progress import note

_SEED = 1234
"""lm_eval's own, of the examples that are drawn."""
_NONE = "none"
"""lm_eval's name of no filter."""


@dataclass(frozen=True)
class Scores:
    """A figure of a task or of a group of tasks.

    Attributes:
        task: its name, or that of the group.
        metric: its name, after which comes the filter if there is one.
        value: lm_eval's, None where it is no number.
        aggregation: the name of what makes it of the values.
        values: of each example; none for a group.
        higher_is_better: None if unknown.
    """

    task: str
    metric: str
    value: float | None
    aggregation: str
    values: Sequence[Any]
    higher_is_better: bool | None


class Tasks:
    """Tasks that are loaded, with their documents.

    Attributes:
        asked: of each task, its requests, each of them once.
        shots: of each task, the examples before a question.
    """

    def __init__(self, found: Mapping[str, Any], examples: int | None, seed: int):
        """`found` is what `TaskManager.load` gives; to be called `within` lm_eval."""
        self._found, self._examples, self._seed = found, examples, _SEED + seed
        self.asked: dict[str, list[Asked]] = {}
        self.shots: dict[str, int] = {}
        for name, task in found["tasks"].items():
            _require_plain(name, task)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(self._seed)
            task.build_all_requests(limit=examples)
            self.asked[name] = list(dict.fromkeys(map(_asked, task.instances)))
            self.shots[name] = task.get_config("num_fewshot")

    def scores(self, answers: Mapping[Asked, Any]) -> list[Scores]:
        """lm_eval's figures, by the answers to all requests.

        Raises:
            RequestError: lm_eval fails, or asks what it did not ask before.
        """
        with within("score the tasks"):
            from lm_eval.evaluator import evaluate

            for task in self._found["tasks"].values():
                task.set_fewshot_seed(self._seed)
            results = evaluate(
                lm=_recorded(answers),
                task_dict=self._found,
                limit=self._examples,
                bootstrap_iters=0,
            )
            tasks = [s for name in self._found["tasks"] for s in self._of_task(name, results)]
        groups = results.get("groups", {})
        return tasks + [
            Scores(name, metric, value, "", (), None)
            for name, entry in groups.items()
            for metric, _, _, value in _figures(entry)
        ]

    def _of_task(self, task: str, results: Mapping[str, Any]) -> Iterator[Scores]:
        functions = self._found["tasks"][task].aggregation()
        better = results["higher_is_better"].get(task, {})
        for shown, metric, kind, value in _figures(results["results"][task]):
            values = [
                sample[metric]
                for sample in results["samples"][task]
                if sample["filter"] == kind and metric in sample
            ]
            made = getattr(functions.get(metric), "__name__", "mean")
            yield Scores(task, shown, value, made, values, better.get(metric))


def _figures(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float | None]]:
    """The name to be shown, the metric, its filter and its value; lm_eval joins two by a comma."""
    for key, value in entry.items():
        metric, comma, kind = key.rpartition(",")
        if comma and not metric.endswith("_stderr"):
            number = isinstance(value, int | float | np.number) and np.isfinite(value)
            shown = metric if kind == _NONE else f"{metric}, {kind}"
            yield shown, metric, kind, float(value) if number else None


def _require_plain(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise RequestError(
            f"the task {name} runs code that a model writes, which rgexport does not; choose "
            "another --task"
        )
    if getattr(task, "MULTIMODAL", False):
        raise RequestError(f"the task {name} has pictures or sounds; choose another --task")


def _asked(instance: Any) -> Asked:
    return Asked.of(instance.request_type, *instance.args)


def _recorded(answers: Mapping[Asked, Any]) -> Any:
    """A model of lm_eval that gives answers that are there."""
    from lm_eval.api.model import LM

    def given(requests: Sequence[Any]) -> list[Any]:
        asked = [_asked(request) for request in requests]
        if new := [one for one in asked if one not in answers]:
            raise RequestError(
                "a task asks something else each time that it is loaded, such as "
                f"{new[0].arguments[-60:]}; choose another --task"
            )
        return [answers[one] for one in asked]

    class Recorded(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(log, likeliest) for log, likeliest in given(requests)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return given(requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return given(requests)

    return Recorded()


@lru_cache(maxsize=1)
def load_tasks(
    names: tuple[str, ...], folder: Path | None, examples: int | None, seed: int
) -> Tasks:
    """Tasks, groups and tags of lm_eval, and of a folder of task files.

    Args:
        names: of lm_eval's, or of the folder's, which come first.
        folder: of task files, or None.
        examples: the most of a task, or None for all.
        seed: of the examples that come before a question; 0 is that of lm_eval.

    Raises:
        NotInstalled: lm_eval is missing.
        RequestError: there is no such task, it names code, or lm_eval cannot load it.
    """
    require_installed()
    if folder is None:
        note("Loading the tasks of lm_eval.")  # seconds, and minutes where documents are downloaded
    with within("load the tasks"), TemporaryDirectory() as place:
        from lm_eval.api.registry import METRIC_REGISTRY
        from lm_eval.tasks import TaskManager

        own = set[str]()
        if folder is not None:
            own = copy_tasks(folder, Path(place), {*METRIC_REGISTRY})
        # The index of lm_eval's own tasks takes seconds.
        manager = TaskManager(include_path=[place], include_defaults=not {*names} <= own)
        for name in names:
            # lm_eval would take the path of a file, and load the code that it names.
            if name not in manager.task_index:
                raise RequestError(
                    f"--task is {name!r}; expected a task, a group or a tag of lm_eval, which "
                    "`lm_eval ls tasks` lists, or one of --task-files"
                )
        return Tasks(manager.load([*names]), examples, seed)
