"""A server of a site that counts what is asked for, and fails in ways that a test chooses."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer

from rgexport.web_page.local_server import SiteHandler
from rgexport.web_page.site import read_content


class Broken(Exception):
    """The connection ends without an answer."""


@dataclass
class SiteServer:
    """What a server has, and what was asked of it."""

    site: dict
    fault: Callable[[str, bytes], bytes]
    is_plain: bool
    asked: list = field(default_factory=list)

    @property
    def chunks(self):
        """The chunks that were asked for, in order."""
        return [address for address in self.asked if address.startswith("chunks/")]


class _Handler(SiteHandler):
    protocol_version = "HTTP/1.0"  # a connection for each request, so that a server can go away

    def __init__(self, server, *connection):
        self.owner = server
        super().__init__(server.site, *connection)

    def do_GET(self):
        address = self.path.split("?")[0].removeprefix("/") or "index.html"
        self.owner.asked.append(address)
        content = self.site.get(address)
        if content is not None:
            body = read_content(content)
            self.left = self.owner.fault(address, body)
            self.site = {address: body}
        super().do_GET()

    def send_header(self, keyword, value):
        is_bare = self.owner.is_plain or self.path.startswith("/blog")
        if not (is_bare and keyword.startswith("Cross-Origin")):
            super().send_header(keyword, value)

    def write_body(self, body):
        """Sends what the fault left of it, under the length of the whole."""
        super().write_body(self.left)


@contextmanager
def serving(site, fault=lambda address, body: body, *, is_plain=False):
    """Serves a site.

    Args:
        site: the files.
        fault: takes an address and its contents; returns what is sent, or raises `Broken`.
        is_plain: leaves out the headers that isolate a page, as most hosts do.
    """
    server = SiteServer(dict(site), fault, is_plain)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, server)) as http_server:
        http_server.handle_error = lambda *_: None  # tests break connections on purpose
        server.url = f"http://127.0.0.1:{http_server.server_port}/"
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            http_server.shutdown()
