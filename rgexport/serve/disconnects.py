"""Waits that end when the client closes its connection."""

import asyncio
from typing import Any

from starlette.requests import Request

from rgexport.serve.errors import Gone


async def until_gone(request: Request) -> None:
    """Waits until the client closes its connection; the body must have been read."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


async def until_done(
    future: asyncio.Future[Any], request: Request, seconds: float | None = None
) -> None:
    """Waits for a future, at most for `seconds`; raises Gone if the client leaves before."""
    leaving = asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait((future, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and not future.done():
            raise Gone
    finally:
        leaving.cancel()
