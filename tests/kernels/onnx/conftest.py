"""A process for each instruction set of this machine, kept for all tests of ops."""

from collections.abc import Iterator

import pytest

from rgexport.kernels.onnx import library
from tests.kernels.onnx.one_node import Worker

HERE = library.kernels()


@pytest.fixture(scope="session", params=HERE.instruction_sets or [""], ids=lambda p: p or "none")
def worker(request) -> Iterator[Worker]:
    if not request.param:
        absent = library.turned_off() or not library.LIBRARY.is_file()
        (pytest.skip if absent else pytest.fail)(f"no native kernels: {HERE.reason}")
    worker = Worker(request.param)
    yield worker
    worker.close()
