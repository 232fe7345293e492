"""The manifest of a Core ML package."""

from dataclasses import dataclass

from rgexport.export.coreml.segments import PackagePlan, packages
from rgexport.export.coreml.states import Form, RecurrentState
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
    split: tuple[int, ...] = ()
    """The layers of each package, if the model is cut into several (`segments.packages`)."""


@dataclass(frozen=True, kw_only=True)
class CoreMLManifest(Manifest):
    """The manifest of a Core ML artifact."""

    kind: str = KIND
    coreml: CoreMLRecord

    @property
    def packages(self) -> tuple[PackagePlan, ...]:
        """The packages of the artifact."""
        return packages(self.config.num_layers, self.coreml.split)

    @property
    def form(self) -> Form:
        """The interface of the packages."""
        record = self.coreml
        shape = record.prefill_length, record.all_logits, record.recurrent_state
        return Form(*shape, self.compute)
