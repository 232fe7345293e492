"""Copies a folder's task files of lm_eval, and refuses those that name code.

lm_eval would load the Python code that a task file names. It reads only the copies; each is merged
with the files that it includes, and has absolute paths of its data.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.files.paths import read_text

_CODE = {
    "class": "a class",
    "custom_dataset": "a function",
    "hf_evaluate": "a program of the hub",
    "trust_remote_code": "a program of the hub",
    "use_prompt": "a file of prompts",
}
"""Key → the code that lm_eval or `datasets` would load and run."""
_UNPICKLED = ("pandas",)
"""Readers of `datasets` that unpickle, which runs code."""


def copy_tasks(folder: Path, target: Path, metrics: set[str]) -> set[str]:
    """Writes harmless copies of a folder's `.yaml` files to `target`, where `datasets` caches, too.

    Returns the names of the tasks, and of the groups that consist of them. `metrics` are lm_eval's.
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
    return _complete(configs)


def _complete(configs: Sequence[Mapping[str, Any]]) -> set[str]:
    names = {str(config["task"]) for config in configs if "group" not in config}
    groups = {str(config["group"]): config.get("task") for config in configs if "group" in config}
    for _ in groups:  # groups may be members of groups
        names |= {
            name
            for name, members in groups.items()
            if isinstance(members, list)
            and all(isinstance(member, str) and member in names for member in members)
        }
    return names


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
        f"{file} has {key}, by which lm_eval loads {what}; no code of a folder is run: write the "
        "task without it"
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
    """Makes paths and patterns of existing files absolute, in a text, a list or a mapping."""
    if isinstance(value, dict):
        return {key: _absolute(folder, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_absolute(folder, inner) for inner in value]
    if isinstance(value, str) and not Path(value).is_absolute() and any(folder.glob(value)):
        return str(folder.resolve() / value)
    return value
