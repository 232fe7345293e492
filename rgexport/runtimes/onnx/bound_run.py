"""Runs of ONNX Runtime with inputs and outputs bound to arrays, which are used again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort

from rgexport.errors import RequestError, one_line


@contextmanager
def engine_errors(action: str) -> Iterator[None]:
    """Turns the errors of ONNX Runtime, which have no common base, into one line."""
    try:
        yield
    except Exception as error:
        reason = one_line(str(error)) or type(error).__name__
        raise RequestError(f"ONNX Runtime {ort.__version__} cannot {action}: {reason}") from None


class BoundRun:
    """A graph with inputs and outputs bound to arrays; ONNX Runtime may keep only pointers."""

    def __init__(self, session: ort.InferenceSession):
        self._session = session
        self._binding = session.io_binding()
        self._arrays: dict[str | None, np.ndarray] = {}
        """The bound arrays, by input or output, which must live as long as the binding."""

    def bind(self, array: np.ndarray, source: str | None, target: str | None = None) -> None:
        """Binds `array` as the input `source` and the output `target`, instead of earlier ones."""
        name = source or target
        self._arrays[name] = array
        with engine_errors(f"bind {name}"):
            value = ort.OrtValue.ortvalue_from_numpy(array)
            if source:
                self._binding.bind_ortvalue_input(source, value)
            if target:
                self._binding.bind_ortvalue_output(target, value)

    def run(self) -> None:
        """Runs the graph once, into the bound outputs."""
        with engine_errors("run the model"):
            self._session.run_with_iobinding(self._binding)

    def fetch(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Runs the graph once; returns outputs by name that are not bound to arrays."""
        for name in names:
            self._binding.bind_output(name)
        self.run()
        outputs = self._binding.get_outputs()[-len(names) :]
        return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}
