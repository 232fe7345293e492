"""Opens a checkpoint of either layout, from a folder, a file or the hub."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rgexport.errors import RequestError
from rgexport.files.typed_json import read_json
from rgexport.griffin import deepmind, huggingface
from rgexport.griffin.config import NOTHING_ASKED_FOR, AskedFor, GriffinConfig
from rgexport.griffin.huggingface_config import read_config
from rgexport.griffin.inventory import take_inventory
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.orbax_folder import orbax_folder
from rgexport.griffin.sizes import DEMO, SIZE_WORDS, SIZES
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.griffin.tokenizer_files import TOKENIZER_FILES, find_tokenizer_files, has_tokenizer

Layout = Literal["hugging-face", "deepmind"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_CACHE = re.compile(r"models--.+?--(?P<name>.+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read; its weights have not."""

    name: str
    """For display and default output names: the folder's or the hub id's last part, or `demo`."""
    path: Path
    """The folder, or DeepMind's `.pt` file or orbax folder."""
    layout: Layout
    config: GriffinConfig
    weights: WeightSource
    """Canonical name → tensor in its stored dtype, for the tensors that are there and fit."""
    head: RowTensor | None
    """`lm_head.weight`, where it was saved too; it must equal the embedding."""
    problems: tuple[str, ...]
    """What is wrong according to the headers, each as `kind: details`."""
    weight_files: dict[str, Path]
    """By name; in an orbax folder, by the path inside it."""
    tokenizer_files: tuple[Path, ...]
    instruction_tuned: bool | None
    """Whether it was tuned for chat, by its name or its chat template; None if unknown."""
    adapter: Path | None = None
    """The folder of a LoRA adapter that is merged into `weights`."""
    asked_for: AskedFor = NOTHING_ASKED_FOR


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
        model: a folder (Hugging Face's layout, DeepMind's `.pt` with `tokenizer.model`, or its
            flax release, an orbax folder), a `.pt` file, or a hub id, which may be downloaded.
        size: instead of `model`, one of `SIZE_WORDS`.
        window: the attention window: smaller than what the files state, or what they do not state.
        soft_cap: the cap of the logits, for files that do not state it; 0 means none.
        adapter: the folder of a LoRA adapter to merge, see `griffin.adapter`.

    Raises:
        RequestError: nothing usable is there; problems of single tensors do not raise, they are
            listed in `Checkpoint.problems`.
    """
    _check_request(model, size, window, soft_cap)
    if adapter is not None:
        from rgexport.griffin.adapter import with_adapter  # needs this module

        base = open_checkpoint(model, size=size, window=window, soft_cap=soft_cap)
        return with_adapter(base, adapter)
    try:
        name, path = _find_size(str(size)) if model is None else _find_model(model)
        found = _deepmind_path(path)
        open_layout = _open_hugging_face if found is None else _open_deepmind
        checkpoint = open_layout(name, found or path, window, soft_cap)
    except OSError as error:
        raise RequestError(f"{model or size} cannot be read: {error.strerror or error}") from None
    return replace(checkpoint, asked_for=AskedFor(window=window, soft_cap=soft_cap))


def _check_request(
    model: str | Path | None, size: str | None, window: int | None, soft_cap: float | None
) -> None:
    if model is None and size is None:
        raise RequestError(
            f"a model is needed: give a folder or hub id with -m, or --size {'|'.join(SIZE_WORDS)}"
        )
    if model is not None and size is not None:
        raise RequestError("both a model (-m) and a size (--size) were given; expected one of them")
    if window is not None and window < 1:
        raise RequestError(f"--window is {window}; expected at least 1")
    if soft_cap is not None and not 0 <= soft_cap < float("inf"):
        raise RequestError(f"--soft-cap is {soft_cap:g}; expected at least 0 (0 means none)")


def means_checkpoint(path: Path) -> bool:
    """Whether a path looks like a checkpoint, valid or not."""
    if not path.is_dir():
        return path.is_file() and path.suffix in (".pt", ".safetensors")
    names = huggingface.CONFIG, huggingface.SINGLE, huggingface.INDEX
    if any((path / name).exists() for name in names) or any(path.glob("*.pt")):
        return True
    return orbax_folder(path) is not None


def demo_folder() -> Path:
    """The bundled demo model: in the installed package, else in the repository.

    Raises:
        RequestError: this install has none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "demo_model", package.parent / "demo" / "model"):
        if (folder / huggingface.CONFIG).is_file():
            return folder
    raise RequestError("the demo model is not bundled with this install; give a folder with -m")


def _find_size(size: str) -> tuple[str, Path]:
    if size == DEMO:
        return DEMO, demo_folder()
    if size not in SIZES:
        raise RequestError(f"--size is {size!r}; expected one of {', '.join(SIZE_WORDS)}")
    return _find_hub(SIZES[size].hub_id)


def _find_hub(hub_id: str) -> tuple[str, Path]:
    from rgexport.griffin.hub import fetch_model  # slow to import, and rarely needed

    return hub_id.rpartition("/")[2], fetch_model(hub_id)


def _find_model(model: str | Path) -> tuple[str, Path]:
    path = Path(os.path.expanduser(model))
    if path.exists():
        return _display_name(path), path
    hub_id = model.as_posix() if isinstance(model, Path) else model  # without Windows' backslashes
    if _HUB_ID.fullmatch(hub_id):
        try:
            return _find_hub(hub_id)
        except RequestError as error:  # a mistyped folder looks like a hub id
            raise RequestError(f"{error} (there is no folder {model})") from None
    raise RequestError(
        f"there is no folder {model}; expected a model folder, a DeepMind .pt file, or a hub id "
        "such as google/recurrentgemma-2b"
    )


def _display_name(path: Path) -> str:
    """The model's name by its path; bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(_path_name(path.resolve())).decode("utf-8", "replace")


def _path_name(path: Path) -> str:
    for part in reversed(path.parts):  # a snapshot in the hub's cache is named by a hash
        if match := _HUB_CACHE.fullmatch(part):
            return match["name"]
    return path.stem if path.is_file() else path.name or "model"


def _deepmind_path(path: Path) -> Path | None:
    """The `.pt` file or orbax folder that `path` means; None if it has Hugging Face's layout."""
    if path.is_file():
        if path.suffix != ".pt":
            raise RequestError(
                f"{path} is a file; expected a model folder or a DeepMind checkpoint ending in .pt"
            )
        return path
    if any((path / name).exists() for name in (huggingface.SINGLE, huggingface.INDEX)):
        return None
    if orbax := orbax_folder(path):
        return orbax
    found = sorted(path.glob("*.pt"))
    if len(found) > 1:
        raise RequestError(
            f"{path} holds {len(found)} .pt files ({', '.join(p.name for p in found[:3])}, …); "
            "give the one you mean"
        )
    return found[0] if found else None


def _open_hugging_face(
    name: str, folder: Path, window: int | None, soft_cap: float | None
) -> Checkpoint:
    if not (folder / huggingface.CONFIG).is_file():
        raise RequestError(f"{folder} has no config.json; expected a RecurrentGemma model folder")
    config = read_config(folder / huggingface.CONFIG, window, soft_cap)
    found, index_problems, files = huggingface.read_tensors(folder)
    head = found.pop(huggingface.HEAD, None)
    weights, problems = take_inventory(config, found)
    problems = [*index_problems, *problems]
    fits = isinstance(head, RowTensor) and head.shape == (config.vocab_size, config.width)
    if head is not None and not fits:
        problems.append(f"wrong shape: {huggingface.HEAD} does not fit {EMBEDDING}")
    return Checkpoint(
        name=name,
        path=folder,
        layout="hugging-face",
        config=config,
        weights=weights,
        head=head if isinstance(head, RowTensor) and fits else None,
        problems=tuple(problems),
        weight_files={file.name: file for file in files},
        tokenizer_files=find_tokenizer_files(folder),
        instruction_tuned=_instruction_tuned(name, folder),
    )


def _open_deepmind(name: str, path: Path, window: int | None, soft_cap: float | None) -> Checkpoint:
    found = deepmind.read_tensors(path)
    config = deepmind.infer_config(path, found, window, soft_cap)
    weights, problems = take_inventory(config, deepmind.canonical(found))
    # Beside a `.pt` file, or in an orbax folder or beside it.
    folder = path if path.is_dir() and has_tokenizer(path) else path.parent
    tokenizer = find_tokenizer_files(folder)
    return Checkpoint(
        name=name,
        path=path,
        layout="deepmind",
        config=config,
        weights=weights,
        head=None,
        problems=tuple(problems),
        weight_files=_files(path),
        tokenizer_files=tokenizer,
        instruction_tuned=_instruction_tuned(name, folder),
    )


def _files(path: Path) -> dict[str, Path]:
    """The file, or all files of an orbax folder."""
    if path.is_file():
        return {path.name: path}
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    own = (file for file in found if file.name not in TOKENIZER_FILES)
    return {file.relative_to(path).as_posix(): file for file in own}


def _instruction_tuned(name: str, folder: Path) -> bool | None:
    """By the name of a released model, otherwise by whether there is a chat template."""
    word = name.removeprefix("recurrentgemma-")
    if word.endswith("-it"):
        return True
    if word in SIZES:
        return SIZES[word].instruction_tuned
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return read_json(settings).get("chat_template") is not None if settings.is_file() else None
