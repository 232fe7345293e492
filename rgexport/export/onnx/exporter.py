"""Exports a checkpoint to an ONNX artifact."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rgexport.artifacts.artifact import files_of
from rgexport.artifacts.control_ids import ControlIds
from rgexport.artifacts.manifest import ACTIVATIONS, COLUMNS, Manifest, SelfCheck, StoredTensor
from rgexport.artifacts.onnx.format import FORMAT as ONNX_FORMAT
from rgexport.artifacts.onnx.format import graph_interface
from rgexport.artifacts.onnx.model_file import DATA_FILE, MODEL_FILE
from rgexport.artifacts.storage import aligned
from rgexport.errors import RequestError
from rgexport.export.exporter import Exporter, default_target
from rgexport.export.folder import export_folder
from rgexport.export.onnx.interface import with_interface
from rgexport.export.onnx.model import add_description, build_model, narrowed
from rgexport.export.onnx.profiles import PROFILES, FileLimit, OnnxOptions
from rgexport.export.storage import OffsetAllocator, fill
from rgexport.export.tokenizer import tokens_by_frequency
from rgexport.export.trace import trace
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.kernels.onnx import library
from rgexport.progress import task
from rgexport.quantize.algorithms.statistics import StatisticsOf, no_statistics
from rgexport.quantize.plan import bfloat16_gates
from rgexport.quantize.schemes.registry import Parts, Plan

_ALIGNMENT = 4096  # of every part: runtimes map the file, and a mapping starts at a page


def lay_out(
    plan: Plan, shapes: dict[str, tuple[int, ...]], limit: FileLimit | None
) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    """Returns the tensors and the sizes of their files: one, or more if there is a `limit`.

    Raises RequestError for a tensor that is too large.
    """
    tensors: dict[str, StoredTensor] = {}
    sizes: dict[str, int] = {}
    allocator = OffsetAllocator(DATA_FILE, _ALIGNMENT)
    for name, scheme in plan.items():
        before = allocator.size
        stored = allocator.allocate({name: scheme}, shapes, ONNX_FORMAT.part_shapes)
        if limit and before and aligned(allocator.size, _ALIGNMENT) > limit.filled:
            allocator = OffsetAllocator(f"{DATA_FILE}.{len(sizes)}", _ALIGNMENT)
            stored = allocator.allocate({name: scheme}, shapes, ONNX_FORMAT.part_shapes)
        if limit and allocator.size > limit.largest:
            raise RequestError(
                f"{name} takes {allocator.size:,} bytes as {scheme.label}, more than the "
                f"{limit.largest:,} of a file that a browser loads; store it in fewer bits, "
                "such as with --embedding-precision int8"
            )
        tensors |= stored
        sizes[allocator.file] = aligned(allocator.size, _ALIGNMENT)
    return tensors, sizes


def _encode(
    statistics: StatisticsOf, name: str, rows: np.ndarray, ids: np.ndarray, tensor: StoredTensor
) -> Parts:
    arrays = tensor.uniform.encode(name, rows, statistics(name), ids)
    return {COLUMNS: arrays.pop("data"), **arrays} if COLUMNS in tensor.parts else arrays


def _require_kernels() -> Path:
    """Returns the library of native kernels; raises RequestError if there is none."""
    path = library.library()
    if path is None:
        raise RequestError(
            f"--genai-native copies the native kernels, but {library.kernels().reason}; "
            "or leave it out, and onnxruntime-genai runs its own"
        )
    return path


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
    """Exports to the folder `target`, as `export_folder` does, and returns it.

    Weights are encoded in slabs of a few MB, so that memory does not grow with the model; `check`
    runs the complete artifact, which takes more. `statistics` are for algorithms that need them.
    Raises RequestError as `export_folder` does, and for options that do not fit the model.
    """
    gates = bfloat16_gates(checkpoint.config, checkpoint.weights)
    plan = options.resolve_plan(checkpoint.config, gates, tokens_by_frequency(checkpoint))
    activation = ACTIVATIONS[options.compute_word]
    shapes = {name: spec.shape for name, spec in model_tensors(checkpoint.config).items()}
    profile = PROFILES[options.profile]
    kernels = _require_kernels() if options.genai_native else None  # before minutes of work
    tensors, sizes = lay_out(plan, shapes, profile.files)

    def write_model(folder: Path, common: dict[str, Any], ids: ControlIds) -> Manifest:
        with task("Making the graph"):
            program = with_interface(trace(checkpoint.config, activation))
            states, io = graph_interface(checkpoint.config, activation)
            model = build_model(program, tensors, profile, exact=options.exact)
            add_description(model, checkpoint.name, options.precision_word, checkpoint.config)
            ir.save(model, folder / MODEL_FILE)
        fill(folder, sizes, tensors, checkpoint.weights, partial(_encode, statistics))
        manifest = Manifest(
            precision=options.precision_word,
            compute=options.compute_word,
            exact=profile.is_exact(plan, options.exact),
            profile=profile.name,
            plan=plan,
            tensors=tensors,
            states=states,
            io=io,
            **common,
        )
        if kernels is not None:
            shutil.copyfile(kernels, folder / kernels.name)
        ONNX_FORMAT.write_program_files(folder, manifest, ids, files_of(folder))
        return manifest

    size = sum(sizes.values())
    return export_folder(checkpoint, target, write_model, size, _TOOLS, force=force, check=check)


FORMAT = Exporter(
    make_options=OnnxOptions,
    export=export_onnx,
    default_target=lambda model, options: default_target(
        model, options.precision_word, "onnx", options.profile
    ),
    narrow=narrowed,
)
