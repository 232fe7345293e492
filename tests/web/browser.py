"""Headless Chromium: it runs the page that is beside this file, over an artifact."""

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
ORT = HERE / "node_modules" / "onnxruntime-web" / "dist"
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
TYPES = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm"}


def chromium() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def run_page(artifact: Path, job: dict[str, Any], timeout: float = 240) -> dict[str, Any]:
    """What the page posts after it did `job`, or an `error` where it posts nothing in time."""
    done, result = threading.Event(), dict[str, Any]()
    handler = partial(_Handler, artifact, json.dumps(job).encode(), result, done)
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
    def __init__(
        self,
        artifact: Path,
        job: bytes,
        result: dict[str, Any],
        done: threading.Event,
        *connection: Any,
    ):
        self.folders = {"artifact": artifact, "ort": ORT}
        self.texts = {
            "/": (HERE / "page.html").read_bytes(),
            "/job.json": job,
            "/recurrentgemma.mjs": (
                HERE.parents[1] / "docs" / "web" / "recurrentgemma.mjs"
            ).read_bytes(),
        }
        self.result, self.done = result, done
        super().__init__(*connection)

    def do_GET(self) -> None:
        name = Path(self.path).name
        folder = self.folders.get(self.path.split("/")[1])
        path = folder / name if folder else None
        if self.path not in self.texts and not (path and path.is_file()):
            self.send_error(404)
            return
        self._send(self.texts.get(self.path) or path.read_bytes(), name or "page.html")

    def do_POST(self) -> None:
        self.result.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send(b"", "thanks.html")
        self.done.set()

    def _send(self, body: bytes, name: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(Path(name).suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(body)))
        # Pages that are isolated so may use threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""
