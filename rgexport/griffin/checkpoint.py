"""Opens a checkpoint of either layout, from a folder, a file or the hub."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rgexport.choices import CHECKPOINT_FORMS
from rgexport.errors import RequestError
from rgexport.files.kinds import describe_file
from rgexport.files.paths import report_os_errors
from rgexport.files.typed_json import read_json
from rgexport.griffin import deepmind, huggingface
from rgexport.griffin.adapter import merge_adapter
from rgexport.griffin.config import (
    DEMO,
    NOTHING_ASKED_FOR,
    SIZE_WORDS,
    SIZES,
    AskedFor,
    GriffinConfig,
)
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.griffin.tensor import DTYPES, FoundTensor, RowTensor, WeightSource
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES, find_tokenizer_files, has_tokenizer

Layout = Literal["hugging-face", "deepmind"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = "model*.safetensors*"  # and their index
_HUB_CACHE = re.compile(r"models--.+?--(?P<name>.+)")


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A checkpoint; only its headers are in memory.

    `path` is the folder, or DeepMind's `.pt` file or orbax folder. `weights` are the tensors that
    fit the model, by canonical name, in their stored dtype; `head` is `lm_head.weight` where it was
    saved too, and must equal the embedding. `problems` are faults of the headers, each as
    `kind: details`. `weight_files` are by name, in an orbax folder by the path inside it.
    `instruction_tuned` is None if unknown. `adapter` is the folder of a LoRA adapter that is merged
    into `weights`.
    """

    name: str
    path: Path
    layout: Layout
    config: GriffinConfig
    weights: WeightSource
    head: RowTensor | None
    problems: tuple[str, ...]
    weight_files: dict[str, Path]
    tokenizer_files: tuple[Path, ...]
    instruction_tuned: bool | None
    adapter: Path | None = None
    asked_for: AskedFor = NOTHING_ASKED_FOR

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name}: {self.path}, {len(self.weights)} tensors>"


def open_checkpoint(
    model: str | Path | None = None,
    *,
    size: str | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    adapter: Path | None = None,
) -> Checkpoint:
    """Opens a checkpoint and reads its configuration and its tensors' headers.

    Args:
        model: one of `SIZE_WORDS`, a folder (Hugging Face's layout, DeepMind's `.pt` with
            `tokenizer.model`, or its orbax folder), a `.pt` file, or a hub id, which may be
            downloaded.
        size: instead of `model`, one of `SIZE_WORDS`.
        window: the attention window in tokens, at most the one that the files state.
        soft_cap: the cap of the logits, for files that do not state it; 0 means none.
        adapter: the folder of a LoRA adapter to merge.

    Raises RequestError: nothing usable is there; problems of single tensors go to
    `Checkpoint.problems`.
    """
    _check_request(model, size, window, soft_cap)
    if model is not None and str(model) in SIZE_WORDS and not means_checkpoint(Path(model)):
        model, size = None, str(model)
    with report_os_errors(model or size):
        if model is not None:
            name, path = _find_model(model)
        elif size == DEMO:
            name, path = DEMO, demo_folder()
        else:
            name, path = _find_hub(SIZES[str(size)].hub_id)
        checkpoint = _open(name, path, AskedFor(window=window, soft_cap=soft_cap))
    return checkpoint if adapter is None else _with_adapter(checkpoint, adapter)


def _check_request(
    model: str | Path | None, size: str | None, window: int | None, soft_cap: float | None
) -> None:
    if model is None and size is None:
        raise RequestError(f"a model is needed: {CHECKPOINT_FORMS}")
    if model is not None and size is not None:
        raise RequestError("both a model and a size (--size) were given; expected one of them")
    if size is not None and size not in SIZE_WORDS:
        raise RequestError(f"--size is {size!r}; expected one of {', '.join(SIZE_WORDS)}")
    if window is not None and window < 1:
        raise RequestError(f"--window is {window}; expected at least 1")
    if soft_cap is not None and not 0 <= soft_cap < float("inf"):
        raise RequestError(f"--soft-cap is {soft_cap:g}; expected at least 0 (0 means none)")


def _with_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    merged, files = merge_adapter(folder, base.name, base.weights)
    name = folder.resolve().name
    return replace(
        base,
        name=f"{base.name}-{name}",
        weights={**base.weights, **merged},
        head=None if EMBEDDING in merged else base.head,
        weight_files=base.weight_files | files,
        adapter=folder,
        asked_for=replace(base.asked_for, adapter=name),
    )


def means_checkpoint(path: Path) -> bool:
    path = _folder(path)
    if not path.is_dir():
        return path.is_file() and path.suffix == ".pt"
    names = huggingface.CONFIG, huggingface.SINGLE, huggingface.INDEX
    named = any((path / name).exists() for name in names) or any(path.glob("*.pt"))
    return named or deepmind.orbax_folder(path) is not None


def _folder(path: Path) -> Path:
    """Returns the folder where a path names its config.json, its index or a file of weights."""
    is_part = path.name == huggingface.CONFIG or path.match(_WEIGHTS)
    return path.parent if is_part and path.is_file() and any(path.parent.glob(_WEIGHTS)) else path


def demo_folder() -> Path:
    """Returns the bundled demo model; raises RequestError if this install has none."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "demo_model", package.parent / "demo" / "model"):
        if (folder / huggingface.CONFIG).is_file():
            return folder
    raise RequestError("the demo model is not bundled with this install; give a folder with -m")


def _find_hub(hub_id: str) -> tuple[str, Path]:
    from rgexport.griffin.hub import fetch_model  # slow to import, and rarely needed

    return hub_id.rpartition("/")[2], fetch_model(hub_id)


def _find_model(model: str | Path) -> tuple[str, Path]:
    path = _folder(Path(os.path.expanduser(model)))
    if path.exists():
        real = path.resolve()
        name = real.stem if real.is_file() else real.name or "model"
        for part in real.parts:  # a snapshot in the hub's cache is named by a hash
            if match := _HUB_CACHE.fullmatch(part):
                name = match["name"]
        return os.fsencode(name).decode("utf-8", "replace"), path
    text = model.as_posix() if isinstance(model, Path) else model  # without Windows' backslashes
    hub_id = text.removeprefix("hf:")
    if _HUB_ID.fullmatch(hub_id):
        try:
            return _find_hub(hub_id)
        except RequestError as error:  # a mistyped folder looks like a hub id
            raise RequestError(f"{error} (there is no folder {model})") from None
    raise RequestError(f"there is no folder {model}; expected {CHECKPOINT_FORMS}")


def _deepmind_path(path: Path) -> Path | None:
    if path.is_file():
        if path.suffix != ".pt":
            raise RequestError(f"{path} is {describe_file(path)}; expected a folder or .pt file")
        return path
    if any((path / name).exists() for name in (huggingface.SINGLE, huggingface.INDEX)):
        return None
    if orbax := deepmind.orbax_folder(path):
        return orbax
    files = sorted(path.glob("*.pt"))
    if len(files) > 1:
        raise RequestError(
            f"{path} holds {len(files)} .pt files ({', '.join(p.name for p in files[:3])}, …); "
            "give the one you mean"
        )
    return files[0] if files else None


def _open(name: str, path: Path, asked_for: AskedFor) -> Checkpoint:
    changes = asked_for.window, asked_for.soft_cap
    layout: Layout = "hugging-face"
    problems: list[str] = []
    head: FoundTensor | None = None
    if deepmind_path := _deepmind_path(path):
        layout, path = "deepmind", deepmind_path
        stored = deepmind.read_tensors(path)
        config, tensors = deepmind.infer_config(path, stored, *changes), deepmind.canonical(stored)
        weight_files = _deepmind_files(path)
        # The tokenizer lies beside a `.pt` file, and in an orbax folder or beside it.
        folder = path if path.is_dir() and has_tokenizer(path) else path.parent
    else:
        if not (path / huggingface.CONFIG).is_file():
            raise RequestError(f"{path} has no config.json; expected a RecurrentGemma model folder")
        config, folder = huggingface.read_config(path / huggingface.CONFIG, *changes), path
        tensors, index_problems, files = huggingface.read_tensors(path)
        problems += index_problems
        weight_files = {file.name: file for file in files}
        head = tensors.pop(huggingface.HEAD, None)
    weights, mismatches = _match_tensors(config, tensors)
    problems = [*mismatches, *problems]
    if isinstance(head, str) or (head and head.shape != (config.vocab_size, config.width)):
        problems.append(f"wrong shape: {huggingface.HEAD} does not fit {EMBEDDING}")
        head = None
    return Checkpoint(
        name=name,
        path=path,
        layout=layout,
        config=config,
        weights=weights,
        head=head,
        problems=tuple(problems),
        weight_files=weight_files,
        tokenizer_files=find_tokenizer_files(folder),
        instruction_tuned=_instruction_tuned(name, folder),
        asked_for=asked_for,
    )


def _deepmind_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.name not in TOKENIZER_FILES)
    return {file.relative_to(path).as_posix(): file for file in files}


def _match_tensors(
    config: GriffinConfig, tensors: Mapping[str, FoundTensor]
) -> tuple[dict[str, RowTensor], list[str]]:
    """Splits tensors, by canonical names, into those that fit the model, and problems."""
    expected = model_tensors(config)
    weights: dict[str, RowTensor] = {}
    problems = []
    for key, spec in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            problems.append(f"missing: {key}")
        elif isinstance(tensor, str):
            problems.append(f"wrong dtype: {key} is {tensor} (expected {', '.join(DTYPES)})")
        elif tensor.shape != spec.shape:
            problems.append(
                f"wrong shape: {key} is {list(tensor.shape)} (expected {list(spec.shape)})"
            )
        else:
            weights[key] = tensor
    return weights, problems + [f"unexpected: {key}" for key in tensors if key not in expected]


def summarize(problems: Iterable[str], limit: int = 8) -> str:
    """Returns all problems on one line by kind; at most `limit` of each kind are spelled out."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kind, _, detail = problem.partition(": ")
        kinds.setdefault(kind, []).append(detail)
    lines = []
    for kind, details in kinds.items():
        rest = f" and {len(details) - limit} more" if len(details) > limit else ""
        lines.append(f"{kind}: {', '.join(details[:limit])}{rest}")
    return "; ".join(lines)


def _instruction_tuned(name: str, folder: Path) -> bool | None:
    size = name.removeprefix("recurrentgemma-")
    if size.endswith("-it"):
        return True
    if size in SIZES:
        return SIZES[size].instruction_tuned
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return read_json(settings).get("chat_template") is not None if settings.is_file() else None
