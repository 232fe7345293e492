"""`rgexport serve` beside one pass over the weights, and beside llama-server: tables in Markdown.

    python -m bench.serve ARTIFACT [--gguf FILE] [--llama-server FILE] [--rows 1,2,4,8,16]

Three questions: what a turn costs when the conversation is long; how many tokens a second all
conversations get together, as a share of what the engine gives without a server; and how long a
reader waits for the next token while someone else's long prompt is read.
"""

import argparse
import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

from bench.run import START
from rgexport.artifacts.opening import open_artifact
from rgexport.progress import note
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.machine import environment

TURNS, WORDS, NEW = 20, 40, 24
"""Turns of a conversation, words of each message, and tokens of each reply."""
PAUSE = 1.0
"""Seconds between a reply and the next message, at least: the end of the turn is read then."""
LONG = 4000
"""Tokens of the long prompt."""
CHAT = "/v1/chat/completions"


@dataclass
class Heard:
    """When the pieces of a reply came, and what it cost."""

    began: float
    times: list[float]
    text: str
    prompt: int = 0
    cached: int = 0
    tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds until the first piece."""
        return self.times[0] - self.began


def main() -> None:
    """Measures what is asked for, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same model for llama-server")
    parser.add_argument("--llama-server", type=Path, default=Path("out/llama/bin/llama-server"))
    parser.add_argument("--rows", default="1,2,4,8,16", help="conversations at once")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--repetitions", type=int, default=9, help="of throughput, a third")
    parser.add_argument("--no-lookup", action="store_true", help="as for texts that do not repeat")
    parser.add_argument("--skip", nargs="*", default=[], choices=["turns", "throughput", "waiting"])
    asked = parser.parse_args()
    gc.disable()  # 8 ms of some first token, in this process
    rows = [int(word) for word in asked.rows.split(",")]
    more = ["--no-lookup"] if asked.no_lookup else []
    servers = {"rgexport serve": lambda: ours(asked.artifact, max(rows), *more)}
    if asked.gguf:
        servers["rgexport serve, GGUF"] = lambda: ours(asked.gguf, max(rows), *more)
        servers["llama-server, GGUF"] = lambda: theirs(asked.llama_server, asked.gguf, max(rows))
    print(f"{environment()['cpu']}, {environment()['cores']} cores; {asked.artifact.name}\n")
    for name, server in servers.items():
        if "turns" not in asked.skip:
            with server() as url:
                print(turn_line(name, url, asked.turns, asked.repetitions), flush=True)
    if "throughput" not in asked.skip:
        for name, server in servers.items():
            artifact = asked.gguf if "GGUF" in name else asked.artifact
            with server() as url:
                repetitions = -(-asked.repetitions // 3)
                print(throughput_line(name, url, artifact, rows, repetitions), flush=True)
    if "waiting" not in asked.skip:
        with servers["rgexport serve"]() as url:
            print(waiting_line("rgexport serve", url), flush=True)


@contextmanager
def ours(artifact: Path, rows: int, *options: str) -> Iterator[str]:
    """A server of ours."""
    command = [sys.executable, "-c", START, "serve", str(artifact), "--port", "0", "--quiet"]
    command += ["--parallel", str(rows), "--max-new-tokens", "100000", *options]
    with _running(command, r"(http://[\d.]+:\d+)/v1") as url:
        yield url


@contextmanager
def theirs(program: Path, gguf: Path, rows: int) -> Iterator[str]:
    """llama-server, with a place and room for each conversation."""
    context = rows * (LONG + 4096)
    command = [program, "-m", gguf, "--port", "8191", "-np", str(rows), "-c", str(context)]
    threads = str(environment()["cores"])
    with _running([*map(str, command), "-t", threads], r"listening on (http://\S+:\d+)") as url:
        yield url


def turn_line(name: str, url: str, turns: int, repetitions: int) -> str:
    """What the second, the middle and the last turn cost, and an edit of the middle one."""
    firsts: list[list[float]] = []
    seed = int(time.time())
    for repetition in range(repetitions):
        talk: list[dict[str, str]] = []
        row = []
        for turn in range(turns):
            talk.append(_user(_words(WORDS, seed + 1000 * repetition + turn)))
            heard = asyncio.run(_listen(url, talk, NEW))
            row.append(heard.first)
            talk.append({"role": "assistant", "content": heard.text})
            _pause(url)
        firsts.append(row)
    middle = turns // 2
    edited = [*talk[: 2 * middle], _user(_words(WORDS, seed - 1))]
    edit = asyncio.run(_listen(url, edited, NEW))
    low = np.median(firsts, 0)
    return (
        f"| {name} | {1e3 * low[1]:.0f} ms | {1e3 * low[-1]:.0f} ms | {low[-1] / low[1]:.2f} | "
        f"{heard.cached} of {heard.prompt} | {1e3 * edit.first:.0f} ms | "
        f"{edit.cached} of {edit.prompt} |"
    )


def steps_per_second(artifact: Path, rows: int) -> float:
    """Tokens a second of so many rows in the engine alone."""
    session = open_session(open_artifact(artifact))
    session.reset(rows)
    tokens = np.full((rows, 1), 7)
    session.prefill(np.full((rows, 64), 7))
    times = []
    for _ in range(24):
        started = time.perf_counter()
        session.step(tokens)
        times.append(time.perf_counter() - started)
    session.close()
    return rows / median(times[4:])


def throughput_line(name: str, url: str, artifact: Path, rows: list[int], repetitions: int) -> str:
    """Tokens a second of all: as a share of the engine's, and times those of the first number."""
    cells, first = [], 0.0
    for count in rows:
        served, alone = [], []
        for _ in range(repetitions):
            alone.append(steps_per_second(artifact, count))
            served.append(asyncio.run(_together(url, count)))
        share = median(served) / median(alone)
        first = first or median(served)
        times = median(served) / first
        cells.append(f"{count}: {median(served):.1f}/s ({share:.2f} of the engine, {times:.1f} x)")
    return f"| {name} | {' | '.join(cells)} |"


def waiting_line(name: str, url: str) -> str:
    """The waits between tokens of four readers while a long prompt is read."""
    gaps, alone = asyncio.run(_beside_a_long_prompt(url))
    low, high = median(gaps), float(np.percentile(gaps, 99))
    return (
        f"| {name} | {1e3 * alone:.1f} ms | {1e3 * low:.1f} ms | {1e3 * high:.1f} ms | "
        f"{high / low:.2f} |"
    )


async def _together(url: str, count: int) -> float:
    """Tokens a second while all write; prompts are read before."""
    heard = await asyncio.gather(
        *(
            _listen(url, [_user(_words(8, int(time.time()) + i))], 64, endless=True)
            for i in range(count)
        )
    )
    begin, end = max(h.times[0] for h in heard), min(h.times[-1] for h in heard)
    written = sum(sum(begin < at <= end for at in h.times) for h in heard)
    return written / (end - begin)


async def _beside_a_long_prompt(url: str) -> tuple[list[float], float]:
    """Waits while a long prompt is read, and the median before."""
    heard = [Heard(0.0, [], "") for _ in range(4)]
    writers = [
        asyncio.create_task(
            _listen(url, [_user(_words(8, i))], 100_000, endless=True, into=heard[i])
        )
        for i in range(4)
    ]
    while min(len(each.times) for each in heard) < 20:  # noqa: ASYNC110 - nothing signals growth
        await asyncio.sleep(0.05)
    started = time.perf_counter()
    await _listen(url, [_user(_words(LONG // 4, int(time.time())))], 1)
    ended = time.perf_counter()
    for writer in writers:
        writer.cancel()
    gaps, before = [], []
    for each in heard:
        for one, other in zip(each.times, each.times[1:], strict=False):
            if other < started:
                before.append(other - one)
            elif one < ended:
                gaps.append(other - one)
    return gaps, median(before)


async def _listen(
    url: str,
    messages: list[dict[str, str]],
    count: int,
    *,
    endless: bool = False,
    into: Heard | None = None,
) -> Heard:
    """A reply, as it is streamed; an endless one is ended by `count` alone."""
    body: dict[str, Any] = {
        "messages": messages,
        "temperature": 0,
        "max_tokens": count,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endless:
        body |= {"logit_bias": {"1": -100, "107": -100}, "ignore_eos": True}
    heard = into or Heard(0.0, [], "")
    # Without `verify`, each client would read the certificates of the web first: 10 ms.
    async with httpx.AsyncClient(timeout=3600, verify=False) as client:
        heard.began = time.perf_counter()
        async for event in _events(client, url, body):
            for choice in event.get("choices", []):
                if text := choice["delta"].get("content"):
                    heard.times.append(time.perf_counter())
                    heard.text += text
            if usage := event.get("usage"):
                heard.prompt, heard.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                heard.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    heard.times = heard.times or [time.perf_counter()]
    return heard


async def _events(
    client: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", url + CHAT, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


@contextmanager
def _running(command: list[str], pattern: str) -> Iterator[str]:
    process = subprocess.Popen(
        command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout
    try:
        for line in process.stdout:
            if match := re.search(pattern, line):
                break
        else:
            raise SystemExit(f"{command[0]} ended before it served")
        os.set_blocking(process.stdout.fileno(), False)
        while httpx.get(f"{match[1]}/health").status_code != 200:
            time.sleep(0.2)
        yield match[1]
    finally:
        process.terminate()
        process.wait(60)
        note("")


def _pause(url: str) -> None:
    """Waits as a person does who reads the reply: until ours has nothing left to do."""
    time.sleep(PAUSE)
    while re.search(
        r"^rgexport_(running|waiting)\{.*\} [1-9]", httpx.get(f"{url}/metrics").text, re.M
    ):
        time.sleep(0.5)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _words(count: int, seed: int) -> str:
    random = np.random.default_rng(seed % 2**32)
    return " ".join(str(random.integers(100, 999)) for _ in range(count))


if __name__ == "__main__":
    main()
