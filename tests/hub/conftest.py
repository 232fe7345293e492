"""A fake hub, and the command line that talks to it."""

import subprocess
import sys

import pytest

from tests.artifacts import export_demo
from tests.command_line import START
from tests.hub.fake import TOKEN, fake_hub


@pytest.fixture
def hub():
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path, monkeypatch):
    """Runs rgexport in a process of its own, with a home of its own."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",  # its servers are not faked
        "RGEXPORT_CACHE": str(tmp_path / "cache"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def run(*arguments, code=0):
        command = [sys.executable, "-c", START, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def artifact(tmp_path):
    """A copy of the demo that a test may change."""
    export_demo(tmp_path / "demo-int4", "onnx", "--int4")
    return tmp_path / "demo-int4"
