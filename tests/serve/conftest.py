"""A server in a thread of its own, of a toy model unless a test brings another one."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

from rgexport.chat.model import Model
from rgexport.chat.template import ChatTemplate
from rgexport.chat.tokenizer import Tokenizer
from rgexport.serve.app import Settings, create_app
from rgexport.serve.connections import Connections, protocol
from tests.chat.conftest import IDENTITY, gemma, sentencepiece_folder, template
from tests.toy_session import ToySession

__all__ = ["gemma", "sentencepiece_folder", "template"]


@dataclass
class Served:
    """A running server; `session` is the engine of its toy model."""

    url: str
    model: Model
    session: ToySession


Serve = Callable[..., Any]
PARTS = {"connections", "text_process", "health"}
"""Arguments of `served_model`; others are those of a model."""


@contextmanager
def served(
    tokenizer: Tokenizer, template: ChatTemplate, settings: Settings, **options: Any
) -> Iterator[Served]:
    session = ToySession(tokenizer.vocab_size)
    parts = {name: options.pop(name) for name in PARTS & options.keys()}
    options = {"rows": 4} | options
    model = Model(session, tokenizer, template, IDENTITY, **options)
    with served_model(model, settings, **parts) as url:
        yield Served(url, model, session)


@contextmanager
def served_model(
    model: Model,
    settings: Settings,
    connections: Connections | None = None,
    **parts: Any,
) -> Iterator[str]:
    """The address of a server of this model, which is closed at the end."""
    config = uvicorn.Config(
        create_app({model.name: model}, settings, **parts),
        http=protocol(connections or Connections()),
        port=0,
        log_config=None,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        model.close()


@pytest.fixture(scope="module")
def server(
    gemma: Tokenizer, template: ChatTemplate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One for all tests of a module; it keeps states by name."""
    saved = tmp_path_factory.mktemp("saved")
    with served(gemma, template, Settings(saved=saved, log=False)) as running:
        yield running


@pytest.fixture
def serve(gemma: Tokenizer, template: ChatTemplate) -> Serve:
    """Serves with other settings: a context manager."""

    def begin(settings: Settings | None = None, **options: Any) -> Any:
        return served(gemma, template, settings or Settings(log=False), **options)

    return begin
