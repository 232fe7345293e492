"""`rgexport serve` as a process: it ends when it is told to, and is whole when it is killed."""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import httpx
import psutil
import pytest

from tests.command_line import ROOT, START, rgexport
from tests.serve.conftest import Client, cached, said, until

pytestmark = pytest.mark.full


class Process(Client):
    """A server, what it has printed, and where it listens."""

    def __init__(self, artifact, *options, **variables):
        command = [sys.executable, "-c", START, "serve", artifact, "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        self.process = subprocess.Popen(
            [*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True
        )
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()
        until(lambda: self.process.poll() is not None or self._address())
        assert self._address(), self.lines
        self.url = self._address()[1]

    def end(self, kind=signal.SIGTERM):
        """Sends a signal; returns what the server has printed."""
        self.process.send_signal(kind)
        assert self.process.wait(60) == (0 if kind == signal.SIGTERM else -kind)
        log = "\n".join(self.lines)
        assert "Traceback" not in log
        return log

    def _address(self):
        return re.search(r"(http://\S+:\d+)/v1", "\n".join(self.lines))

    def _read(self):
        self.lines += iter(self.process.stderr.readline, "")


@contextmanager
def serving(artifact, *options, **variables):
    server = Process(artifact, *options, **variables)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def test_a_restart_costs_nothing_more(demo_artifact, tmp_path):
    options = ("--state-folder", tmp_path / "states", "--quiet")
    with serving(demo_artifact, *options) as first:
        reply = said(first.chat("Hello! How are you?"))
        known = first.chat("Hello! How are you?", reply, "And the sea?")
        first.end()
    talk = ("Hello! How are you?", reply, "And the sea?", said(known), "Why?")
    with serving(demo_artifact, *options) as second:
        answer = second.chat(*talk)
        assert cached(answer) >= known["usage"]["total_tokens"]
    with serving(demo_artifact, "--quiet") as alone:
        fresh = alone.chat(*talk)
        assert cached(fresh) == 0 and said(fresh) == said(answer)


def test_killed_under_load(demo_artifact, tmp_path):
    """No half file is taken for a state; the next start serves what is whole."""
    options = ("--state-folder", tmp_path / "states", "--quiet", "--parallel", "4")

    def ask(server, name):
        with suppress(httpx.HTTPError):
            for turn in range(10_000):
                server.chat(f"Hello {name} {turn}! " * 20, max_tokens=3)

    with serving(demo_artifact, *options) as server, ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, server, name) for name in range(4)]
        until(lambda: len([*(tmp_path / "states").glob("*-*/*.state")]) > 8)
        server.end(signal.SIGKILL)
        for each in asking:
            each.result()
    file, *others = (tmp_path / "states").glob("*-*/*.state")
    assert len(others) > 3
    with serving(demo_artifact, *options) as server:
        answer = server.chat("Hello 0 1! " * 20, max_tokens=3)
        assert answer["usage"]["completion_tokens"] <= 3
        assert "is not used" not in server.end()
    loaded = rgexport("state", "load", demo_artifact, file, folder=tmp_path)
    assert loaded.returncode == 0, loaded.stderr


def test_running_replies_end_before_it_does(demo_artifact):
    with serving(demo_artifact) as server, ThreadPoolExecutor(1) as pool:
        bias = {"logit_bias": {str(i): -100 for i in (1, 107)}}
        asking = pool.submit(server.chat, "Hello!", max_tokens=400, **bias)
        written = re.compile(r"^rgexport_new_tokens_total\{.*\} [1-9]", re.MULTILINE)
        until(lambda: written.search(server.get("/metrics").text))
        log = server.end()
        assert asking.result()["usage"]["completion_tokens"] == 400
    assert re.search(r"POST /v1/chat/completions 200 \d+ ms", log) and "Hello!" not in log


def has_ended(process):
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_for_long_texts_ends_with_the_server(kind, demo_artifact):
    with serving(demo_artifact) as server:
        parent = psutil.Process(server.process.pid)
        assert not parent.children()
        assert server.post("/tokenize", {"content": "The sea. " * 20_000}).status_code == 200
        children = parent.children()
        assert children
        server.end(kind)
        until(lambda: all(map(has_ended, children)))


@pytest.mark.parametrize("source", ["option", "file", "variable"])
def test_a_key_a_name_and_a_limit_of_connections(source, demo_artifact, tmp_path):
    (tmp_path / "key").write_text("sesame\n")
    options = {"option": ("--api-key", "sesame"), "file": ("--api-key-file", tmp_path / "key")}
    variables = {"RGEXPORT_API_KEY": "sesame"} if source == "variable" else {}
    words = "--host ::1 --allowed-host Chat.example --max-connections-per-address 2".split()
    with serving(demo_artifact, *words, *options.get(source, ()), **variables) as server:
        assert server.url.startswith("http://[::1]:")
        assert server.get("/v1/models").status_code == 401
        assert server.get("/v1/models", Authorization="Bearer sesame").status_code == 200
        assert server.get("/health", Host="chat.example").status_code == 200
        assert server.get("/health", Host="evil.test").status_code == 403
        with ExitStack() as stack:
            silent = [stack.enter_context(server.connect()) for _ in range(3)]
            assert silent[0].recv(1) == b"", "the third one took its place"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--api-key a --api-key-file b", "exclude each other"),
        ("--api-key=", "the API key is empty"),
        ("--api-key-file none", "cannot read none"),
        ("--cache-size many", "--cache-size is 'many'; expected a number of bytes"),
        ("--saved-states-size many", "--saved-states-size is 'many'; expected a number"),
        ("--host 256.0.0.1", "cannot listen on 256.0.0.1:8080"),
        ("--host 1::2::3", "cannot listen on [1::2::3]:8080"),
        ("--allowed-host chat.example:80", "expected a name such as chat.example"),
        ("--state-folder /proc/none", "/proc/none"),
        ("--state-precision int8", "expected one of fp32, fp16"),
        ("--trusted-proxy proxy.example", "expected an address such as 10.0.0.9"),
        ("same", "is given twice"),
    ],
)
def test_what_cannot_be_served(options, message, demo_artifact, tmp_path):
    words = [demo_artifact] if options == "same" else options.split()
    run = rgexport("serve", demo_artifact, *words, folder=tmp_path)
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr
