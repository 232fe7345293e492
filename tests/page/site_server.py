"""A server of a site that counts what is asked for, and fails in ways that a test chooses."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from rgexport.page.local_server import SiteHandler
from rgexport.page.site import Part, Site, read

Fault = Callable[[str, bytes], bytes]
"""Address and contents → what is sent; it may raise `Broken`, or return less than all."""


class Broken(Exception):
    """The connection ends without an answer."""


class SiteServer:
    """Serves a site until it is closed."""

    def __init__(self, site: Site, fault: Fault, *, plain: bool):
        self.asked: list[str] = []
        self.site: dict[str, Part | bytes] = dict(site)
        self.fault, self.plain = fault, plain
        handler = partial(_Handler, self)
        self._server = _QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def chunks(self) -> list[str]:
        """The chunks that were asked for, in order."""
        return [address for address in self.asked if address.startswith("chunks/")]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: tests break connections on purpose."""


class _Handler(SiteHandler):
    protocol_version = "HTTP/1.0"  # a connection for each request, so that a server can go away

    def __init__(self, server: SiteServer, *connection: Any):
        self.owner = server
        super().__init__(server.site, *connection)

    def do_GET(self) -> None:
        address = self.path.split("?")[0].removeprefix("/") or "index.html"
        self.owner.asked.append(address)
        content = self.site.get(address)
        if content is None:
            super().do_GET()
            return
        body = read(content)
        self.left = self.owner.fault(address, body)
        self.site = {address: body}
        super().do_GET()

    def send_header(self, keyword: str, value: str) -> None:
        is_bare = self.owner.plain or self.path.startswith("/blog")
        if is_bare and keyword.startswith("Cross-Origin"):
            return
        super().send_header(keyword, value)

    def write_body(self, body: bytes) -> None:
        """Sends what the fault left of it, under the length of the whole."""
        super().write_body(self.left)


@contextmanager
def serving(
    site: Site, fault: Fault = lambda address, body: body, *, plain: bool = False
) -> Iterator[SiteServer]:
    """Serves; `plain` without the headers that isolate a page, as most hosts do."""
    server = SiteServer(site, fault, plain=plain)
    try:
        yield server
    finally:
        server.close()
