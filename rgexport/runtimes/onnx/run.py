"""One run of a graph, over buffers of our own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort

from rgexport.errors import RequestError, one_line


@contextmanager
def engine_errors(action: str) -> Iterator[None]:
    """Turns what ONNX Runtime raises, a dozen types without a common base, into one line."""
    try:
        yield
    except Exception as error:
        reason = one_line(str(error)) or type(error).__name__
        raise RequestError(f"ONNX Runtime {ort.__version__} cannot {action}: {reason}") from None


class Run:
    """Inputs and outputs bound to arrays, which are kept: ONNX Runtime may keep only pointers."""

    def __init__(self, session: ort.InferenceSession):
        self._session, self._binding = session, session.io_binding()
        self._arrays: dict[str | None, np.ndarray] = {}

    def bind(self, array: np.ndarray, source: str | None, target: str | None = None) -> None:
        """Binds `array` as the input `source`, and as the output `target`.

        Binding a name again replaces what was bound to it.
        """
        self._arrays[source or target] = array
        with engine_errors(f"bind {source or target}"):
            value = ort.OrtValue.ortvalue_from_numpy(array)
            if source:
                self._binding.bind_ortvalue_input(source, value)
            if target:
                self._binding.bind_ortvalue_output(target, value)

    def run(self) -> None:
        """Runs the graph.

        Raises:
            RequestError: the graph cannot be run; an op or the engine says why.
        """
        with engine_errors("run the model"):
            self._session.run_with_iobinding(self._binding)

    def fetch(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Runs the graph; the outputs `names`, none of which is bound."""
        for name in names:
            self._binding.bind_output(name)
        self.run()
        found = self._binding.get_outputs()[-len(names) :]
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}
