"""A complete format outside of the package: float32 weights in one file, run by the reference."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.format import CardText, FolderFormat
from rgexport.artifacts.manifest import IoRecord, Manifest
from rgexport.chat.artifact_text import ArtifactText
from rgexport.export.folder import export_folder
from rgexport.export.storage import OffsetAllocator, fill
from rgexport.export.tokenizer import ControlIds
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import State, state_specs, zero_state
from rgexport.quantize.schemes.registry import Float, PartShapes, Scheme
from rgexport.runtimes.engine import Engine, SessionOptions
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.validate.formats.expected import Expected
from rgexport.validate.self_check import self_check

KIND, DATA = "toy", "toy.data"


class ToyFormat(FolderFormat):
    precisions = ("fp32",)

    def part_shapes(self, shape: tuple[int, ...], scheme: Scheme) -> PartShapes:
        return {"data": ("float32", shape)}

    def card(self, manifest: Manifest, verb: str) -> CardText:
        return CardText("a toy", "rest", f"    rgexport {verb}")


class ToySession(Session):
    """The reference with the artifact's weights, token by token or in chunks."""

    info = SessionInfo("toy", "1", 1, "float32", 0, 0, 16)
    vocab_size, state_shapes = 0, MappingProxyType({})

    def __init__(self, artifact: Artifact) -> None:
        self._config = artifact.manifest.config
        self.vocab_size = self._config.vocab_size
        self.state_shapes = {spec.name: spec.shape for spec in state_specs(self._config)}
        self._model = Reference(self._config, artifact.weights, keep=True)
        self.reset()

    @property
    def position(self) -> np.ndarray:
        return self._state["position"].copy()

    def reset(self, batch: int = 1) -> None:
        self._state = zero_state(self._config, batch)

    def get_rows(self, rows: range) -> State:
        return {name: value[rows.start : rows.stop].copy() for name, value in self._state.items()}

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        hidden, state = self._model.run(tokens, self.get_rows(rows))
        self._set_rows(rows, state)
        return self._model.logits(hidden[:, -num_logits:])

    def _set_rows(self, rows: range, state: State) -> None:
        for name, value in self._state.items():
            value[rows.start : rows.stop] = state[name]

    def close(self) -> None:
        pass


class ToyEngine(Engine):
    def session(self, artifact: Artifact, options: SessionOptions) -> Session:
        return ToySession(artifact)


FLOORS: dict[str, Any] = {
    "artifacts": ToyFormat(),
    "runtimes": ToyEngine(),
    "chat": ArtifactText(),
    "validate": Expected(),
}


def export_toy(checkpoint: Checkpoint, target: Path) -> Path:
    config = checkpoint.config
    plan = {name: Float("float32") for name in model_tensors(config)}
    shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
    allocator = OffsetAllocator(DATA, alignment=1)
    tensors = allocator.allocate(plan, shapes, ToyFormat().part_shapes)

    def write_model(folder: Path, common: dict[str, Any], _: ControlIds) -> Manifest:
        sizes, weights = {DATA: allocator.size}, checkpoint.weights
        fill(folder, sizes, tensors, weights, lambda n, rows, _, s: s.uniform.encode(n, rows))
        words = {"kind": KIND, "precision": "fp32", "compute": "fp32", "exact": False}
        io = {"states": (), "io": IoRecord((), ())}
        return Manifest(plan=dict(plan), tensors=tensors, **words, **io, **common)

    return export_folder(
        checkpoint,
        target,
        write_model,
        data_bytes=allocator.size,
        tools=(),
        force=False,
        check=lambda folder: self_check(checkpoint, folder),
    )
