"""Exports a checkpoint to a Core ML artifact, by its options."""

import logging
from pathlib import Path
from typing import Any

from rgexport.artifacts.control_ids import ControlIds
from rgexport.artifacts.coreml import manifest as interface
from rgexport.artifacts.coreml.package import packages, whole
from rgexport.artifacts.manifest import Manifest, SelfCheck
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.coreml.package import split_by_size, write_package
from rgexport.export.coreml.storage import MOST_PADDING, CoreMLStorage
from rgexport.export.exporter import Exporter, default_target
from rgexport.export.folder import export_folder
from rgexport.export.trace import trace
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.progress import task
from rgexport.quantize.algorithms.statistics import StatisticsOf, no_statistics

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
    """Exports to the folder `target`, as `export_folder` does, and returns it.

    Memory, `check`, `statistics` and errors are as in `export_onnx`.
    """
    # coremltools takes seconds to load; its warnings about versions of torch are silenced.
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    from rgexport.export.coreml.model import add_metadata, build_model

    config, form = checkpoint.config, options.form
    plan = options.resolve_plan(config)
    shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
    split: tuple[int, ...] = ()
    if options.split_bytes is not None:
        tensors = CoreMLStorage(plan, shapes, packages(config.num_layers, ())).tensors
        sizes = {
            name: sum(part.nbytes + MOST_PADDING for part in stored.parts.values())
            for name, stored in tensors.items()
        }
        split = split_by_size(config.num_layers, sizes, options.split_bytes)
    plans = packages(config.num_layers, split)
    storage = CoreMLStorage(plan, shapes, plans)

    def write_model(folder: Path, common: dict[str, Any], _: ControlIds) -> Manifest:
        with task("Making the graph"):
            program = trace(config, form.activation)
            models = [build_model(program, config, storage.tensors, form, p) for p in plans]
        blobs = storage.write(folder, checkpoint.weights, statistics)
        for package, model in zip(plans, models, strict=True):
            add_metadata(model, checkpoint, options, package, blobs)
            write_package(folder, model, package.name)
        return interface.CoreMLManifest(
            precision=options.precision_word,
            compute=options.compute_word,
            exact=True,
            plan=plan,
            tensors=storage.tensors,
            states=interface.state_records(config, form),
            io=interface.io_record(config, form, whole(config.num_layers)),
            coreml=interface.CoreMLRecord(
                form.prefill_length, form.all_logits, form.recurrent_state, blobs, split
            ),
            **common,
        )

    size = sum(storage.sizes.values())
    return export_folder(checkpoint, target, write_model, size, _TOOLS, force=force, check=check)


FORMAT = Exporter(
    make_options=CoreMLOptions,
    export=export_coreml,
    default_target=lambda model, options: default_target(model, options.precision_word, "coreml"),
)
