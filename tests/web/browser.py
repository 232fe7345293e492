"""Headless Chromium: it shows a page over an artifact, and the page posts what it found."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "web"
MODULES = HERE / "node_modules"
HUGGING_FACE = MODULES / "@huggingface" / "transformers"
FOLDERS = {
    "ort": MODULES / "onnxruntime-web" / "dist",
    "web": DOCS,
    "tests": HERE,
    # What transformers.js imports.
    "hf": HUGGING_FACE / "dist",
    "hf-ort": HUGGING_FACE / "node_modules" / "onnxruntime-web" / "dist",
    "esm": HUGGING_FACE / "node_modules" / "onnxruntime-common" / "dist" / "esm",
}
"""First part of an address → the folder of its files."""
NAMES = "chromium", "chromium-headless-shell", "chromium-browser", "google-chrome"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--no-first-run",
    # WebGPU without a graphics card.
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--ignore-gpu-blocklist",
)
_SCRIPT = "text/javascript"
TYPES = {".html": "text/html", ".js": _SCRIPT, ".mjs": _SCRIPT, ".wasm": "application/wasm"}


def chromium() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def run_page(
    artifact: Path, job: dict[str, Any], *, page: str | None = None, timeout: float = 400
) -> dict[str, Any]:
    """What a page posts to /result: the one beside this file, which does `job`, or `page`.

    An `error` says what went wrong, or that nothing came in time.
    """
    done, result = threading.Event(), dict[str, Any]()
    texts = {"/": (page or (HERE / "page.html").read_text()), "/job.json": json.dumps(job)}
    handler = partial(_Handler, artifact, texts, result, done)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            complaints = _browse(f"http://127.0.0.1:{server.server_port}/", profile, done, timeout)
        server.shutdown()
    return result or {"error": f"nothing after {timeout} seconds: {complaints}"}


def _browse(url: str, profile: str, done: threading.Event, timeout: float) -> str:
    """Shows a page until it is done; what the browser complained of."""
    program = chromium()
    assert program
    with tempfile.TemporaryFile() as log:
        command = [program, *FLAGS, f"--user-data-dir={profile}", url]
        browser = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        )
        try:
            done.wait(timeout)
        finally:  # it has children of its own
            os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
        log.seek(0)
        return log.read()[-2000:].decode(errors="replace")


class _Handler(BaseHTTPRequestHandler):
    """Files below /artifact/ and of `FOLDERS`, the texts, and /result to post to."""

    def __init__(
        self,
        artifact: Path,
        texts: dict[str, str],
        result: dict[str, Any],
        done: threading.Event,
        *connection: Any,
    ):
        self.folders = FOLDERS | {"artifact": artifact}
        self.texts, self.result, self.done = texts, result, done
        super().__init__(*connection)

    def do_GET(self) -> None:
        if self.path in self.texts:
            self._send(self.texts[self.path].encode(), ".html")
            return
        *_, folder, name = self.path.split("/")
        path = self.folders.get(folder, HERE) / name
        if path.is_file():
            self._send(path.read_bytes(), path.suffix)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        self.result.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send(b"", ".html")
        self.done.set()

    def _send(self, body: bytes, suffix: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(body)))
        # Pages that are isolated so may use threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""
