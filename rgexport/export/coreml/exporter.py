"""Exports a checkpoint to a Core ML artifact."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.export.coreml.manifest import (
    CoreMLManifest,
    CoreMLRecord,
    io_record,
    state_records,
)
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.package import (
    PackagePlan,
    packages,
    split_by_size,
    whole,
    write_package,
)
from rgexport.export.coreml.storage import MOST_PADDING, CoreMLStorage
from rgexport.export.folder import export_folder
from rgexport.export.manifest import Manifest, SelfCheck, StoredTensor
from rgexport.export.mil.checks import check_package
from rgexport.export.mil.package import open_package
from rgexport.export.tokenizer import ControlIds
from rgexport.export.trace import trace
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.statistics import StatisticsOf, no_statistics

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
    """Exports to a folder, as `export_folder` does, in memory that no model's size changes."""
    # coremltools takes seconds to load; its warnings about versions of torch are silenced.
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    from rgexport.export.coreml.model import add_metadata, build_model

    config, form = checkpoint.config, options.form
    plan = options.resolve_plan(config)
    shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
    split: tuple[int, ...] = ()
    if options.split is not None:
        tensors = CoreMLStorage(plan, shapes, packages(config.num_layers, ())).tensors
        sizes = {
            name: sum(part.nbytes + MOST_PADDING for part in stored.parts.values())
            for name, stored in tensors.items()
        }
        split = split_by_size(config.num_layers, sizes, options.split)
    plans = packages(config.num_layers, split)
    storage = CoreMLStorage(plan, shapes, plans)

    def write_model(folder: Path, common: dict[str, Any], _: ControlIds) -> Manifest:
        program = trace(config, form.activation)
        models = [build_model(program, config, storage.tensors, form, p) for p in plans]
        blobs = storage.write(folder, checkpoint.weights, statistics)
        for package, model in zip(plans, models, strict=True):
            add_metadata(model, checkpoint, options, package, blobs)
            write_package(folder, model, package.name)
            _require_sound_package(folder / package.name, package, storage.tensors)
        return CoreMLManifest(
            precision=options.precision_word,
            compute=options.compute_word,
            exact=True,
            plan=plan,
            tensors=storage.tensors,
            states=state_records(config, form),
            io=io_record(config, form, whole(config.num_layers)),
            coreml=CoreMLRecord(
                form.prefill_length, form.all_logits, form.recurrent_state, blobs, split
            ),
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


def _require_sound_package(
    path: Path, plan: PackagePlan, tensors: Mapping[str, StoredTensor]
) -> None:
    """Reads the package back, by code that the writer does not share, and checks it."""
    if wrong := list(check_package(open_package(path), plan.uses(tensors))):
        raise RequestError(
            f"the package would be wrong, {len(wrong)} complaints: {'; '.join(wrong[:3])}; "
            "this is a fault of rgexport, please report it"
        )
