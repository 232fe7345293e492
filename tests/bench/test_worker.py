"""Sessions in processes of their own, which stand still between their turns."""

import psutil
import pytest

from bench.worker import Worker
from rgexport.export.onnx.native import native_ops
from rgexport.kernels.onnx.library import NO_NATIVE
from tests.chat.conftest import until

pytestmark = pytest.mark.full


@pytest.mark.parametrize("native", [True, False])
def test_workers_stand_still_between_their_turns(demo_artifact, native, monkeypatch):
    monkeypatch.setenv(NO_NATIVE, "")
    expected = native_ops(demo_artifact / "model.onnx").kernels if native else "stock"
    with Worker(demo_artifact, native=native) as session:
        process = psutil.Process(session._process.pid)
        assert session.facts["kernels"] == expected and session.facts["load_seconds"] > 0
        for test in ("tg", "pp"):
            until(lambda: process.status() == psutil.STATUS_STOPPED)
            result = session.measure(test, 5)
            assert result["rate"] > 0 and result["rss"] > 1 << 20
    assert not process.is_running()
