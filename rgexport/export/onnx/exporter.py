"""Exports a checkpoint to an ONNX artifact."""

import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rgexport.export.artifact import files_of
from rgexport.export.checked import SelfCheck
from rgexport.export.folder import export_folder
from rgexport.export.manifest import ACTIVATIONS, Manifest
from rgexport.export.onnx.artifact import MODEL_FILE
from rgexport.export.onnx.format import FORMAT
from rgexport.export.onnx.interface import graph_interface, with_interface
from rgexport.export.onnx.model import add_description, build_model
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.onnx.profiles import PROFILES
from rgexport.export.onnx.program_files import require_kernels
from rgexport.export.onnx.storage import OnnxStorage
from rgexport.export.tokenizer import ControlIds
from rgexport.export.trace import trace
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.plan import bfloat16_gates
from rgexport.quantize.statistics import StatisticsOf, no_statistics

_TOOLS = ("torch", "onnx", "onnx-ir", "numpy")


def export_onnx(
    checkpoint: Checkpoint,
    options: OnnxOptions,
    target: Path,
    *,
    force: bool = False,
    check: SelfCheck | None = None,
    statistics: StatisticsOf = no_statistics,
) -> Path:
    """Exports `checkpoint` to the folder `target`, as `export_folder` does.

    Peak memory does not depend on the model's size: weights are read, encoded and written in
    slabs of a few MB. `check` runs the complete artifact, and takes memory of its own.
    `statistics` are for algorithms that need them.

    Raises:
        RequestError: those of `export_folder`, or an option that does not fit the model.
    """
    gates = bfloat16_gates(checkpoint.config, checkpoint.weights)
    plan = options.resolve_plan(checkpoint.config, gates)
    activation = ACTIVATIONS[options.compute_word]
    shapes = {name: spec.shape for name, spec in model_tensors(checkpoint.config).items()}
    profile = PROFILES[options.profile]
    if options.genai_native:
        require_kernels()  # before minutes of work
    storage = OnnxStorage(plan, shapes, profile.files)

    def write_model(folder: Path, common: dict[str, Any], ids: ControlIds) -> Manifest:
        program = with_interface(trace(checkpoint.config, activation))
        states, io = graph_interface(checkpoint.config, activation)
        model = build_model(program, storage.tensors, profile, exact=options.exact)
        add_description(model, checkpoint.name, options.precision_word, checkpoint.config)
        ir.save(model, folder / MODEL_FILE)
        storage.write(folder, checkpoint.weights, statistics)
        manifest = Manifest(
            precision=options.precision_word,
            compute=options.compute_word,
            exact=profile.is_exact(plan, options.exact),
            profile=profile.name,
            plan=plan,
            tensors=storage.tensors,
            states=states,
            io=io,
            **common,
        )
        if options.genai_native:
            kernels = require_kernels()
            shutil.copyfile(kernels, folder / kernels.name)
        FORMAT.write_program_files(folder, manifest, ids, files_of(folder))
        return manifest

    return export_folder(
        checkpoint,
        target,
        write_model,
        data_bytes=storage.size,
        tools=_TOOLS,
        force=force,
        check=check,
    )
