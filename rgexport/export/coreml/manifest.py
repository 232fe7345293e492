"""The manifest of a Core ML package."""

from dataclasses import dataclass

from rgexport.export.coreml.states import RecurrentState
from rgexport.export.manifest import Manifest

KIND = "coreml"


@dataclass(frozen=True)
class CoreMLRecord:
    """What only the manifest of a Core ML package has."""

    prefill_length: int
    """Tokens that the `prefill` function takes."""
    all_logits: bool
    """Whether `prefill` gives the logits of all its tokens, or only of the last one."""
    recurrent_state: RecurrentState
    """`io`: the RG-LRU's state is an input and an output; `hilo`: a pair of float16 states."""
    blobs: dict[str, str]
    """`TENSOR.PART` → SHA-256 of its data, so that altered tensors can be named."""


@dataclass(frozen=True, kw_only=True)
class CoreMLManifest(Manifest):
    """The manifest of a Core ML artifact."""

    kind: str = KIND
    coreml: CoreMLRecord
