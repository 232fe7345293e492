"""EleutherAI's lm_eval: loads its tasks, collects their requests, and scores the answers.

lm_eval would load the Python code that a task file names. Of a folder's files, it reads only copies
that name none; each is merged with the files that it includes, and has absolute paths of its data.
"""

import logging
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.evaluation.harness.answers import LmRequest
from rgexport.evaluation.pieces import Result
from rgexport.files.paths import read_text
from rgexport.progress import note

_SEEDS = 0, 1234
"""lm_eval's own, of Python and NumPy; the latter also of the examples before a question."""
_CODE = {
    "class": "a class",
    "custom_dataset": "a function",
    "hf_evaluate": "a program of the hub",
    "trust_remote_code": "a program of the hub",
    "use_prompt": "a file of prompts",
}
"""Key → the code that lm_eval or `datasets` would load and run."""
_UNPICKLED = ("pandas",)  # readers of `datasets` that unpickle, which runs code


class Tasks:
    """Loaded tasks with their documents.

    `requests` has the requests of a task, each once; `shots` its examples before a question.
    """

    def __init__(self, loaded: Mapping[str, Any], examples: int | None, seed: int):
        """Takes the return value of `TaskManager.load`; must be called in `_confined`."""
        self._loaded, self._examples, self._seed = loaded, examples, _SEEDS[1] + seed
        self.requests: dict[str, list[LmRequest]] = {}
        self.shots: dict[str, int] = {}
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise RequestError(
                    f"the task {name} runs code that a model writes, which rgexport does not; "
                    "choose another --task"
                )
            if getattr(task, "MULTIMODAL", False):
                raise RequestError(f"the task {name} has pictures or sounds; choose another --task")
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(self._seed)
            task.build_all_requests(limit=examples)
            self.requests[name] = list(dict.fromkeys(map(_request, task.instances)))
            self.shots[name] = task.get_config("num_fewshot")

    def scores(self, answers: Mapping[LmRequest, Any]) -> dict[str, list[Result]]:
        """Returns lm_eval's figures of each task and group, from the answers to all requests.

        `value` is None if it is no number. `aggregation` names the function to it from the `values`
        of the examples; a group has none.
        """
        with _confined("score the tasks"):
            from lm_eval.evaluator import evaluate

            for task in self._loaded["tasks"].values():
                task.set_fewshot_seed(self._seed)
            results = evaluate(
                lm=_recorded_model(answers),
                task_dict=self._loaded,
                limit=self._examples,
                bootstrap_iters=0,
            )
            scores: dict[str, list[Result]] = defaultdict(list)
            for name, task in self._loaded["tasks"].items():
                functions, better = task.aggregation(), results["higher_is_better"].get(name, {})
                samples = results["samples"][name]
                for metric, kind, figure in _figures(results["results"][name]):
                    figure["values"] = [
                        sample[metric]
                        for sample in samples
                        if sample["filter"] == kind and metric in sample
                    ]
                    figure["aggregation"] = getattr(functions.get(metric), "__name__", "mean")
                    figure["higher_is_better"] = better.get(metric)
                    scores[name].append(figure)
        for name, entry in results.get("groups", {}).items():
            scores[name] += [figure for _, _, figure in _figures(entry)]
        return scores


def _figures(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, Result]]:
    """Yields metric, filter and figure of keys such as `acc,none`."""
    for key, value in entry.items():
        metric, comma, kind = key.rpartition(",")
        if comma and not metric.endswith("_stderr"):
            number = isinstance(value, int | float | np.number) and np.isfinite(value)
            label = metric if kind == "none" else f"{metric}, {kind}"
            figure = {"metric": label, "value": float(value) if number else None}
            yield metric, kind, figure | {"values": [], "aggregation": "", "higher_is_better": None}


def _request(instance: Any) -> LmRequest:
    return LmRequest.of(instance.request_type, *instance.args)


def _recorded_model(answers: Mapping[LmRequest, Any]) -> Any:
    from lm_eval.api.model import LM

    def recorded(instances: Sequence[Any]) -> list[Any]:
        requests = [_request(instance) for instance in instances]
        if new := [request for request in requests if request not in answers]:
            raise RequestError(
                "a task asks something else each time that it is loaded, such as "
                f"{new[0].arguments[-60:]}; choose another --task"
            )
        return [answers[request] for request in requests]

    class RecordedModel(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(log, likeliest) for log, likeliest in recorded(requests)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return recorded(requests)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return recorded(requests)

    return RecordedModel()


@lru_cache(maxsize=1)
def load_tasks(
    names: tuple[str, ...], folder: Path | None, examples: int | None, seed: int
) -> Tasks:
    """Loads tasks, groups and tags of a folder of task files, or else of lm_eval.

    `examples` is the most of a task, `seed` that of the examples before a question: 0 is lm_eval's.

    Raises:
        NotInstalled: lm_eval is missing.
        RequestError: there is no such task, it names code, or lm_eval cannot load it.
    """
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError:
        raise NotInstalled("the suite tasks needs lm_eval: pip install 'rgexport[tasks]'") from None
    if folder is None:
        note("Loading the tasks of lm_eval.")  # seconds, and minutes where documents are downloaded
    with _confined("load the tasks"), TemporaryDirectory() as copies:
        from lm_eval.api.registry import METRIC_REGISTRY
        from lm_eval.tasks import TaskManager

        defined, needed = set[str](), {*names}
        for config in _copy_tasks(folder, Path(copies), {*METRIC_REGISTRY}) if folder else ():
            defined.add(str(config.get("group", config.get("task"))))
            if "group" in config:
                needed |= set(map(str, config.get("task") or ()))
        # The index of lm_eval's own tasks takes seconds.
        manager = TaskManager(include_path=[copies], include_defaults=not needed <= defined)
        for name in names:
            # lm_eval would take the path of a file, and load the code that it names.
            if name not in manager.task_index:
                raise RequestError(
                    f"--task is {name!r}; expected a task, a group or a tag of lm_eval, which "
                    "`lm_eval ls tasks` lists, or one of --task-files"
                )
        return Tasks(manager.load([*names]), examples, seed)


@contextmanager
def _confined(purpose: str) -> Iterator[None]:
    """Runs lm_eval silently, with its own seeds, and with sandboxed templates."""
    import datasets
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    templates, counted = lm_eval.utils.env, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    before = random.getstate(), np.random.get_state(), logging.root.manager.disable
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    logging.disable(logging.CRITICAL)
    # Templates of a task file are programs.
    lm_eval.utils.env = SandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    lm_eval.utils.env.filters |= templates.filters
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request to the hub, even for local files
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RequestError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())
        raise RequestError(f"lm_eval cannot {purpose}: {type(cause).__name__}: {reason}") from None
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        logging.disable(before[2])
        lm_eval.utils.env = templates
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted


def _copy_tasks(folder: Path, target: Path, metrics: set[str]) -> list[dict[str, Any]]:
    """Writes harmless copies of a folder's `.yaml` files to `target`, where `datasets` caches, too.

    Returns what they say. `metrics` are lm_eval's.
    """
    import yaml

    configs = []
    if not folder.is_dir():
        raise RequestError(f"--task-files is {folder}; expected a folder of task files")
    for number, file in enumerate(sorted(folder.rglob("*.yaml"))):
        config = _merged(file, ())
        if not {"task", "group"} & config.keys():
            continue
        _require_harmless(file, config, metrics)
        _find_data(file.parent, config, target)
        configs.append(config)
        (target / f"{number}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    if not configs:
        raise RequestError(f"{folder} has no tasks; expected .yaml files with `task: NAME`")
    return configs


def _merged(file: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """Returns a task file merged with its includes; its own keys win, then the last include's."""
    if file in including:
        raise RequestError(f"{file} includes itself")
    config = _read(file)
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= _merged((file.parent / name).resolve(), (*including, file))
    merged.pop("task_list", None)
    return merged | config


def _read(file: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def refuse(loader: Any, suffix: str, node: Any) -> None:
        raise _refusal(file, f"!{suffix}", "Python code")

    Loader.add_multi_constructor("!", refuse)
    try:
        config = yaml.load(read_text(file), Loader)  # noqa: S506
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RequestError(f"{file} is no task file: {' '.join(str(error).split())}") from None
    return config if isinstance(config, dict) else {}


def _refusal(file: Path, key: str, what: str) -> RequestError:
    return RequestError(
        f"{file} has {key}, by which lm_eval loads {what}; it is not run: write the task without it"
    )


def _require_harmless(file: Path, config: dict[str, Any], metrics: set[str]) -> None:
    for mapping in _mappings(config, set()):
        for key, what in _CODE.items():
            if mapping.get(key):
                raise _refusal(file, key, what)
        if mapping.get("dataset_path") in _UNPICKLED:
            raise _refusal(file, f"dataset_path: {mapping['dataset_path']}", "pickles")
        listed = mapping.get("metric_list")
        for metric in listed if isinstance(listed, list) else []:
            name = metric.get("metric") if isinstance(metric, dict) else metric
            if name not in metrics:
                raise _refusal(file, f"the metric {name}", "a program of the hub or a folder")


def _mappings(value: Any, seen: set[int]) -> Iterator[Mapping[str, Any]]:
    """Yields all mappings in a value, each once: anchors may repeat one many times."""
    if id(value) in seen or not isinstance(value, dict | list):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        yield from _mappings(inner, seen)


def _find_data(folder: Path, config: dict[str, Any], cache: Path) -> None:
    """Makes paths relative to the task file absolute, and sets the cache of `datasets`."""
    path = config.get("dataset_path")
    if isinstance(path, str) and "/" in path and (folder / path).is_dir():
        config["dataset_path"] = str((folder / path).resolve())
    options = config.get("dataset_kwargs")
    if not isinstance(options, dict) or not options.keys() & {"data_files", "data_dir"}:
        return
    for key in ("data_files", "data_dir"):
        if key in options:
            options[key] = _absolute(folder, options[key])
    options |= {"cache_dir": str(cache / "data"), "keep_in_memory": True}


def _absolute(folder: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(folder, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_absolute(folder, inner) for inner in value]
    if isinstance(value, str) and not Path(value).is_absolute() and any(folder.glob(value)):
        return str(folder.resolve() / value)
    return value
