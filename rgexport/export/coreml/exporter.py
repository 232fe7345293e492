"""From a checkpoint to a Core ML artifact."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgexport.errors import RequestError
from rgexport.export.checked import SelfCheck
from rgexport.export.coreml.manifest import CoreMLManifest, CoreMLRecord
from rgexport.export.coreml.metadata import add_metadata
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.package import PACKAGE, write_package
from rgexport.export.coreml.states import io_record, state_records
from rgexport.export.coreml.storage import Storage
from rgexport.export.folder import export_folder
from rgexport.export.manifest import Manifest
from rgexport.export.mil.checks import check_package
from rgexport.export.mil.package import open_package
from rgexport.export.trace import trace
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.statistics import StatisticsOf, no_statistics

if TYPE_CHECKING:
    from coremltools.proto.Model_pb2 import Model

_TOOLS = ("torch", "coremltools", "numpy")


def export_coreml(
    checkpoint: Checkpoint,
    options: CoreMLOptions,
    target: Path,
    *,
    force: bool = False,
    check: SelfCheck | None = None,
    statistics: StatisticsOf = no_statistics,
) -> Path:
    """Exports `checkpoint` to the folder `target`, which appears when it is complete.

    Peak memory does not depend on the model's size: weights are read, encoded and written in
    slabs of a few MB. `check` runs the complete artifact, and takes memory of its own.
    `statistics` are for algorithms that need them.

    Raises:
        RequestError: an unsound checkpoint (all problems at once), a target that exists or
            cannot be written, too little disk, an option that does not fit.
    """
    build_model = _load_builder()
    config, form = checkpoint.config, options.form
    plan = options.resolve_plan(config)
    storage = Storage(plan, {name: spec.shape for name, spec in model_tensors(config).items()})

    def write_model(folder: Path, common: dict[str, Any]) -> Manifest:
        model = build_model(trace(config, form.activation), config, storage.tensors, form)
        blobs = storage.write(folder, checkpoint.weights, statistics)
        add_metadata(model, checkpoint, options, blobs)
        write_package(folder, model)
        _require_sound_package(folder, storage)
        return CoreMLManifest(
            precision=options.precision_word,
            compute=options.compute_word,
            exact=True,
            plan=plan,
            tensors=storage.tensors,
            states=state_records(config, form),
            io=io_record(config, form),
            coreml=CoreMLRecord(form.prefill_length, form.all_logits, form.recurrent_state, blobs),
            **common,
        )

    return export_folder(
        checkpoint,
        target,
        write_model,
        data_bytes=storage.size,
        tools=_TOOLS,
        force=force,
        check=check,
    )


def _load_builder() -> "Callable[..., Model]":
    """Loads coremltools, which takes seconds, without its warnings about versions of torch."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    from rgexport.export.coreml.model import build_model

    return build_model


def _require_sound_package(folder: Path, storage: Storage) -> None:
    """Reads the package back, by code that the writer does not share, and checks it."""
    if wrong := list(check_package(open_package(folder / PACKAGE), storage.tensors)):
        raise RequestError(
            f"the package would be wrong, {len(wrong)} complaints: {'; '.join(wrong[:3])}; "
            "this is a fault of rgexport, please report it"
        )
