"""The demo as a site, and a browser to show it in."""

import shutil
from pathlib import Path

import pytest

from rgexport.artifacts.opening import open_artifact
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.web_page import build, site
from tests.built import one_at_a_time
from tests.npm.browser import launched
from tests.web_page.chat_page import Profile
from tests.web_page.site_server import serving

DEMO = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="session")
def built_page():
    with one_at_a_time("page"):
        if not build.BUILT.is_file():
            if not shutil.which("npm"):
                pytest.skip("Node and npm are not installed")
            build.build()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    """The demo for a profile; with float activations, so that all engines give the same tokens."""
    folder = tmp_path_factory.mktemp("demo")

    def export(profile, precision="int4"):
        target = folder / f"{profile}-{precision}"
        if not target.exists():
            options = OnnxOptions(profile=profile, precision=precision, exact=precision == "int4")
            export_onnx(open_checkpoint(str(DEMO)), options, target)
        return target

    return export


@pytest.fixture(scope="session")
def wasm_site(built_page, artifact):
    """The demo for the processor, in chunks of 1 MB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "CHUNK_BYTES", 1 << 20)
        return site.make_site([open_artifact(artifact("wasm"))])


@pytest.fixture(scope="module")
def browser():
    with launched() as started:
        yield started


@pytest.fixture(scope="module")
def server(wasm_site):
    with serving(wasm_site) as running:
        yield running


@pytest.fixture
def profile(browser):
    """A browser with an empty storage of its own."""
    with browser.new_context() as context:
        yield Profile(context)


@pytest.fixture
def tab(profile, server):
    """A tab with the model loaded, and short replies."""
    return profile.talk(server)
