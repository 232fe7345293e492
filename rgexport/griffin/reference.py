"""The reference in torch: the step model with real weights, one layer at a time."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgexport._version import __version__
from rgexport.griffin import ops
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_by_layer import LayerByLayer
from rgexport.griffin.tensor import WeightSource


class Reference(LayerByLayer):
    """A model in float32 on a device of torch's; it has gradients."""

    def __init__(
        self,
        config: GriffinConfig,
        weights: WeightSource,
        *,
        device: str = "cpu",
        keep: bool = False,
    ):
        """On CUDA, TF32 is turned off for the process."""
        super().__init__(config, weights, keep=keep)
        self.device = torch.device(device)
        turn_off_tf32(self.device)

    run_each = torch.inference_mode()(LayerByLayer.run_each)
    logits = torch.inference_mode()(LayerByLayer.logits)

    def describe(self) -> dict[str, str]:
        return {"implementation": f"rgexport {__version__}", **describe_device(self.device)}

    def _compute(self, site: str, op: str, *arguments: Any) -> Any:
        return ops.compute_eagerly(site, op, *arguments)

    def _array(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _numpy(self, array: Tensor) -> np.ndarray:
        return array.cpu().numpy()


def turn_off_tf32(device: torch.device) -> None:
    """Makes CUDA compute float32 exactly, from now on in this process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def describe_device(device: torch.device) -> dict[str, str]:
    """Describes a device after `turn_off_tf32`."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": "float32",
        "tf32": "off",
        "torch": torch.__version__,
    }
