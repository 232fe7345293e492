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
from rgexport.griffin.huggingface_config import read_config
from rgexport.griffin.layout import EMBEDDING, model_tensors
from rgexport.griffin.orbax import orbax_folder
from rgexport.griffin.tensor import DTYPES, FoundTensor, RowTensor, WeightSource
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES, find_tokenizer_files, has_tokenizer

Layout = Literal["hugging-face", "deepmind"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = "model*.safetensors*"  # and their index
_HUB_CACHE = re.compile(r"models--.+?--(?P<name>.+)")


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A checkpoint; only its headers are in memory.

    Attributes:
        name: a short name for messages and for files that are made from the checkpoint.
        path: the folder, or DeepMind's `.pt` file or orbax folder.
        weights: the tensors that fit the model, by canonical name, in their stored dtype.
        head: `lm_head.weight` where it was saved too; it must equal the embedding.
        problems: the faults of the headers, each as `kind: details`.
        weight_files: the files of weights by name, in an orbax folder by the path inside it.
        instruction_tuned: whether the model was tuned for chats; None if unknown.
        adapter: the folder of a LoRA adapter that is merged into `weights`.
        asked_for: the changes that the user asked for.
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

    Raises:
        RequestError: nothing usable is there; problems of single tensors go to
            `Checkpoint.problems`.
    """
    _check_request(model, size, window, soft_cap)
    if model is not None and str(model) in SIZE_WORDS and not means_checkpoint(Path(model)):
        size = str(model)
        model = None

    with report_os_errors(model or size):
        if model is not None:
            name, path = _find_model(model)
        elif size == DEMO:
            name = DEMO
            path = demo_folder()
        else:
            name, path = _find_hub(SIZES[str(size)].hub_id)
        checkpoint = _open(name, path, AskedFor(window=window, soft_cap=soft_cap))

    if adapter is None:
        return checkpoint
    return _with_adapter(checkpoint, adapter)


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
    adapter_name = folder.resolve().name
    head = base.head
    if EMBEDDING in merged:
        head = None  # the stored head is a copy of the embedding before the adapter
    return replace(
        base,
        name=f"{base.name}-{adapter_name}",
        weights={**base.weights, **merged},
        head=head,
        weight_files=base.weight_files | files,
        adapter=folder,
        asked_for=replace(base.asked_for, adapter=adapter_name),
    )


def means_checkpoint(path: Path) -> bool:
    """Returns whether a path leads to a checkpoint: a `.pt` file, or a folder with its files."""
    path = _folder(path)
    if not path.is_dir():
        return path.is_file() and path.suffix == ".pt"
    for name in (huggingface.CONFIG, huggingface.SINGLE, huggingface.INDEX):
        if (path / name).exists():
            return True
    return any(path.glob("*.pt")) or orbax_folder(path) is not None


def _folder(path: Path) -> Path:
    """Returns the folder where a path names its config.json, its index or a file of weights."""
    is_part = path.name == huggingface.CONFIG or path.match(_WEIGHTS)
    if is_part and path.is_file() and any(path.parent.glob(_WEIGHTS)):
        return path.parent
    return path


def demo_folder() -> Path:
    """Returns the bundled demo model.

    Raises:
        RequestError: this install has none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "demo_model", package.parent / "demo" / "model"):
        if (folder / huggingface.CONFIG).is_file():
            return folder
    raise RequestError("the demo model is not bundled with this install; give a folder with -m")


def _find_hub(hub_id: str) -> tuple[str, Path]:
    """Returns the name and the local folder of a hub id."""
    from rgexport.griffin.hub import fetch_model  # slow to import, and rarely needed

    _, _, name = hub_id.rpartition("/")
    return name, fetch_model(hub_id)


def _find_model(model: str | Path) -> tuple[str, Path]:
    """Returns the name and the path of a local checkpoint, or of a hub id."""
    path = _folder(Path(os.path.expanduser(model)))
    if path.exists():
        return _local_name(path), path

    text = model.as_posix() if isinstance(model, Path) else model  # without Windows' backslashes
    hub_id = text.removeprefix("hf:")
    if _HUB_ID.fullmatch(hub_id):
        try:
            return _find_hub(hub_id)
        except RequestError as error:  # a mistyped folder looks like a hub id
            raise RequestError(f"{error} (there is no folder {model})") from None
    raise RequestError(f"there is no folder {model}; expected {CHECKPOINT_FORMS}")


def _local_name(path: Path) -> str:
    resolved = path.resolve()
    name = resolved.name or "model"
    if resolved.is_file():
        name = resolved.stem
    for part in resolved.parts:  # a snapshot in the hub's cache is named by a hash
        match = _HUB_CACHE.fullmatch(part)
        if match:
            name = match["name"]
    return os.fsencode(name).decode("utf-8", "replace")


def _deepmind_path(path: Path) -> Path | None:
    """Returns the `.pt` file or orbax folder at a path; None for Hugging Face's layout."""
    if path.is_file():
        if path.suffix != ".pt":
            raise RequestError(f"{path} is {describe_file(path)}; expected a folder or .pt file")
        return path
    for name in (huggingface.SINGLE, huggingface.INDEX):
        if (path / name).exists():
            return None

    orbax = orbax_folder(path)
    if orbax is not None:
        return orbax

    files = sorted(path.glob("*.pt"))
    if len(files) > 1:
        raise RequestError(
            f"{path} holds {len(files)} .pt files ({', '.join(p.name for p in files[:3])}, …); "
            "give the one you mean"
        )
    if files:
        return files[0]
    return None


@dataclass(frozen=True)
class _Contents:
    """The contents of a checkpoint before they are compared with the model.

    `tensors` are by canonical name, `folder` holds the tokenizer.
    """

    path: Path
    layout: Layout
    config: GriffinConfig
    tensors: dict[str, FoundTensor]
    weight_files: dict[str, Path]
    folder: Path
    problems: tuple[str, ...] = ()


def _open(name: str, path: Path, asked_for: AskedFor) -> Checkpoint:
    deepmind_path = _deepmind_path(path)
    if deepmind_path is not None:
        contents = _open_deepmind(deepmind_path, asked_for)
    else:
        contents = _open_hugging_face(path, asked_for)

    tensors = dict(contents.tensors)
    head: FoundTensor | None = None
    if contents.layout == "hugging-face":
        head = tensors.pop(huggingface.HEAD, None)
    config = contents.config
    weights, problems = _match_tensors(config, tensors)
    problems += contents.problems
    if isinstance(head, str) or (head and head.shape != (config.vocab_size, config.width)):
        problems.append(f"wrong shape: {huggingface.HEAD} does not fit {EMBEDDING}")
        head = None

    return Checkpoint(
        name=name,
        path=contents.path,
        layout=contents.layout,
        config=config,
        weights=weights,
        head=head,
        problems=tuple(problems),
        weight_files=contents.weight_files,
        tokenizer_files=find_tokenizer_files(contents.folder),
        instruction_tuned=_instruction_tuned(name, contents.folder),
        asked_for=asked_for,
    )


def _open_deepmind(path: Path, asked_for: AskedFor) -> _Contents:
    stored = deepmind.read_tensors(path)
    config = deepmind.infer_config(path, stored, asked_for.window, asked_for.soft_cap)
    # The tokenizer lies beside a `.pt` file, and in an orbax folder or beside it.
    has_own_tokenizer = path.is_dir() and has_tokenizer(path)
    return _Contents(
        path=path,
        layout="deepmind",
        config=config,
        tensors=deepmind.canonical(stored),
        weight_files=_deepmind_files(path),
        folder=path if has_own_tokenizer else path.parent,
    )


def _open_hugging_face(path: Path, asked_for: AskedFor) -> _Contents:
    config_path = path / huggingface.CONFIG
    if not config_path.is_file():
        raise RequestError(f"{path} has no config.json; expected a RecurrentGemma model folder")
    config = read_config(config_path, asked_for.window, asked_for.soft_cap)
    tensors, problems, files = huggingface.read_tensors(path)
    return _Contents(
        path=path,
        layout="hugging-face",
        config=config,
        tensors=tensors,
        weight_files={file.name: file for file in files},
        folder=path,
        problems=problems,
    )


def _deepmind_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    files: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name not in TOKENIZER_FILES:
            files[file.relative_to(path).as_posix()] = file
    return files


def _match_tensors(
    config: GriffinConfig, tensors: Mapping[str, FoundTensor]
) -> tuple[dict[str, RowTensor], list[str]]:
    """Splits tensors, by canonical names, into those that fit the model, and problems."""
    expected = model_tensors(config)
    weights: dict[str, RowTensor] = {}
    problems = []
    for name, spec in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"missing: {name}")
        elif isinstance(tensor, str):
            problems.append(f"wrong dtype: {name} is {tensor} (expected {', '.join(DTYPES)})")
        elif tensor.shape != spec.shape:
            problems.append(
                f"wrong shape: {name} is {list(tensor.shape)} (expected {list(spec.shape)})"
            )
        else:
            weights[name] = tensor
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    return weights, problems


def summarize(problems: Iterable[str], limit: int = 8) -> str:
    """Returns all problems on one line by kind; at most `limit` of each kind are spelled out."""
    details_by_kind: dict[str, list[str]] = {}
    for problem in problems:
        kind, _, detail = problem.partition(": ")
        details_by_kind.setdefault(kind, []).append(detail)

    summaries = []
    for kind, details in details_by_kind.items():
        summary = f"{kind}: {', '.join(details[:limit])}"
        if len(details) > limit:
            summary += f" and {len(details) - limit} more"
        summaries.append(summary)
    return "; ".join(summaries)


def _instruction_tuned(name: str, folder: Path) -> bool | None:
    """Returns whether a model was tuned for chats, by its name or its files; None if unknown."""
    size = name.removeprefix("recurrentgemma-")
    if size.endswith("-it"):
        return True
    if size in SIZES:
        return SIZES[size].instruction_tuned
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        return read_json(settings).get("chat_template") is not None
    return None
