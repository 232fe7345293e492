"""Checks the `Host` of requests, and the origin of web pages that send them.

A browser sends the requests of any page to this machine, and only hides the answer from the page.
So requests of pages that are not allowed are refused before anything runs.
"""

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from rgexport.serve.errors import error_response
from rgexport.serve.host_names import is_allowed

_OTHER_SITES = {"cross-site", "same-site"}
"""Values of `Sec-Fetch-Site` for pages of other origins."""
_FORBIDDEN = "permission_error"


class Origins:
    """Refuses foreign names and pages; an ASGI middleware."""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], pages: Collection[str]) -> None:
        self._app, self._hosts, self._pages = app, hosts, pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complaint = self._complaint(scope) if scope["type"] in ("http", "websocket") else None
        if complaint is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await error_response(403, complaint, _FORBIDDEN)(scope, receive, send)

    def _complaint(self, scope: Scope) -> str | None:
        hosts = _values(scope, b"host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            return f"there are {len(hosts)} Host headers; expected one"
        host = hosts[0] if hosts else ""
        if hosts and not is_allowed(host, self._hosts):
            return f"the Host {host!r} is not allowed here; --allowed-host NAME allows it"
        if scope.get("method") == "OPTIONS":
            return None  # CORS answers it
        origins = _values(scope, b"origin")
        if all(self._is_ours(origin, host) for origin in origins):
            return (
                None if origins or not _is_of_other_site(scope) else _refusal_of("another origin")
            )
        return _refusal_of(repr(origins[0]))

    def _is_ours(self, origin: str, host: str) -> bool:
        is_same = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
        return is_same or origin in self._pages or "*" in self._pages


def _refusal_of(origin: str) -> str:
    return f"pages of {origin} may not use this server; --cors-origin ORIGIN allows them"


def _is_of_other_site(scope: Scope) -> bool:
    """Returns whether a page of another origin sends this, other than by a link."""
    if not _OTHER_SITES.intersection(_values(scope, b"sec-fetch-site")):
        return False
    is_link = scope.get("method") == "GET" and _values(scope, b"sec-fetch-mode") == ["navigate"]
    return not (is_link and _values(scope, b"sec-fetch-dest") == ["document"])


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
