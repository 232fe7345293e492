"""Opens artifacts of all formats."""

from dataclasses import replace
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.export.advice import as_argument
from rgexport.export.artifact import Artifact
from rgexport.export.format import FileFormat, FolderFormat, all_formats, folder_format
from rgexport.export.hub import fetch_artifact, is_hub_name
from rgexport.export.manifest import MANIFEST
from rgexport.export.manifest_reader import is_artifact, read_manifest
from rgexport.griffin.checkpoint import means_checkpoint
from rgexport.progress import note


def open_artifact(
    path: Path | str, *, verify: bool = False, allow_foreign: bool = False
) -> Artifact:
    """Opens an artifact, a file or package in its folder, or `hf:owner/name`; checks its files.

    Hashes are checked where a file was not seen before in this state, and of all with `verify`.
    With `allow_foreign`, engines may run ops that rgexport does not write.

    Raises:
        RequestError: no artifact, a damaged manifest, or a file that is missing or altered.
    """
    path = fetch_artifact(path) if is_hub_name(path) else Path(path)
    if form := _file_format(path):
        return form.open(path, verify=verify)
    folders = (form for form in all_formats() if isinstance(form, FolderFormat))
    entries = {MANIFEST, *(entry for form in folders for entry in form.entries)}
    folder = path.parent if path.name in entries and is_artifact(path.parent) else path
    if not is_artifact(folder) and means_checkpoint(folder):
        raise RequestError(
            f"{folder} is not an rgexport artifact but a checkpoint; export it first: "
            f"rgexport onnx -m {as_argument(folder)} --int4"
        )
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


def means_artifact(path: Path) -> bool:
    return is_hub_name(path) or _file_format(path) is not None or is_artifact(path)


def _file_format(path: Path) -> FileFormat | None:
    files = (form for form in all_formats() if isinstance(form, FileFormat))
    return next((form for form in files if form.owns(path)), None)
