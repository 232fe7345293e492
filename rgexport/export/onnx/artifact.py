"""An ONNX artifact that is opened."""

from typing import Any

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.native import native_ops

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"


class OnnxArtifact(Artifact):
    """A folder with `model.onnx`, its data files and their manifest."""

    def facts(self) -> dict[str, Any]:
        """What the graph was lowered for, and which kernels would run it on this machine."""
        found = native_ops(self.file(MODEL_FILE))
        kernels = {"runs": found.kernels, "reason": found.reason}
        return {
            "profile": self.manifest.profile,
            "kernels": kernels | {"native": list(found.native), "ops": found.ops},
        }
