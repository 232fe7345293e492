"""Opens artifacts of all formats, and tells a user what to do with them."""

import os
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import list2cmdline

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.format import FileFormat, all_formats, folder_format, format_of
from rgexport.artifacts.hub import PREFIX, fetch_artifact, is_hub_id, is_hub_name
from rgexport.artifacts.manifest import MANIFEST, NOT_ASKED_FOR
from rgexport.artifacts.manifest_reader import is_artifact, read_manifest
from rgexport.choices import ARTIFACT_FORMS, MODEL_FORMS
from rgexport.errors import NotExported, RequestError
from rgexport.files.kinds import describe_file
from rgexport.griffin.checkpoint import Checkpoint, demo_folder, means_checkpoint, open_checkpoint
from rgexport.griffin.config import DEMO, SIZE_WORDS
from rgexport.griffin.hub import cached_model
from rgexport.progress import note
from rgexport.units import amount


def open_artifact(
    path: Path | str, *, verify: bool = False, allow_foreign: bool = False
) -> Artifact:
    """Opens an artifact, a file or package in its folder, or a hub id; checks its files.

    Hashes are checked where a file was not seen before in this state, and of all with `verify`.
    With `allow_foreign`, engines may run ops that rgexport does not write.

    Raises RequestError: no artifact, a damaged manifest, or a file that is missing or altered.
    """
    path = local_path(path)
    if form := _file_format(path):
        return form.open(path, verify=verify)
    if not is_artifact(folder := _folder(path)):
        if means_checkpoint(folder) and not any((folder / name).exists() for name in _entries()):
            raise NotExported(as_argument(folder))
        if folder.is_file():
            raise RequestError(f"{folder} is {describe_file(folder)}; expected an artifact")
    manifest = read_manifest(folder)
    folder_form = folder_format(manifest.kind)
    assert folder_form, "a manifest of another kind was refused"
    artifact = folder_form.artifact(folder, manifest)
    if complaints := artifact.complaints(verify):
        raise RequestError(
            f"{folder} is damaged: {'; '.join(complaints)}; restore it or export it again"
        )
    if notes := artifact.notes():
        note(f"Note: {folder} has changed since it was exported: {'; '.join(notes)}.")
    return replace(artifact, allow_foreign=allow_foreign)


def open_model(
    model: str, *, verify: bool = False, allow_foreign: bool = False
) -> Artifact | Checkpoint:
    """Opens an artifact or a checkpoint; without `hf:`, a cached one goes before an artifact."""
    is_local = model in SIZE_WORDS or os.path.exists(os.path.expanduser(model))
    is_checkpoint = is_local or cached_model(model)
    with suppress(NotExported):
        if means_artifact(Path(model)) or not is_checkpoint:
            path = local_path(model, MODEL_FORMS)
            return open_artifact(path, verify=verify, allow_foreign=allow_foreign)
    return open_checkpoint(model)


def local_path(path: Path | str, expected: str = ARTIFACT_FORMS) -> Path:
    """Returns the path of an artifact; downloads it where no file, but a hub id, has this name."""
    if is_hub_name(path):
        return fetch_artifact(path)
    looks_like_hub_id, path = is_hub_id(path), Path(path)
    if str(path) in SIZE_WORDS and not (means_artifact(path) or means_checkpoint(path)):
        raise NotExported(str(path))
    if path.exists() or is_artifact(path.parent):
        return path
    if looks_like_hub_id and not path.parent.is_dir():
        try:
            return fetch_artifact(f"{PREFIX}{path.as_posix()}")
        except NotExported:
            raise
        except RequestError as error:  # a mistyped folder looks like a hub id
            raise RequestError(f"there is no {path}, and on the hub: {error}") from None
    raise RequestError(f"there is no {path}; expected {expected}")


def means_artifact(path: Path) -> bool:
    return is_hub_name(path) or _file_format(path) is not None or is_artifact(_folder(path))


def _entries() -> set[str]:
    return {MANIFEST, *(entry for form in all_formats() for entry in form.entries)}


def _folder(path: Path) -> Path:
    """Returns the folder of an artifact where a path names a part of it."""
    return path.parent if path.name in _entries() and is_artifact(path.parent) else path


def _file_format(path: Path) -> FileFormat | None:
    files = (form for form in all_formats() if isinstance(form, FileFormat))
    return next((form for form in files if form.owns(path)), None)


def as_argument(path: Path) -> str:
    text = f".{os.sep}{path}" if str(path).startswith("-") else str(path)
    return list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


def model_argument(checkpoint: Checkpoint) -> str:
    """Returns what names a checkpoint in a command."""
    return DEMO if checkpoint.path == demo_folder() else as_argument(checkpoint.path)


def closing_line(artifact: Artifact) -> str:
    """Returns the last line of an export: the artifact's path, and the next command."""
    path, manifest = as_argument(artifact.path), artifact.manifest
    engine = f"It runs {runs_on}. " if (runs_on := format_of(manifest.kind).runs_on) else ""
    tuned = {"recurrentgemma-2b": "2b-it", "recurrentgemma-9b": "9b-it"}.get(manifest.name)
    if not manifest.has_tokenizer:
        step = f"It has no tokenizer; try: rgexport generate {path} --ids 2"
    elif manifest.profile != "cpu":
        step = f"Make a page of it: rgexport web {path} -o site"
    elif manifest.instruction_tuned:
        step = f"Chat with it: rgexport chat {path}"
    else:
        step = f'Try: rgexport generate {path} -p "The meaning of life is"'
        step += f" (a base model; to chat, export --size {tuned})" if tuned else ""
    return f"{artifact.path} is complete ({amount(artifact.nbytes)}). {engine}{step}"


def check_line(artifact: Artifact) -> str | None:
    """Returns the self-check's outcome, and advice; None with `--no-check`."""
    check = artifact.manifest.check
    if check == NOT_ASKED_FOR:
        return None
    if check.status == "verified":
        return check.sentence
    advice = "Look closer" if check.status == "unverified" else "Do it later"
    return f"{check.sentence} {advice}: rgexport validate {as_argument(artifact.path)}"
