"""Maps the weights that native kernels read from their files, in huge pages.

An engine maps each tensor by itself, in pages of 4 kB; then a step spends a tenth of its time on
address translation. Here each file is mapped once. Where the kernel keeps files in large folios
(Linux 6.16 and ext4, XFS, btrfs), `MADV_HUGEPAGE` has it read ahead in huge pages. Nothing is
copied.
"""

import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from rgexport.artifacts.onnx.model_file import ExternalTensor
from rgexport.griffin.tensor import advise_kernel
from rgexport.runtimes.huge_pages import Area, BackgroundAdvice
from rgexport.runtimes.machine import available_bytes

_HUGEPAGE, _POPULATE_READ, _WILLNEED = 14, 22, 3
_DTYPES: dict[int, type[np.generic]] = dict(
    {1: np.float32, 2: np.uint8, 3: np.int8, 10: np.float16, 16: np.uint16}
)
"""The types that native kernels read: onnx.proto's number → numpy's type; 16 is bfloat16, which
numpy lacks."""


class MappedWeights:
    """Tensors in the files of a folder; one that does not fit into its file is skipped.

    `values` are for `SessionOptions.add_initializer`, by name. ONNX Runtime keeps only pointers to
    them: this object must live as long as the session.
    """

    def __init__(self, folder: Path, tensors: Sequence[ExternalTensor]):
        self._folder = folder
        self._files: dict[str, mmap.mmap] = {}
        self._advice = BackgroundAdvice()
        self.values: dict[str, ort.OrtValue] = {}
        for tensor in tensors:
            if (array := self._view(tensor)) is not None:
                self.values[tensor.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    array, tensor.data_type
                )

    def read_around(self, tensors: Sequence[ExternalTensor]) -> None:
        """Reads the huge pages of tensors that the engine will read by itself, in small pages."""
        for tensor in tensors:
            if (array := self._view(tensor)) is not None:
                start = array.ctypes.data
                advise_kernel(start, start + array.nbytes, _POPULATE_READ)

    def make_resident(self) -> None:
        """Begins to read the files in the background, if there is memory for them."""
        available, files = available_bytes(), tuple(self._files.values())
        if available is None or available > sum(map(len, files)):
            self._advice.start(map(_addresses, files), _populate, files)

    def close(self) -> None:
        self._advice.stop()

    def _view(self, tensor: ExternalTensor) -> np.ndarray | None:
        dtype, path = _DTYPES.get(tensor.data_type), self._folder / tensor.file
        if dtype is None or path.parent != self._folder or not path.is_file():
            return None
        if path.name not in self._files:
            with open(path, "rb") as opened:
                self._files[path.name] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            advise_kernel(*_addresses(self._files[path.name]), _HUGEPAGE)
        file = self._files[path.name]
        count = math.prod(tensor.shape)
        end = tensor.offset + count * np.dtype(dtype).itemsize
        if count == 0 or not 0 <= tensor.offset < end <= len(file):
            return None
        return np.frombuffer(file, dtype, count, tensor.offset).reshape(tensor.shape)


def _addresses(file: mmap.mmap) -> Area:
    start = np.frombuffer(file, np.uint8).ctypes.data
    return start, start + len(file)


def _populate(start: int, end: int) -> None:
    _ = advise_kernel(start, end, _POPULATE_READ) or advise_kernel(start, end, _WILLNEED)
