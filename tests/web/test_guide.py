"""The examples of docs/transformers-js.md, run as they stand there."""

import json
import re
import subprocess
from pathlib import Path

import pytest

import rgexport
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.page.site import Site
from tests.page.chat_page import Browser
from tests.page.site_server import serving
from tests.web.browser import HERE, HUGGING_FACE, chromium
from tests.web.npm import install_our_package, node_with_packages

DEMO = HERE.parents[1] / "demo" / "model"
GUIDE = (HERE.parents[1] / "docs" / "transformers-js.md").read_text("utf-8")
TOKENS = 8
MODELS = "recurrentgemma-2b-it-int4-onnx", "recurrentgemma-2b-it-int8-onnx-wasm"

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = node_with_packages()
    install_our_package(tmp_path_factory.mktemp("npm"))
    return program


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo under the names that the guide's models have."""
    folder = tmp_path_factory.mktemp("models")
    for name, profile in zip(MODELS, ("cpu", "wasm"), strict=True):
        options = OnnxOptions(profile=profile, precision="fp32")
        export_onnx(open_checkpoint(str(DEMO)), options, folder / name)
    return folder


def example(heading: str, language: str) -> str:
    """The first example below a heading; it writes few tokens."""
    section = GUIDE.partition(f"## {heading}\n")[2]
    match = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert match, f"no example in {language} below {heading}"
    text = match[1]
    assert "max_new_tokens: 256" in text
    return text.replace("max_new_tokens: 256", f"max_new_tokens: {TOKENS}")


def reply(artifact: Path) -> str:
    with rgexport.load(artifact) as model:
        messages = [{"role": "user", "content": "Hi!"}]
        return model.chat(messages, temperature=0, max_new_tokens=TOKENS).text


def test_the_example_for_node(node: str, models: Path) -> None:
    code = example("In Node", "js").replace('"/models/"', json.dumps(f"{models}/"))
    code += "\nconsole.log(JSON.stringify(generated_text));"
    command = [node, "--input-type=module", "-e", code]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])[-1]["content"] == reply(models / MODELS[0])


def guide_site(models: Path) -> Site:
    """The page and the folders beside it, at the addresses that the guide names."""
    folders = {
        f"models/{MODELS[1]}": models / MODELS[1],
        "transformers": HUGGING_FACE / "dist",
        "ort": HUGGING_FACE / "node_modules" / "onnxruntime-web" / "dist",
    }
    files = {
        f"{address}/{file.name}": file.read_bytes()
        for address, folder in folders.items()
        for file in folder.iterdir()
        if file.is_file()
    }
    return {"index.html": example("In a browser", "html").encode(), **files}


def test_the_page_loads_nothing_from_elsewhere(node: str, models: Path) -> None:
    if not chromium():
        pytest.skip("Chromium is not installed, such as Debian's chromium-headless-shell")
    addresses, errors = list[str](), list[str]()
    with (
        serving(guide_site(models)) as server,
        Browser.started() as browser,
        browser.profile() as profile,
    ):
        page = profile.context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(server.url)
        page.wait_for_function("document.title === 'complete'")
        assert page.inner_text("body").strip() == reply(models / MODELS[1])
    assert errors == [] and all(address.startswith(server.url) for address in addresses)
    assert any(address.endswith(".wasm") for address in addresses)
