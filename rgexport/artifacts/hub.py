"""Downloads and uploads artifacts of the Hugging Face hub, such as `hf:owner/name`."""

import glob
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.card import card
from rgexport.artifacts.manifest import CARD, MANIFEST, Manifest
from rgexport.artifacts.manifest_reader import read_manifest
from rgexport.artifacts.origin import GEMMA_TERMS
from rgexport.errors import NotExported, RequestError
from rgexport.files.hashing import hash_file
from rgexport.files.targets import require_free_disk
from rgexport.griffin.hub import cached_model, explained, hide_bars_in_files, snapshot
from rgexport.progress import note, warn
from rgexport.units import amount

PREFIX = "hf:"
_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?P<file>(/[\w.-]+)+\.gguf)?(@(?P<revision>[\w./-]+))?")
_NEUTRAL = {".gitattributes", CARD}  # files that a repository may have before it has an artifact


@dataclass(frozen=True)
class HubName:
    id: str
    file: str | None
    revision: str | None


def is_hub_name(path: PurePath | str) -> bool:
    return str(path).startswith(PREFIX)


def is_hub_id(path: PurePath | str) -> bool:
    """Returns whether a text looks like `owner/name`, perhaps with a file or revision."""
    text = path.as_posix() if isinstance(path, PurePath) else path
    return _NAME.fullmatch(text) is not None and ".." not in text and not text.startswith(".")


def parse(path: PurePath | str) -> HubName:
    """Parses `hf:owner/name[/FILE.gguf][@REVISION]`; raises RequestError for another text."""
    text = path.as_posix() if isinstance(path, PurePath) else path  # without Windows' backslashes
    match = _NAME.fullmatch(text.removeprefix(PREFIX))
    if not match or ".." in text:
        raise RequestError(
            f"{text} is no artifact of the hub; expected {PREFIX}owner/name[/FILE.gguf][@REVISION]"
        )
    file = match["file"]
    return HubName(match["id"], file[1:] if file else None, match["revision"])


def fetch_artifact(path: Path | str) -> Path:
    """Returns the local copy below `HF_HOME`; a complete one without asking the network.

    Raises RequestError: no such artifact, no permission, network or disk space.
    """
    name = parse(path)
    return _complete(name) or _download(name)


def push_artifact(artifact: Artifact, repo: str, *, public: bool, force: bool) -> str:
    """Uploads in one commit, and removes an earlier artifact's files; returns the address.

    `repo` is `owner/name`, made if it does not exist, and then visible to all if `public`; with
    `force` it may have other files. Raises RequestError: no such name, no permission or network.
    """
    name = _repository(repo)
    _warn_of_terms(artifact)
    with explained(name.id, "upload", "try again: it goes on"):
        return _push(artifact, name.id, public=public, force=force)


def planned_upload(artifact: Artifact, repo: str) -> dict[str, int]:
    """Returns the sizes in bytes of the files that `push_artifact` uploads; asks no network."""
    _repository(repo)
    return {name: _size(content) for name, content in _files_of(artifact).items()}


def _repository(repo: str) -> HubName:
    name = parse(repo)
    if name.file or name.revision:
        raise RequestError(f"{repo} is no repository; expected owner/name")
    return name


def _files_of(artifact: Artifact) -> dict[str, Path | bytes]:
    """Returns name in the repository → the local file, or its contents."""
    if artifact.path.is_file():
        text = card(artifact.manifest, artifact.origin())
        return {artifact.path.name: artifact.path, CARD: text.encode()}
    paths = {name: artifact.file(name) for name in (*artifact.manifest.files, MANIFEST)}
    return {name: path for name, path in paths.items() if path.is_file()}


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _push(artifact: Artifact, repo: str, *, public: bool, force: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    hide_bars_in_files()
    api = HfApi()
    page = api.create_repo(repo, private=not public, exist_ok=True)
    existing = set(api.list_repo_files(repo))
    earlier = None
    if MANIFEST in existing:
        with suppress(RequestError):
            earlier = read_manifest(Path(hf_hub_download(repo, MANIFEST)).parent)
    if not force:
        _require_own(artifact, repo, existing, earlier)
    files = _files_of(artifact)
    if CARD in existing and _keeps_card(artifact, repo, earlier):
        note(f"The card of {repo} stays as it is")
        del files[CARD]
    stale = set[str]()
    if earlier and not artifact.path.is_file():
        stale = earlier.files.keys() & existing - files.keys() - {CARD}
    total = sum(map(_size, files.values()))
    note(f"Uploading {amount(total)} to {page.url}")
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    title = f"{artifact.manifest.name}, {artifact.manifest.precision}, by rgexport"
    api.create_commit(repo, operations, commit_message=title)
    return str(page.url)


def _require_own(
    artifact: Artifact, repo: str, existing: set[str], earlier: Manifest | None
) -> None:
    """Refuses a repository unless it is empty, has this model, or GGUF files beside this one."""
    manifest, foreign = artifact.manifest, existing - _NEUTRAL
    if earlier:
        fits = (earlier.kind, earlier.name) == (manifest.kind, manifest.name)
    else:
        only_gguf = all(name.endswith(".gguf") for name in foreign)
        fits = not foreign or (artifact.path.is_file() and only_gguf)
    if not fits:
        others = ", ".join(sorted(foreign)[:3])
        raise RequestError(f"{repo} has other files ({others}); give a new name, or --force")


def _keeps_card(artifact: Artifact, repo: str, earlier: Manifest | None) -> bool:
    """Whether the card of a repository stays: it was edited there, and the artifact's was not."""
    from huggingface_hub import hf_hub_download

    if artifact.path.is_file() or earlier is None:
        return True
    local, written = hash_file(artifact.file(CARD)), artifact.manifest.files.get(CARD)
    if written is None or local.sha256 != written.sha256:
        return False
    listed = earlier.files.get(CARD)
    return listed is None or hash_file(Path(hf_hub_download(repo, CARD))).sha256 != listed.sha256


def _warn_of_terms(artifact: Artifact) -> None:
    licence = artifact.origin().licence
    if licence in (None, "gemma"):
        condition = "" if licence else "If it is made from Google's weights: "
        warn(
            f"{condition}the Gemma Terms of Use apply here too ({GEMMA_TERMS}): whoever gets it "
            "must get them, and know that the files were changed. rgexport's card says both"
        )


def _folder(name: HubName) -> Path:
    """Returns the local folder; the hub's cache has links, through which ORT reads no weights."""
    from huggingface_hub import constants

    revision = [quote(name.revision, safe="")] if name.revision else []
    return Path(constants.HF_HOME) / "rgexport" / "--".join([*name.id.split("/"), *revision])


def _complete(name: HubName) -> Path | None:
    folder = _folder(name)
    if name.file is not None:
        return folder / name.file if (folder / name.file).is_file() else None
    if (folder / MANIFEST).is_file():
        needed = read_manifest(folder).files.keys() - {CARD}
        return folder if all((folder / file).is_file() for file in needed) else None
    return None  # which GGUF file is meant only the hub can tell


def _download(name: HubName) -> Path:
    from huggingface_hub import HfApi, constants

    folder = _folder(name)
    with explained(name.id, "download", "or give a local artifact"):
        try:
            info = HfApi().model_info(name.id, revision=name.revision, files_metadata=True)
        except Exception:  # as in `explained`
            if name.file is None and cached_model(name.id):
                raise NotExported(name.id) from None
            raise
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        is_folder = MANIFEST in sizes and name.file is None
        files = [MANIFEST] if is_folder else [_gguf(name, sizes)]
        if is_folder:
            snapshot(name.id, info.sha, files, folder)
            files += sizes.keys() & read_manifest(folder).files.keys()
        missing = sum(sizes[file] for file in files if not (folder / file).is_file())
        require_free_disk(Path(constants.HF_HOME), missing)
        snapshot(name.id, info.sha, [glob.escape(file) for file in files], folder)
    path = _complete(name) if is_folder else folder / files[0]
    if path is None:
        raise RequestError(f"{PREFIX}{name.id} is incomplete, by its {MANIFEST}; push it again")
    return path


def _gguf(name: HubName, sizes: Collection[str]) -> str:
    files = sorted(file for file in sizes if file.endswith(".gguf"))
    if name.file in files:
        return str(name.file)
    if len(files) == 1 and name.file is None:
        return files[0]
    listed = ", ".join(f"{PREFIX}{name.id}/{file}" for file in files)
    if not files and "config.json" in sizes:
        raise NotExported(name.id)
    if not files:
        raise RequestError(f"{PREFIX}{name.id} has no {MANIFEST}: it is no artifact of rgexport")
    raise RequestError(f"{PREFIX}{name.id} has several GGUF files; expected one of {listed}")
