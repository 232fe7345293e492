"""The manifest of a Core ML package."""

from dataclasses import dataclass

from rgexport.export.coreml.states import RecurrentState
from rgexport.export.manifest import Manifest

KIND = "coreml"


@dataclass(frozen=True)
class CoreMLRecord:
    """What only a Core ML package has."""

    prefill_length: int
    """Tokens that the `prefill` function takes."""
    all_logits: bool
    """Whether `prefill` gives the logits of all its tokens, or of the last one."""
    recurrent_state: RecurrentState
    """Whether the RG-LRU's state goes in and out, or is kept as two float16 states."""
    blobs: dict[str, str]
    """`TENSOR.PART` → SHA-256 of its data, so that one that was altered can be named."""


@dataclass(frozen=True, kw_only=True)
class CoreMLManifest(Manifest):
    """The whole of it."""

    kind: str = KIND
    coreml: CoreMLRecord
