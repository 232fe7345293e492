"""A complete format outside of the package: float32 weights in one file, run by the reference."""

from pathlib import Path
from typing import Any

import numpy as np

from rgexport.chat.artifact_text import ArtifactText
from rgexport.export.artifact import Artifact
from rgexport.export.folder import export_folder
from rgexport.export.format import CardText, FolderFormat, Layouts
from rgexport.export.manifest import IoRecord, Manifest, StoredTensor
from rgexport.export.storage import Places, fill
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import State, zero_state
from rgexport.quantize.affine import Parts
from rgexport.quantize.algorithms import encode
from rgexport.quantize.scheme import Float, Scheme
from rgexport.runtimes.engine import Engine
from rgexport.runtimes.sequences import checked_tokens
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.validate.formats.expected import Expected
from rgexport.validate.self_check import self_check

KIND, DATA = "toy", "toy.data"


class ToyFormat(FolderFormat):
    """What it stores and how it opens."""

    precisions = ("fp32",)

    def part_layouts(self, shape: tuple[int, ...], scheme: Scheme) -> Layouts:
        return {"data": ("float32", shape)}

    def card(self, manifest: Manifest, verb: str) -> CardText:
        return CardText("a toy", "rest", f"    rgexport {verb}")


class ToySession:
    """The reference with the artifact's weights, token by token or in chunks."""

    def __init__(self, artifact: Artifact) -> None:
        self._config = artifact.manifest.config
        self._model = Reference(self._config, artifact.weights, keep=True)
        self.vocab_size = self._config.vocab_size
        self.info = SessionInfo("toy", "1", 1, "float32", 0, 0, 16)
        self.reset()

    @property
    def position(self) -> np.ndarray:
        return self._state["position"].copy()

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        tokens = checked_tokens(tokens, len(self.position), self.vocab_size)
        hidden, self._state = self._model.run(tokens, self._state)
        return self._model.logits(hidden[:, -num_logits:])

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self.prefill(tokens[:, None])[:, 0]

    def reset(self, batch: int = 1) -> None:
        self._state = zero_state(self._config, batch)

    def get_state(self) -> State:
        return {name: value.copy() for name, value in self._state.items()}

    def set_state(self, state: State) -> None:
        self._state = {name: value.copy() for name, value in state.items()}

    def close(self) -> None:
        pass


class ToyEngine(Engine):
    """What runs it."""

    def session(self, artifact: Artifact, *, threads: int | None = None) -> Session:
        return ToySession(artifact)


FLOORS: dict[str, Any] = {
    "export": ToyFormat(),
    "runtimes": ToyEngine(),
    "chat": ArtifactText(),
    "validate": Expected(),
}


def export_toy(checkpoint: Checkpoint, target: Path) -> Path:
    config = checkpoint.config
    plan = {name: Float("float32") for name in model_tensors(config)}
    shapes = {name: spec.shape for name, spec in model_tensors(config).items()}
    places = Places(DATA, alignment=1)
    tensors = places.tensors(plan, shapes, ToyFormat().part_layouts)

    def write_model(folder: Path, common: dict[str, Any]) -> Manifest:
        (folder / DATA).write_bytes(bytes(places.size))
        fill(folder, tensors, checkpoint.weights, _encode)
        return Manifest(
            kind=KIND,
            precision="fp32",
            compute="fp32",
            exact=False,
            plan=dict(plan),
            tensors=tensors,
            states=(),
            io=IoRecord((), ()),
            **common,
        )

    return export_folder(
        checkpoint,
        target,
        write_model,
        data_bytes=places.size,
        tools=(),
        force=False,
        check=lambda folder: self_check(checkpoint, folder),
    )


def _encode(name: str, rows: np.ndarray, ids: np.ndarray, stored: StoredTensor) -> Parts:
    return encode(name, rows, stored.scheme)
