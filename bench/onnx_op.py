"""One quantized linear alone, for many tokens, beside oneDNN's int8 product through torch."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from bench.onnx_models import SHAPES, STORAGES, Storage, op_model
from rgexport.kernels.onnx.library import library
from rgexport.parallelism import usable_processors
from rgexport.progress import note
from rgexport.runtimes.bench.roofline import seconds

TOKENS = 512
CALLS = 3
"""Of each in a round, after one that is not counted; the fastest counts."""
_ERRORS_ONLY = 3

Call = Callable[[], Any]


def op_alone(options: argparse.Namespace) -> dict[str, Any]:
    """A list of shapes, each with the rates of all, in operations a second, round by round."""
    threads = usable_processors()
    torch.set_num_threads(threads)
    shapes = []
    for inputs, outputs in SHAPES:
        note(f"one linear, {inputs} to {outputs}")
        calls = _calls(inputs, outputs, threads)
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                call()
                best = min(seconds(call) for _ in range(CALLS))
                rates[name].append(2 * TOKENS * inputs * outputs / best)
        shapes.append({"inputs": inputs, "outputs": outputs, "rates": rates})
    return {"tokens": TOKENS, "threads": threads, "shapes": shapes}


def _calls(inputs: int, outputs: int, threads: int) -> dict[str, Call]:
    """Name → what computes it once: oneDNN by rows and by columns, and each storage twice."""
    calls = dict(_onednn(inputs, outputs))
    for name, storage in STORAGES.items():
        for kernels in ("native", "stock"):
            calls[f"{name} {kernels}"] = _run(inputs, outputs, storage, threads, kernels)
    return calls


def _onednn(inputs: int, outputs: int) -> dict[str, Call]:
    """Products of int8 numbers into int32, without scales; the weight in both layouts."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)

    x, y = numbers(TOKENS, inputs), torch.empty(TOKENS, outputs, dtype=torch.int32)
    weights = {"rows": numbers(inputs, outputs), "columns": numbers(outputs, inputs).t()}
    return {
        f"oneDNN {name}": partial(torch._int_mm, x, weight, out=y)
        for name, weight in weights.items()
    }


def _run(inputs: int, outputs: int, storage: Storage, threads: int, kernels: str) -> Call:
    """The op in ONNX Runtime, over arrays that are bound once."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = _ERRORS_ONLY
    # Idle threads that spin would slow down whoever comes next.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if kernels == "native":
        settings.register_custom_ops_library(str(library()))
    model = op_model(inputs, outputs, storage)
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, TOKENS, inputs), np.float32)
    y = np.empty((1, TOKENS, outputs), np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y))
    kept = x, y

    def call() -> object:
        session.run_with_iobinding(binding)
        return kept

    return call
