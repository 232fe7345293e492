"""`rgexport serve` as a process: it ends when it is told to, and is whole when it is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.command_line import ROOT, START, rgexport

pytestmark = pytest.mark.full
CHAT = "/v1/chat/completions"


class Process:
    """A server, what it has printed, and where it listens."""

    def __init__(self, artifact: Path, *options: str | Path, **variables: str) -> None:
        command = [sys.executable, "-c", START, "serve", artifact, "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        self.process = subprocess.Popen(
            [*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        end = time.monotonic() + 60
        while not (match := re.search(r"(http://\S+:\d+)/v1", "\n".join(self.lines))):
            assert self.process.poll() is None and time.monotonic() < end, self.lines
            time.sleep(0.02)
        self.url = match[1]

    def chat(self, *texts: str, **options: Any) -> dict[str, Any]:
        roles = ["user", "assistant"] * len(texts)
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        body = {"messages": messages, "temperature": 0, "max_tokens": 12}
        answer = httpx.post(self.url + CHAT, json=body | options, timeout=60)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def _read(self) -> None:
        assert self.process.stderr
        self.lines += iter(self.process.stderr.readline, "")


@contextmanager
def serving(artifact: Path, *options: str | Path, **variables: str) -> Iterator[Process]:
    made = Process(artifact, *options, **variables)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def until(condition: Callable[[], bool]) -> None:
    """Waits; a busy machine takes its time."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def said(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def cached(answer: dict[str, Any]) -> int:
    count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_a_restart_costs_nothing_more(demo_artifact: Path, tmp_path: Path) -> None:
    options = ("--state-folder", tmp_path / "states", "--quiet")
    with serving(demo_artifact, *options) as first:
        reply = said(first.chat("Hello! How are you?"))
        known = first.chat("Hello! How are you?", reply, "And the sea?")
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(30) == 0
    talk = ("Hello! How are you?", reply, "And the sea?", said(known), "Why?")
    with serving(demo_artifact, *options) as second:
        answer = second.chat(*talk)
        assert cached(answer) >= known["usage"]["total_tokens"]
    with serving(demo_artifact, "--quiet") as alone:
        fresh = alone.chat(*talk)
        assert cached(fresh) == 0 and said(fresh) == said(answer)


def test_a_folder_that_becomes_a_file_stops_neither_chats_nor_the_end(
    demo_artifact: Path, tmp_path: Path
) -> None:
    states = tmp_path / "states"
    with serving(demo_artifact, "--state-folder", states, "--quiet") as server:
        server.chat("Hello!")
        until(lambda: [*states.glob("*-*/*.state")] != [])
        states.rename(tmp_path / "aside")
        states.write_bytes(b"a file")
        for number in range(8):
            server.chat(f"Hello {number}!")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert sum("are not saved at the moment" in line for line in server.lines) == 1
    assert not any("Traceback" in line for line in server.lines)


def test_killed_under_load(demo_artifact: Path, tmp_path: Path) -> None:
    """No half file is taken for a state; the next start serves what is whole."""
    options = ("--state-folder", tmp_path / "states", "--quiet", "--parallel", "4")
    with serving(demo_artifact, *options) as server:
        stop = threading.Event()

        def ask(name: int) -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                try:
                    server.chat(f"Hello {name} {turn}! " * 20, max_tokens=3)
                except (httpx.HTTPError, AssertionError):
                    return

        threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: len([*(tmp_path / "states").glob("*-*/*.state")]) > 8)
        server.process.kill()
        stop.set()
        for thread in threads:
            thread.join()
    files = [*(tmp_path / "states").glob("*-*/*.state")]
    assert len(files) > 4
    with serving(demo_artifact, *options) as server:
        answer = server.chat("Hello 0 1! " * 20, max_tokens=3)
        assert not any("is not used" in line for line in server.lines)
        assert answer["usage"]["completion_tokens"] <= 3
    for file in files:
        run = rgexport("state", "load", demo_artifact, file, folder=tmp_path)
        assert run.returncode == 0, run.stderr
        break


def test_running_replies_end_before_it_does(demo_artifact: Path) -> None:
    with serving(demo_artifact) as server:
        answers: list[dict[str, Any]] = []
        bias = {"logit_bias": {str(i): -100 for i in (1, 107)}}
        asking = threading.Thread(
            target=lambda: answers.append(server.chat("Hello!", max_tokens=400, **bias))
        )
        asking.start()
        written = re.compile(r"^rgexport_new_tokens_total\{.*\} [1-9]", re.MULTILINE)
        until(lambda: written.search(httpx.get(f"{server.url}/metrics").text) is not None)
        server.process.send_signal(signal.SIGTERM)
        asking.join()
        assert server.process.wait(30) == 0
    assert answers[0]["usage"]["completion_tokens"] == 400
    log = "\n".join(server.lines)
    assert re.search(r"POST /v1/chat/completions 200 \d+ ms", log) and "Hello!" not in log
    assert "Traceback" not in log


def test_an_address_of_ipv6(demo_artifact: Path) -> None:
    with serving(demo_artifact, "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert httpx.get(f"{server.url}/health").status_code == 200


def children(process: int) -> set[int]:
    lists = Path(f"/proc/{process}/task").glob("*/children")
    return {int(child) for each in lists for child in each.read_text().split()}


@pytest.mark.skipif(sys.platform != "linux", reason="it looks at Linux's processes")
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_for_long_texts_ends_with_the_server(
    kind: signal.Signals, demo_artifact: Path
) -> None:
    with serving(demo_artifact) as server:
        assert not children(server.process.pid)
        text = {"content": "The sea. " * 20_000}
        assert httpx.post(f"{server.url}/tokenize", json=text, timeout=60).status_code == 200
        others = children(server.process.pid)
        assert others
        server.process.send_signal(kind)
        assert server.process.wait(60) == (0 if kind == signal.SIGTERM else -kind)
        until(lambda: all(map(has_ended, others)))
    assert "Traceback" not in "\n".join(server.lines)


def has_ended(process: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return True


def test_names_and_connections_are_limited(demo_artifact: Path) -> None:
    options = ("--allowed-host", "Chat.example", "--max-connections-per-address", "2")
    with serving(demo_artifact, *options) as server:
        address = f"{server.url}/health"
        for host, status in {"chat.example": 200, "evil.test": 403}.items():
            assert httpx.get(address, headers={"Host": host}).status_code == status
        port = int(server.url.rpartition(":")[2])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        assert silent[0].recv(1) == b"", "the third one took its place"
        assert httpx.get(address).status_code == 200
        for each in silent:
            each.close()


@pytest.mark.parametrize("source", ["option", "file", "variable"])
def test_the_key_comes_from_three_places(source: str, demo_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    options: tuple[str | Path, ...] = {
        "option": ("--api-key", "sesame"),
        "file": ("--api-key-file", tmp_path / "key"),
        "variable": (),
    }[source]
    variables = {"RGEXPORT_API_KEY": "sesame"} if source == "variable" else {}
    with serving(demo_artifact, *options, **variables) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer sesame"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-key", "a", "--api-key-file", "b"], "exclude each other"),
        (["--api-key", ""], "the API key is empty"),
        (["--api-key-file", "none"], "cannot read none"),
        (["--cache-size", "many"], "--cache-size is 'many'; expected a number of bytes"),
        (["--saved-states-size", "many"], "--saved-states-size is 'many'; expected a number"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1:8080"),
        (["--host", "1::2::3"], "cannot listen on [1::2::3]:8080"),
        (["--allowed-host", "chat.example:80"], "expected a name such as chat.example"),
        (["--state-folder", "/proc/none"], "/proc/none"),
        (["--state-precision", "int8"], "expected fp32 or fp16"),
        (["--trusted-proxy", "proxy.example"], "expected an address such as 10.0.0.9"),
    ],
)
def test_what_cannot_be_served(
    options: list[str], message: str, demo_artifact: Path, tmp_path: Path
) -> None:
    run = rgexport("serve", demo_artifact, *options, folder=tmp_path)
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr


def test_one_artifact_twice(demo_artifact: Path, tmp_path: Path) -> None:
    run = rgexport("serve", demo_artifact, demo_artifact, folder=tmp_path)
    assert run.returncode == 2 and "is given twice" in run.stderr
