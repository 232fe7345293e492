"""A reference's teacher-forced pass over a text, kept as hidden states; logits come on demand."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_by_layer import LayerByLayer
from rgexport.griffin.layout import EMBEDDING
from rgexport.griffin.numpy_reference import NumpyReference
from rgexport.griffin.state import State, zero_state
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.progress import task
from rgexport.validate.metrics import checkpoints, recent
from rgexport.validate.weights.sketch import MixtureRecorder, Mixtures

if TYPE_CHECKING:
    from rgexport.validate.reference.deepmind_model import DeepMindModel

ReferenceModel: TypeAlias = "LayerByLayer | DeepMindModel"


@dataclass(frozen=True)
class Pass:
    """One pass over tokens [T]: `hidden` is [1, T, width], `state` the state after it.

    `drift` has the states inside, reduced by `metrics.recent`, `inputs` mixtures of linears'
    inputs.
    """

    model: ReferenceModel
    hidden: Any
    state: State
    drift: dict[int, State]
    inputs: Mixtures

    def logits(self, start: int, stop: int) -> np.ndarray:
        """Computes the logits [stop - start, vocab] of the positions from `start` on."""
        return self.model.logits(self.hidden[:, start:stop])[0]


def run_reference(
    label: str,
    config: GriffinConfig,
    weights: WeightSource,
    tokens: np.ndarray,
    *,
    mix_inputs: bool = False,
) -> Pass:
    """Runs a reference over tokens [T]; its progress counts bytes of weights."""
    return run_side_by_side(label, [(config, weights, mix_inputs)], tokens)[0]


def run_side_by_side(
    label: str, models: Sequence[tuple[GriffinConfig, WeightSource, bool]], tokens: np.ndarray
) -> list[Pass]:
    """Runs references in a thread each, since reading takes one; the flag is `mix_inputs`."""
    ended = threading.Event()
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        jobs = []
        try:
            for config, weights, mix_inputs in models:
                watched = stack.enter_context(watched_layers(label, weights, ended))
                jobs.append(pool.submit(_run, config, weights, watched, tokens, mix_inputs))
            return [job.result() for job in jobs]
        finally:
            ended.set()  # an interrupt ends all of them


def _run(
    config: GriffinConfig,
    weights: WeightSource,
    watched: WeightSource,
    tokens: np.ndarray,
    mix_inputs: bool,
) -> Pass:
    """Runs one reference with `watched` weights; the pass reads the head from `weights`."""
    stops = checkpoints(len(tokens))
    recorder = MixtureRecorder(config, len(tokens))
    model = NumpyReference(config, watched)
    if mix_inputs:
        model.look = recorder.look

    text = (tokens[None], zero_state(config, 1))
    ((hidden, states),) = model.run_each([text], stops=[stops])
    drift = {}
    for stop, state in zip(stops, states, strict=False):  # the last state is that after the text
        drift[stop] = recent(state)
    return Pass(NumpyReference(config, weights), hidden, states[-1], drift, recorder.mixtures)


@contextmanager
def watched_layers(
    label: str, weights: WeightSource, ended: threading.Event | None = None
) -> Iterator[WeightSource]:
    """Yields the same weights; reads of layers show progress, and raise once `ended` is set."""
    layers = {name: tensor for name, tensor in weights.items() if name != EMBEDDING}
    total = sum(tensor.nbytes for tensor in layers.values())
    with task(label, total) as advance:

        def read(tensor: RowTensor, start: int, stop: int) -> np.ndarray:
            if ended is not None and ended.is_set():
                raise InterruptedError
            rows = tensor.read(start, stop)
            advance(rows.nbytes)
            return rows

        watched = dict(weights)
        for name, tensor in layers.items():
            watched[name] = replace(tensor, read=partial(read, tensor))
        yield watched


class SharedPasses:
    """The passes of originals over texts, kept for the artifacts that are validated next."""

    def __init__(self) -> None:
        self._passes: dict[tuple[Path, GriffinConfig, bytes], Pass] = {}

    def has(self, original: Checkpoint, tokens: np.ndarray) -> bool:
        """Whether an original has run over tokens [T]."""
        return _pass_key(original, tokens) in self._passes

    def run_reference(self, original: Checkpoint, tokens: np.ndarray) -> Pass:
        """Runs an original over tokens [T], or returns its earlier pass over them."""
        key = _pass_key(original, tokens)
        if key not in self._passes:
            self._passes[key] = run_reference(
                "Running the original", original.config, original.weights, tokens, mix_inputs=True
            )
        return self._passes[key]


def _pass_key(original: Checkpoint, tokens: np.ndarray) -> tuple[Path, GriffinConfig, bytes]:
    return original.path, original.config, tokens.tobytes()
