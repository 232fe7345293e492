"""Exports a checkpoint to a Core ML artifact, by its options."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from rgexport.choices import RecurrentState
from rgexport.errors import RequestError
from rgexport.export.coreml import manifest as interface
from rgexport.export.coreml.package import packages, split_by_size, whole, write_package
from rgexport.export.coreml.storage import MOST_PADDING, CoreMLStorage
from rgexport.export.exporter import Exporter
from rgexport.export.folder import export_folder
from rgexport.export.manifest import ACTIVATIONS, Manifest, SelfCheck
from rgexport.export.opening import default_target
from rgexport.export.request import FolderOptions, bytes_of, require_word
from rgexport.export.tokenizer import ControlIds
from rgexport.export.trace import trace
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import QUANTIZABLE, is_linear_bias, model_tensors
from rgexport.progress import task
from rgexport.quantize.algorithms.statistics import StatisticsOf, no_statistics
from rgexport.quantize.plan import (
    COREML_PRECISIONS,
    choose_scheme,
    choose_schemes,
    make_plan,
    with_algorithm,
)
from rgexport.quantize.schemes.registry import Float, Plan, Scheme


@dataclass(frozen=True, kw_only=True)
class CoreMLOptions(FolderOptions):
    """The options of a Core ML export; scales, tables and biases have the dtype of `compute`.

    The `prefill` function takes `prefill_length` tokens and returns the logits of the last one, or
    `all_logits`. `recurrent_state` is `io` for a float32 input and output, `hilo` for a pair of
    float16 states. `split` is the most bytes of weights that a package may have, or a text such as
    `1GB`.
    """

    prefill_length: int = 128
    all_logits: bool = False
    recurrent_state: RecurrentState = "io"
    split: int | str | None = None
    default_compute = "fp16"

    def __post_init__(self) -> None:
        self.require_consistent()
        require_word("--recurrent-state", self.recurrent_state, get_args(RecurrentState))
        if self.prefill_length < 2:
            raise RequestError(f"--prefill-length is {self.prefill_length}; expected 2 or more")
        _ = self.split_bytes  # refuses a text that is no size
        for scheme in () if self.plan else self._schemes():
            self._require_computable("weights are to be stored", scheme)

    @property
    def split_bytes(self) -> int | None:
        size = self.split
        return int(bytes_of("--split", size)) if isinstance(size, str) else size

    @property
    def defaults(self) -> tuple[str, Mapping[str, str]]:
        return "int4", {"int4": "int8", "pal4": "int8"}

    @property
    def form(self) -> interface.Form:
        return interface.Form(
            self.prefill_length, self.all_logits, self.recurrent_state, self.compute_word
        )

    def resolve_plan(self, config: GriffinConfig) -> Plan:
        """Makes the plan: schemes fitted to the shapes, a user's too, in the dtype of `compute`."""
        plan = self.plan or make_plan(config, *self._schemes())
        plan = with_algorithm(plan, self.algorithm, keep=self.plan is not None)
        dtype, tensors = ACTIVATIONS[self.compute_word], model_tensors(config)
        resolved: dict[str, Scheme] = {}
        for name, scheme in plan.items():
            if tensors[name].role in QUANTIZABLE:
                self._require_computable(f"the plan stores {name}", scheme)
                resolved[name] = scheme.fitted(tensors[name].shape).with_dtype(dtype)
            else:
                resolved[name] = Float(dtype if is_linear_bias(name, tensors) else "float32")
        return resolved

    def _schemes(self) -> tuple[Scheme, Scheme]:
        choose = partial(choose_scheme, precisions=COREML_PRECISIONS)
        return choose_schemes(self.precisions, choose, self.block_size, self.symmetric)

    def _require_computable(self, subject: str, scheme: Scheme) -> None:
        """MIL's `linear` takes weights of the dtype of its activations."""
        if self.compute_word == "fp16" and scheme == Float("float32"):
            raise RequestError(
                f"{subject} as float32, but products in fp16 take fp16 weights; take --compute "
                "fp32 or another precision"
            )


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


EXPORTER = Exporter(
    make_options=CoreMLOptions,
    export=export_coreml,
    default_target=lambda model, options: default_target(model, options.precision_word, "coreml"),
)
