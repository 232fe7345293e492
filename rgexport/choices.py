"""The words that options take, and their descriptions in help texts and error lines."""

from typing import Literal

SizeName = Literal["demo", "2b", "2b-it", "9b", "9b-it"]
"""A released model, or the bundled demo model."""

_HUB_ID = "a hub id (owner/name or hf:owner/name)"
CHECKPOINT_FORMS = f"a model folder, a DeepMind .pt file, {_HUB_ID}, demo, 2b, 2b-it, 9b or 9b-it"
ARTIFACT_FORMS = f"a folder or file of an export, such as of `rgexport onnx demo`, or {_HUB_ID}"
MODEL_FORMS = f"an artifact (a folder or file of an export), {CHECKPOINT_FORMS}"

SyntheticSize = Literal["2b", "2b-it", "9b", "9b-it"]
OnnxPrecision = Literal["fp32", "fp16", "int8", "int4"]
CoreMLPrecision = Literal["fp32", "fp16", "int8", "int4", "pal4"]
FloatPrecision = Literal["fp32", "fp16"]
Profile = Literal["cpu", "wasm", "webgpu"]
"""The runtime that the graph of an ONNX artifact is lowered for; see `export.onnx.profiles`."""
RecurrentState = Literal["io", "hilo"]
Quality = Literal["fast", "default", "best"]
FormatName = Literal["onnx", "coreml", "gguf"]
ReferenceImplementation = Literal["rgexport", "deepmind"]
GradeName = Literal["lossless", "excellent", "good", "fair", "poor"]
SuiteName = Literal["text", "memory", "noise", "window", "length", "tasks"]
TableFormat = Literal["table", "md", "json", "csv"]


def plan_advice(word: str) -> str:
    """Returns the end of an error line about an unknown precision.

    `int3` and other numbers of bits exist in plans alone; other words get no advice.
    """
    bits = word.lower().lstrip("intqbf-_ ")
    if not bits.isdigit() or bits in ("4", "8", "16", "32"):
        return ""
    return "; for another number of bits make a plan: rgexport quantize MODEL --bits"
