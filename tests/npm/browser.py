"""Headless Chromium, and what a page in it makes of an artifact."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import TimeoutError as TooSlow
from playwright.sync_api import sync_playwright

from rgexport.web_page.site import Chunk
from tests.web_page.site_server import serving

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
HUGGING_FACE = MODULES / "@huggingface" / "transformers"
FOLDERS = {
    "ort": MODULES / "onnxruntime-web" / "dist",
    "web": HERE.parents[1] / "docs" / "web",
    "tests": HERE,
    # What transformers.js imports.
    "hf": HUGGING_FACE / "dist",
    "hf-ort": HUGGING_FACE / "node_modules" / "onnxruntime-web" / "dist",
    "esm": HUGGING_FACE / "node_modules" / "onnxruntime-common" / "dist" / "esm",
}
"""First part of an address → the folder of its files."""
NAMES = "chromium", "chromium-headless-shell", "chromium-browser", "google-chrome"
FLAGS = (
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--no-first-run",
    # WebGPU without a graphics card.
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--ignore-gpu-blocklist",
)


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched(*flags):
    """Chromium without a window; or the test is skipped."""
    program = chromium()
    if not program:
        pytest.skip("Chromium is not installed, such as Debian's chromium-headless-shell")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            browser.close()


def parts_of(folder, address):
    """The files of a folder as parts of a site, below an address."""
    files = (file for file in folder.iterdir() if file.is_file())
    return {f"{address}/{file.name}": Chunk(file, 0, file.stat().st_size) for file in files}


def run_page(artifact, job, *, page=None, timeout=400):
    """The `result` that a page leaves: the one beside this file, which does `job`, or `page`.

    An `error` says what went wrong, or that nothing came in time.
    """
    texts = {"index.html": page or (HERE / "page.html").read_text(), "job.json": json.dumps(job)}
    site = {name: text.encode() for name, text in texts.items()}
    for address, folder in (FOLDERS | {"artifact": artifact}).items():
        site |= parts_of(folder, address)
    with serving(site) as server, launched() as browser, browser.new_page() as tab:
        tab.goto(server.url)
        try:
            tab.wait_for_function("window.result", timeout=timeout * 1000)
        except TooSlow:
            return {"error": f"nothing after {timeout} seconds"}
        return tab.evaluate("window.result")
