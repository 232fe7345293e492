"""The demo as a site, and a browser to show it in."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.page import build, site
from tests.built import one_at_a_time
from tests.page.chat_page import Browser, Profile
from tests.page.site_server import SiteServer, serving
from tests.web.browser import chromium

DEMO = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="session")
def built_page() -> None:
    with one_at_a_time("page"):
        if not build.BUILT.is_file():
            if not shutil.which("npm"):
                pytest.skip("Node and npm are not installed")
            build.build()


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo for a profile; with float activations, so that all engines give the same tokens."""
    folder, made = tmp_path_factory.mktemp("demo"), dict[str, Path]()

    def export(profile: str) -> Path:
        if profile not in made:
            options = OnnxOptions(profile=profile, precision="int4", exact=True)
            made[profile] = export_onnx(open_checkpoint(str(DEMO)), options, folder / profile)
        return made[profile]

    return export


@pytest.fixture(scope="session")
def wasm_site(built_page: None, artifact: Callable[[str], Path]) -> site.Site:
    """The demo for the processor, in chunks of 1 MB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "CHUNK_BYTES", 1 << 20)
        return site.make_site([open_artifact(artifact("wasm"))])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not chromium():
        pytest.skip("Chromium is not installed, such as Debian's chromium-headless-shell")
    with Browser.started() as found:
        yield found


@pytest.fixture(scope="module")
def server(wasm_site: site.Site) -> Iterator[SiteServer]:
    with serving(wasm_site) as found:
        yield found


@pytest.fixture
def profile(browser: Browser) -> Iterator[Profile]:
    with browser.profile() as found:
        yield found
