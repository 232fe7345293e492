"""Sessions in processes of their own, which stand still between their turns."""

import time
from pathlib import Path

import pytest

from bench.worker import Worker
from rgexport.export.onnx.native import native_ops
from rgexport.kernels.onnx.library import NO_NATIVE

pytestmark = pytest.mark.full


def stands_still(process: int) -> bool:
    """Whether it does so soon: a signal takes its time."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
    return False


@pytest.mark.parametrize("native", [True, False])
def test_workers_stand_still_between_their_turns(demo_artifact, native, monkeypatch):
    monkeypatch.setenv(NO_NATIVE, "")
    expected = native_ops(demo_artifact / "model.onnx").kernels if native else "stock"
    with Worker(demo_artifact, native=native) as session:
        process = session._process.pid
        assert session.facts["kernels"] == expected and session.facts["load_seconds"] > 0
        for test in ("tg", "pp"):
            assert stands_still(process)
            result = session.measure(test, 5)
            assert result["rate"] > 0 and result["rss"] > 1 << 20
    assert not Path(f"/proc/{process}").exists()
