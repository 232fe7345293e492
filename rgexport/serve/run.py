"""Running the server until it is told to end."""

import gc
import signal
import socket
from pathlib import Path
from typing import Any

import uvicorn

from rgexport.chat.from_artifact import open_model
from rgexport.chat.model import Model
from rgexport.errors import RequestError
from rgexport.progress import note
from rgexport.serve.app import Settings, create_app

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def open_models(artifacts: list[Path], **options: Any) -> dict[str, Model]:
    """Opens the artifacts, by name; of two of one name, the second has that of its folder.

    Raises:
        RequestError: one cannot be opened, or is given twice.
    """
    found: dict[str, Model] = {}
    places = [path.resolve() for path in artifacts]
    if twice := [
        path for path, place in zip(artifacts, places, strict=True) if places.count(place) > 1
    ]:
        raise RequestError(f"{twice[0]} is given twice")
    try:
        for path in artifacts:
            model = open_model(path, chat=False, **options)
            name = model.name if model.name not in found else path.name
            if name in found:
                name = str(path)
            found[name] = model
    except RequestError:
        for model in found.values():
            model.close()
        raise
    return found


def serve(
    models: dict[str, Model], settings: Settings, *, host: str, port: int, grace_seconds: int
) -> None:
    """Serves until SIGINT or SIGTERM; then running replies end, and states are on the disk.

    Raises:
        RequestError: the address cannot be used.
    """
    config = uvicorn.Config(
        create_app(models, settings),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the app decides, see `Settings.trusted_proxies`
        timeout_graceful_shutdown=grace_seconds,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
    )
    try:
        opened = socket.create_server((host, port), family=_family(host), reuse_port=False)
    except OSError as error:
        raise RequestError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from None
    address = opened.getsockname()
    note(f"{', '.join(models)} at http://{host}:{address[1]}/v1 (Ctrl-C ends)")
    if settings.api_key is None and host not in _LOOPBACK:
        note("Warning: whoever reaches this address can use it; --api-key keeps others out")
    gc.collect()
    gc.freeze()  # what is there now stays: looking through it took 30 ms of some first token
    try:
        _run(uvicorn.Server(config), opened)
    finally:
        for model in models.values():
            model.close()


def _run(server: uvicorn.Server, opened: socket.socket) -> None:
    """Runs; the signal that ended it is not raised again, for that is how it is meant to end."""
    previous = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    for kind in previous:
        signal.signal(kind, signal.SIG_IGN)
    try:
        server.run(sockets=[opened])
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
