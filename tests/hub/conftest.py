"""A fake hub, and the command line that talks to it."""

import shutil

import pytest

from tests.command_line import rgexport
from tests.hub.fake import TOKEN, fake_hub


@pytest.fixture
def hub():
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """Runs rgexport in a process of its own, with a home of its own."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",  # its servers are not faked
        "RGEXPORT_CACHE": str(tmp_path / "cache"),
    }

    def run(*arguments, code=0, token=TOKEN):
        done = rgexport(*arguments, folder=tmp_path, environment=settings | {"HF_TOKEN": token})
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def artifact(demo_artifact, tmp_path):
    """A copy of the demo that a test may change."""
    return shutil.copytree(demo_artifact, tmp_path / "demo-int4")
