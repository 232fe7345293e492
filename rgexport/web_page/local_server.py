"""Serves a site on this machine, like a web server with its folder."""

import mimetypes
import sys
import webbrowser
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rgexport.errors import RequestError
from rgexport.progress import print_error
from rgexport.serve.host_names import is_allowed
from rgexport.web_page.site import Site, read_content

HOST = "127.0.0.1"
"""Browsers run the page from this machine, and from others only over https."""
_TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
}
"""Content types that the tables of some systems have wrong."""
_HEADERS = {
    # Browsers give threads only to pages that come with these two.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


def serve_site(site: Site, port: int, *, browse: bool) -> None:
    """Serves until Ctrl-C; `browse` opens a browser."""
    with local_server(site, port) as server:
        address = f"http://{HOST}:{server.server_port}/"
        print_error(f"The page is at {address} (Ctrl-C ends)")
        if browse:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def local_server(site: Site, port: int) -> ThreadingHTTPServer:
    try:
        return _Server((HOST, port), partial(SiteHandler, site))
    except OSError as error:
        raise RequestError(
            f"cannot listen on port {port}: {error.strerror}; choose another --port"
        ) from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class SiteHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, site: Site, *connection: Any):
        self.site = site
        super().__init__(*connection)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        # A page of another site whose name leads to this machine (DNS rebinding) must not read it.
        host = self.headers.get("Host")
        if host is not None and not is_allowed(host, ("localhost",)):
            self.send_error(403, "This server has another name")
            return
        address = self.path.split("?")[0].removeprefix("/") or "index.html"
        content = self.site.get(address)
        if content is None:
            self.send_error(404)
            return
        body = read_content(content)
        suffix = f".{address.rsplit('.', 1)[-1]}"
        kind = _TYPES.get(suffix) or mimetypes.types_map.get(suffix, "application/octet-stream")
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.write_body(body)

    def write_body(self, body: bytes) -> None:
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
