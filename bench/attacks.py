"""What the other clients of `rgexport serve` notice while one client attacks it.

    python -m bench.attacks ARTIFACT [--seconds 20] [--only grammars]

Thirty-two conversations are written at once, first alone, then beside each attack, then beside all
of them. Prints a Markdown table: the waits between tokens, as milliseconds and as multiples of
those without an attack, and the slowest answer of `/health`. At last SIGTERM comes in mid-attack,
and the time until the server has ended is printed.

The attacker is a process of its own at a lower priority, so that what is measured is the server.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from bench.run import START
from bench.serve import CHAT, Heard, _listen, _user, _words
from rgexport.runtimes.machine import environment

CONVERSATIONS = 32
GRACE = 10
CONNECTIONS = 4
"""Requests that an attack without a burst keeps under way."""


@dataclass(frozen=True)
class Attack:
    """One kind of request, which is sent again and again.

    Attributes:
        path: where it is sent to.
        body: makes the body of the n-th request.
        burst: number of requests that are sent, and left, at once; 0 for requests that wait for
            their answers.
    """

    path: str
    body: Callable[[int], bytes]
    burst: int = 0


def _json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def _schema(number: int) -> dict[str, Any]:
    pattern = {"type": "string", "pattern": "^[a-z]{3,9}$"}
    names = {f"p{number}_{i}": pattern for i in range(1000)}
    schema = {"type": "object", "properties": names}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def _many_grammars(number: int) -> bytes:
    prompts = ["a"] * 64
    return _json(prompt=prompts, n=4, max_tokens=1, response_format=_schema(number))


def _ambiguous_grammar(number: int) -> bytes:
    grammar = 'start: s\ns: s s | s s s | "a" | '
    return _json(messages=[_user(f"a{number}")], max_tokens=400, grammar=grammar)


def _many_biases(number: int) -> bytes:
    bias = {str(token): 1 for token in range(450_000)}
    return _json(messages=[_user(f"b{number}")], max_tokens=400, logit_bias=bias)


def _lists_of_lists(number: int) -> bytes:
    return b'{"prompt": [' + b",".join([b"[[1]]"] * 1_250_000) + b"]}"


def _deep_tools(number: int) -> bytes:
    deep = "[" * 500 + "]" * 500
    message = json.dumps(_user(f"c{number}"))
    return f'{{"messages": [{message}], "tools": [{{"type": {deep}}}]}}'.encode()


def _long_text(number: int) -> bytes:
    return _json(content=_words(1000, number) * 1900)


def _long_chat(number: int) -> bytes:
    return _json(messages=[_user(_words(1500, number))], max_tokens=100)


ATTACKS = {
    "grammars": Attack("/v1/completions", _many_grammars, burst=40),
    "masks": Attack(CHAT, _ambiguous_grammar),
    "biases": Attack(CHAT, _many_biases),
    "bodies": Attack("/v1/completions", _lists_of_lists),
    "tokenize": Attack("/tokenize", _long_text),
    "tools": Attack(CHAT, _deep_tools),
    "left chats": Attack(CHAT, _long_chat, burst=8),
}
BODIES = 4
"""Different bodies that an attack makes ahead, and sends in turn."""


@dataclass
class Measured:
    """What the conversations and a probe of `/health` noticed."""

    waits: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


def main() -> None:
    """Measures, and prints the table; in a process of its own, attacks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--only", choices=[*ATTACKS], nargs="*", default=[*ATTACKS])
    parser.add_argument("--attack-as", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack_as:
        os.nice(10)
        asyncio.run(_attack(options.artifact, options.attack_as.split(",")))
        return
    print(f"{environment()['cpu']}, {environment()['cores']} cores; {options.artifact}\n")
    with _server(options.artifact) as (process, url):
        measure(url, options.seconds, options.only)
        with _attacker(url, options.only):
            time.sleep(3)
            started = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            seconds = time.perf_counter() - started
    print(f"\nSIGTERM in mid-attack: ended after {seconds:.1f} s (--grace {GRACE})")


def measure(url: str, seconds: float, names: list[str]) -> None:
    """Prints a row for each attack and one for all of them, and for no attack before and after."""
    print("| attack | median wait | ratio | 99th percentile | ratio | slowest /health |")
    print("|---|---|---|---|---|---|")
    alone: tuple[float, float] | None = None
    for attacks in [[], *([name] for name in names), names, []]:
        with _attacker(url, attacks):
            measured = asyncio.run(_converse(url, seconds))
        median, high = 1e3 * np.percentile(measured.waits, [50, 99])
        alone = alone or (median, high)
        print(
            f"| {'all' if len(attacks) > 1 else ', '.join(attacks) or 'none'} | {median:.0f} ms | "
            f"{median / alone[0]:.2f} | {high:.0f} ms | {high / alone[1]:.2f} | "
            f"{max(measured.health):.2f} s |",
            flush=True,
        )


async def _converse(url: str, seconds: float) -> Measured:
    """Lets all conversations be written, and `/health` be asked, for some seconds."""
    replies = [Heard(0.0, [], "") for _ in range(CONVERSATIONS)]
    writers = [
        asyncio.create_task(_listen(url, [_user(_words(8, i))], 100_000, endless=True, into=reply))
        for i, reply in enumerate(replies)
    ]
    measured = Measured()
    async with httpx.AsyncClient(timeout=120, verify=False) as client:
        while any(len(reply.times) < 10 for reply in replies):
            await _probe(client, url, measured)
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            await _probe(client, url, measured)
    ended = time.perf_counter()
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    for reply in replies:
        times = [at for at in reply.times if at >= began]
        measured.waits += [after - before for before, after in pairwise([*times, ended])]
    return measured


async def _probe(client: httpx.AsyncClient, url: str, measured: Measured) -> None:
    started = time.perf_counter()
    answer = await client.get(f"{url}/health")
    answer.raise_for_status()
    measured.health.append(time.perf_counter() - started)
    await asyncio.sleep(0.2)


async def _attack(url: str, names: list[str]) -> None:
    """Sends attacks until the process is ended."""
    await asyncio.gather(*(_repeat(url, ATTACKS[name]) for name in names))


async def _repeat(url: str, attack: Attack) -> None:
    bodies = [attack.body(number) for number in range(BODIES)]
    while True:
        if attack.burst:
            sends = (_send(url, attack.path, bodies[i % BODIES], 0.1) for i in range(attack.burst))
            await asyncio.gather(*sends)
            await asyncio.sleep(1)
        else:
            sends = (_send(url, attack.path, bodies[i % BODIES], 60) for i in range(CONNECTIONS))
            await asyncio.gather(*sends)


async def _send(url: str, path: str, body: bytes, seconds: float) -> None:
    """Sends a request, and leaves when it is answered or after some seconds."""
    parts = urlsplit(url)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with contextlib.suppress(OSError, TimeoutError):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(head.encode() + body)
            await writer.drain()
            await asyncio.wait_for(reader.read(), seconds)
        finally:
            writer.close()
    await asyncio.sleep(0.02)  # a refused connection must not make a busy loop


@contextlib.contextmanager
def _attacker(url: str, names: list[str]) -> Iterator[None]:
    """A process that attacks meanwhile; none without names."""
    if not names:
        yield
        return
    command = [sys.executable, "-m", "bench.attacks", url, "--attack-as", ",".join(names)]
    process = subprocess.Popen(command)
    try:
        time.sleep(2)
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _server(artifact: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", START, "serve", artifact, "--port", str(port), "--quiet"]
    command += ["--parallel", str(CONVERSATIONS), "--max-new-tokens", "100000"]
    process = subprocess.Popen([*command, "--grace", str(GRACE)])
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield process, url
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
