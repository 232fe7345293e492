"""A hundred thousand requests to `rgexport serve`, and the memory and handles that they leak.

    python -m bench.soak ARTIFACT [--requests 100000]

Requests of all kinds: a tenth of them is wrong, a tenth leaves in mid-reply. Prints the server's
memory, open handles and running requests after each tenth.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.serve import CHAT, ours

TOGETHER = 16


def main() -> None:
    """Sends them, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--requests", type=int, default=100_000)
    asked = parser.parse_args()
    with ours(asked.artifact, 8, "--cache-size", "64MB") as url:
        (process,) = (
            p for p in psutil.Process().children(recursive=True) if "serve" in p.cmdline()
        )
        print("| requests | memory | handles | threads | running |\n|---|---|---|---|---|")
        for part in range(11):
            if part:
                asyncio.run(_send(url, asked.requests // 10, part))
            memory = process.memory_info().rss / 1e6
            print(
                f"| {part * asked.requests // 10} | {memory:.0f} MB | {process.num_fds()} | "
                f"{process.num_threads()} | {_running(url)} |",
                flush=True,
            )


async def _send(url: str, count: int, part: int) -> None:
    waiting = iter(range(count))
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def work() -> None:
            for number in waiting:
                await _one(client, part * count + number)

        await asyncio.gather(*(work() for _ in range(TOGETHER)))


async def _one(client: httpx.AsyncClient, number: int) -> None:
    """A request of the kind that its number says."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"Hello {number % 977}!"}],
        "max_tokens": 2,
        "temperature": 0,
    }
    match number % 10:
        case 0:
            answer = await client.post(CHAT, json=body | {"temperature": -1})
            assert answer.status_code == 400
        case 1:
            async with client.stream(
                "POST", CHAT, json=body | {"stream": True, "max_tokens": 500}
            ) as answer:
                async for _ in answer.aiter_lines():
                    break
        case 2 | 3 | 4:
            answer = await client.post(CHAT, json=body | {"stream": True})
            assert answer.text.endswith("data: [DONE]\n\n")
        case 5:
            schema = {"type": "json_object"}
            answer = await client.post(CHAT, json=body | {"response_format": schema})
            assert answer.status_code == 200
        case _:
            answer = await client.post(CHAT, json=body)
            assert json.loads(answer.text)["usage"]["completion_tokens"] <= 2


def _running(url: str) -> str:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(line.rsplit(" ", 1)[1] for line in lines if line.startswith("rgexport_running{"))


if __name__ == "__main__":
    main()
