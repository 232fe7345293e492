"""A static site: the chat page, and the files of the models that it runs, in chunks.

A chunk is named by its hash: a download continues, and two models or versions share a chunk.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import CARD
from rgexport.artifacts.onnx.model_file import MODEL_FILE, weight_files
from rgexport.artifacts.onnx.program_files import CONFIG
from rgexport.artifacts.origin import GEMMA, GEMMA_TERMS
from rgexport.errors import RequestError
from rgexport.files.hashing import hash_file
from rgexport.files.targets import replace_folder, require_free_disk
from rgexport.progress import Advance, task, warn
from rgexport.web_page.build import BUILT

CHUNK_BYTES = 8 << 20
CATALOG = "model.json"
PROFILES = "webgpu", "wasm"
_UNNAMED = "other"  # the hub's identifier of a licence that has none
_NEEDED = CONFIG, "tokenizer.json", "tokenizer_config.json", MODEL_FILE
_ALWAYS = {CATALOG, "index.html", "sw.js"}
_OURS = re.compile(r"model\.json|index\.html|sw\.js|manifest\.webmanifest|icon.*|assets|chunks")
_WELCOME = "generation_config.json"


@dataclass(frozen=True)
class Chunk:
    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


Site = Mapping[str, Chunk | bytes]
"""Relative address → content."""


def make_site(artifacts: Sequence[Artifact]) -> Site:
    for artifact in artifacts:
        _require_suitable(artifact)
    profiles = [artifact.manifest.profile for artifact in artifacts]
    if len(set(profiles)) < len(profiles):
        raise RequestError(
            f"two artifacts are for {profiles[0]}; give one for each of {' and '.join(PROFILES)}"
        )
    if not BUILT.is_file():
        raise RequestError(
            "this installation has no page, as Node was missing when it was built: install Node, "
            "then run `make page` in a clone, or install rgexport again"
        )
    site: dict[str, Chunk | bytes] = {}
    total = sum(path.stat().st_size for artifact in artifacts for path in _files(artifact))
    with task("Hashing the model", total) as advance:
        models = [_add_model(site, artifact, advance) for artifact in artifacts]
    catalog = {"chunk_bytes": CHUNK_BYTES, "models": models}
    site[CATALOG] = (json.dumps(catalog, indent=1) + "\n").encode()
    with ZipFile(BUILT) as page:
        site |= {name: page.read(name) for name in page.namelist()}
    return site


def write_site(site: Site, folder: Path, *, force: bool) -> None:
    """Writes all files into a folder; with `force`, it may replace an earlier site."""
    total = sum(_size(content) for content in site.values())
    require_free_disk(folder, total)
    with (
        replace_folder(folder, force=force, replaceable=is_site) as new,
        task("Writing the site", total) as advance,
    ):
        for address, content in site.items():
            path = new / address
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_content(content))
            advance(_size(content))


def is_site(folder: Path) -> bool:
    """Whether a folder is a site by `write_site` without foreign files."""
    names = {path.name for path in folder.iterdir()}
    return names >= _ALWAYS and all(_OURS.fullmatch(name) for name in names)


def read_content(content: Chunk | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read()


def _size(content: Chunk | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.size


def _require_suitable(artifact: Artifact) -> None:
    manifest = artifact.manifest
    if manifest.kind != "onnx" or manifest.profile not in PROFILES:
        target = manifest.profile if manifest.kind == "onnx" else manifest.kind
        raise RequestError(
            f"{artifact.path} is for {target}; a browser needs the profile wasm or webgpu: "
            "rgexport onnx --profile wasm"
        )
    if manifest.instruction_tuned is False:
        warn(f"{manifest.name} is a base model: it continues text, but answers poorly")
    if artifact.origin().licence is None:
        warn(
            f"the card of {manifest.name} names no licence, so the page names none: add `license:` "
            f"to the head of {artifact.file(CARD)}. If the model is made from Google's weights, "
            f"write `license: {GEMMA}`, as the Gemma Terms of Use apply ({GEMMA_TERMS})"
        )
    if missing := [name for name in _NEEDED if name not in manifest.files]:
        raise RequestError(
            f"{artifact.path} lacks {', '.join(missing)}: it has no tokenizer, or an earlier "
            "rgexport made it; export it again"
        )


def _files(artifact: Artifact) -> list[Path]:
    names = [*_NEEDED, *weight_files(artifact.manifest)]
    names += [_WELCOME] if _WELCOME in artifact.manifest.files else []
    return [artifact.file(name) for name in dict.fromkeys(names)]


def _add_model(site: dict[str, Chunk | bytes], artifact: Artifact, advance: Advance) -> Any:
    """Adds the chunks of a model's files; a repeated one counts once in the entry's `bytes`."""
    files, sizes = [], dict[str, int]()
    for path in _files(artifact):
        hashes = []
        size = path.stat().st_size
        for offset in range(0, size, CHUNK_BYTES):
            chunk = Chunk(path, offset, min(CHUNK_BYTES, size - offset))
            name = hash_file(path, advance, chunk.offset, chunk.size).sha256
            site[f"chunks/{name}.bin"] = chunk
            sizes[name] = chunk.size
            hashes.append(name)
        files.append({"path": path.name, "bytes": size, "chunks": hashes})
    licence = artifact.origin().licence
    return {
        "name": artifact.manifest.name,
        "profile": artifact.manifest.profile,
        "gemma": licence == GEMMA,
        "licence": None if licence == _UNNAMED else licence,
        "bytes": sum(sizes.values()),
        "files": files,
    }
