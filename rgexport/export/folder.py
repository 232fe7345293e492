"""Makes an artifact's folder: what all formats that are one have in common."""

import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rgexport._version import __version__
from rgexport.artifacts.artifact import record_files, remember_verified
from rgexport.artifacts.card import card
from rgexport.artifacts.control_ids import ControlIds
from rgexport.artifacts.manifest import CARD, Manifest, SelfCheck, Source, write_manifest
from rgexport.artifacts.manifest_reader import is_artifact
from rgexport.artifacts.origin import origin_of
from rgexport.export.tokenizer import complete_tokenizer
from rgexport.files.atomic import evict_from_page_cache
from rgexport.files.targets import check_target, replace_folder, require_free_disk
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import FileHashes, require_sound
from rgexport.griffin.tokenizer_files import TOKENIZERS
from rgexport.progress import expect_stages, group, warn

_GRAPH_BYTES = 8 << 20  # upper bound of what is neither weights nor tokenizer
_COPIES = {".model": 9}  # Gemma's has 4 MB, the `tokenizer.json` that it becomes 33 MB

WriteModel = Callable[[Path, dict[str, Any], ControlIds], Manifest]


def export_folder(
    checkpoint: Checkpoint,
    target: Path,
    write_model: WriteModel,
    data_bytes: int,
    tools: Iterable[str],
    *,
    force: bool,
    check: SelfCheck | None,
) -> Path:
    """Makes the folder `target`, which appears when it is complete and was checked.

    `write_model` writes all but the tokenizer, with weights of `data_bytes`; the manifest records
    the versions of `tools`, packages. `check` runs the artifact; its record goes into card and
    manifest. Raises RequestError for an unsound checkpoint (all problems at once), a target that
    exists (unless `force` may replace it) or cannot be written, and too little disk.
    """
    check_target(target, force=force, replaceable=is_artifact)
    if not any(path.name in TOKENIZERS for path in checkpoint.tokenizer_files):
        warn(f"{checkpoint.name} has no tokenizer: the artifact will take token ids, not text")
    sizes = (f.stat().st_size * _COPIES.get(f.suffix, 1) for f in checkpoint.tokenizer_files)
    require_free_disk(target.resolve().parent, data_bytes + sum(sizes) + _GRAPH_BYTES)
    expect_stages(3 if check is None else 4)
    hashes = require_sound(checkpoint)

    with replace_folder(target, force=force, replaceable=is_artifact) as folder:
        for path in checkpoint.tokenizer_files:
            shutil.copyfile(path, folder / path.name)
        # First, so that torch uses the memory again that a large vocabulary takes.
        ids = complete_tokenizer(folder, checkpoint.name)
        manifest = write_model(
            folder, common_fields(checkpoint, hashes, tools) | {"files": {}}, ids
        )
        manifest = replace(manifest, files=record_files(folder))
        if check is not None:
            write_manifest(folder, manifest)
            remember_verified(folder, manifest)
            with group("Self-check"):
                manifest = replace(manifest, check=check(folder))
        (folder / CARD).write_text(card(manifest, origin_of(checkpoint)), "utf-8")
        records = manifest.files | record_files(folder, [CARD])
        manifest = replace(manifest, files=dict(sorted(records.items())))
        write_manifest(folder, manifest)
        for name in manifest.files:
            evict_from_page_cache(folder / name)
    remember_verified(target, manifest)
    return target


def common_fields(
    checkpoint: Checkpoint, hashes: FileHashes, tools: Iterable[str]
) -> dict[str, Any]:
    ours = {"rgexport": __version__, "python": platform.python_version()}
    return {
        "name": checkpoint.name,
        "created_with": ours | {name: version(name) for name in tools},
        "source": Source(checkpoint.layout, checkpoint.name, hashes),
        "config": checkpoint.config,
        "instruction_tuned": checkpoint.instruction_tuned,
        "asked_for": checkpoint.asked_for,
    }
