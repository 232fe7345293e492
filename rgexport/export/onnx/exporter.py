"""From a checkpoint to an ONNX artifact."""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from rgexport import __version__
from rgexport.atomic import check_target, replace_folder, require_free_disk
from rgexport.export.artifact import record_files, remember_verified, replaceable
from rgexport.export.card import write_card
from rgexport.export.manifest import ACTIVATIONS, Manifest, Source, write_manifest
from rgexport.export.onnx.model import build_model, io_record, save_model, state_records
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.onnx.storage import Storage
from rgexport.export.trace import trace
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.tokenizer_files import TOKENIZERS
from rgexport.progress import warn

_TOOLS = ("torch", "onnx", "onnx-ir", "numpy")
_GRAPH_BYTES = 16 << 20
"""Upper bound of everything in the folder but the weights and the tokenizer."""


def export_onnx(
    checkpoint: Checkpoint, options: OnnxOptions, target: Path, *, force: bool = False
) -> Path:
    """Exports `checkpoint` to the folder `target`, which appears when it is complete.

    Peak memory does not depend on the model's size: weights are read, encoded and written in
    slabs of a few MB.

    Raises:
        RequestError: an unsound checkpoint (all problems at once), a target that exists or
            cannot be written, too little disk, an option that does not fit.
    """
    check_target(target, force=force, replaceable=replaceable)
    if not any(path.name in TOKENIZERS for path in checkpoint.tokenizer_files):
        warn(f"{checkpoint.name} has no tokenizer: the artifact will take token ids, not text")
    plan, activation = options.resolve_plan(checkpoint.config), ACTIVATIONS[options.compute_word]
    shapes = {name: spec.shape for name, spec in model_tensors(checkpoint.config).items()}
    storage = Storage(plan, shapes)
    tokenizer_bytes = sum(path.stat().st_size for path in checkpoint.tokenizer_files)
    require_free_disk(target.resolve().parent, storage.size + tokenizer_bytes + _GRAPH_BYTES)
    hashes = require_sound(checkpoint)

    with replace_folder(target, force=force, replaceable=replaceable) as folder:
        program = trace(checkpoint.config, activation)
        save_model(build_model(program, storage, exact=options.exact), folder)
        storage.write(folder, checkpoint.weights)
        for path in checkpoint.tokenizer_files:
            shutil.copyfile(path, folder / path.name)
        manifest = Manifest(
            name=checkpoint.name,
            created_with=_versions(),
            source=Source(checkpoint.layout, checkpoint.name, hashes),
            config=checkpoint.config,
            precision=options.precision_word,
            compute=options.compute_word,
            exact=options.exact,
            plan=plan,
            tensors=storage.tensors,
            states=state_records(program),
            io=io_record(program),
            instruction_tuned=checkpoint.instruction_tuned,
            files={},
        )
        write_card(folder, manifest)
        manifest = manifest.with_files(record_files(folder))
        write_manifest(folder, manifest)
    remember_verified(target, manifest)
    return target


def _versions() -> dict[str, str]:
    tools = {name: version(name) for name in _TOOLS}
    return {"rgexport": __version__, "python": platform.python_version()} | tools
