"""The engines that tests of every engine run, with random models in their formats."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.artifacts import Made, export_random, export_random_coreml, export_random_gguf
from tests.llama_tools import needs_llama_cpp

EXPORTS: dict[str, Callable[..., Made]] = {
    "onnx": export_random,
    "coreml": export_random_coreml,
    "gguf": export_random_gguf,
}
"""Kind of artifact → what exports a random model; Core ML's interpreter runs everywhere."""


def engine(kind: str, *values: Any) -> Any:
    """Returns a parameter set of pytest that begins with a kind of artifact."""
    marks = [needs_llama_cpp] if kind == "gguf" else []
    words = (value for value in (kind, *values) if isinstance(value, str))
    return pytest.param(kind, *values, marks=marks, id="-".join(words))


ENGINES = [engine(kind) for kind in EXPORTS]
