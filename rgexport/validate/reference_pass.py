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
    ended, stops = threading.Event(), checkpoints(len(tokens))

    def run(
        config: GriffinConfig, weights: WeightSource, mix_inputs: bool, watched: WeightSource
    ) -> Pass:
        recorder, model = MixtureRecorder(config, len(tokens)), NumpyReference(config, watched)
        model.look = recorder.look if mix_inputs else None
        ((hidden, states),) = model.run_each([(tokens[None], zero_state(config, 1))], stops=[stops])
        drift = {stop: recent(state) for stop, state in zip(stops, states, strict=False)}
        return Pass(NumpyReference(config, weights), hidden, states[-1], drift, recorder.mixtures)

    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        jobs = []
        try:
            for config, weights, mix_inputs in models:
                watched = stack.enter_context(watched_layers(label, weights, ended))
                jobs.append(pool.submit(run, config, weights, mix_inputs, watched))
            return [job.result() for job in jobs]
        finally:
            ended.set()  # an interrupt ends all of them


@contextmanager
def watched_layers(
    label: str, weights: WeightSource, ended: threading.Event | None = None
) -> Iterator[WeightSource]:
    """Yields the same weights; reads of layers show progress, and raise once `ended` is set."""
    layers = {name: tensor for name, tensor in weights.items() if name != EMBEDDING}
    with task(label, sum(tensor.nbytes for tensor in layers.values())) as advance:

        def read(tensor: RowTensor, start: int, stop: int) -> np.ndarray:
            if ended is not None and ended.is_set():
                raise InterruptedError
            rows = tensor.read(start, stop)
            advance(rows.nbytes)
            return rows

        watched = {n: replace(one, read=partial(read, one)) for n, one in layers.items()}
        yield {**weights, **watched}


class SharedPasses:
    def __init__(self) -> None:
        self._passes: dict[tuple[Path, GriffinConfig, bytes], Pass] = {}

    def has(self, original: Checkpoint, tokens: np.ndarray) -> bool:
        return (original.path, original.config, tokens.tobytes()) in self._passes

    def run_reference(self, original: Checkpoint, tokens: np.ndarray) -> Pass:
        """Runs an original over tokens [T], or returns its earlier pass over them."""
        label, config, weights = "Running the original", original.config, original.weights
        key = original.path, config, tokens.tobytes()
        if key not in self._passes:
            self._passes[key] = run_reference(label, config, weights, tokens, mix_inputs=True)
        return self._passes[key]
