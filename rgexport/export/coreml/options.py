"""The options of a Core ML export."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import get_args

from rgexport.artifacts.coreml import manifest as interface
from rgexport.artifacts.manifest import ACTIVATIONS
from rgexport.choices import RecurrentState
from rgexport.errors import RequestError
from rgexport.export.request import FolderOptions, bytes_of, require_word
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import QUANTIZABLE, is_linear_bias, model_tensors
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
