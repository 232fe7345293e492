"""A hundred thousand requests to a server whose disk fails, hangs and works again.

    python -m bench.disk_faults [--requests 100000] [--folder FOLDER]

The engine is a toy, the rest is the server's own: HTTP without a network, conversations, states in
a folder, states by name. The disk has another fault in every second period of requests. Where the
system lets it, the folder is a small file system that is really full in some periods. Prints
memory, handles and threads on the way; at the end it reads each state whose save was acknowledged.
"""

import argparse
import asyncio
import itertools
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from rgexport.artifacts.manifest import Identity
from rgexport.chat.model import Model
from rgexport.chat.prompts import ChatTemplate
from rgexport.chat.reply import ReplyOptions
from rgexport.chat.state_file import read_state
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.griffin.control_tokens import GEMMA_TEMPLATE
from rgexport.serve import clients
from rgexport.serve.app import create_app
from rgexport.serve.server import ServerSettings
from tests.faulty_disk import FAULTS, FaultyDisk
from tests.toy_session import MEMORY, ToySession

DEMO = Path(__file__).parents[1] / "demo" / "model"
TOGETHER, NAMES = 16, 40
PATIENCE_SECONDS = 60.0
"""A request that takes longer hangs."""
_HANGING_SECONDS = 3.0
_BYTES = 8 << 20


@dataclass
class Report:
    """What happened."""

    answers: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Fault → requests while it was there."""
    rows: list[tuple[int, float, int, int, int]] = field(default_factory=list)
    """Requests, MB of memory, handles, threads, bytes of files."""
    hanging: int = 0
    lost: list[str] = field(default_factory=list)
    """Names of acknowledged states that are gone, damaged or of another text."""
    close_seconds: float = 0.0


class Disk(FaultyDisk):
    """A disk that can also be really full, or lose the states that the server keeps by itself."""

    @property
    def faults(self) -> tuple[str, ...]:
        """All faults but the loss of the whole folder, which loses what was acknowledged."""
        full = ("filled",) if self.folder.is_mount() else ()
        real = [fault for fault in FAULTS if fault not in ("removed", "replaced" if full else "")]
        return (*real, "hanging", "emptied", *full)

    def begin(self, fault: str) -> None:
        super().begin(fault)
        if fault == "emptied":
            for folder in self.folder.glob("*-*"):
                shutil.rmtree(folder, ignore_errors=True)
        elif fault == "filled":
            with suppress(OSError), (self.folder / "ballast").open("wb", 0) as file:
                while True:
                    file.write(bytes(4096))

    def end(self) -> None:
        super().end()
        (self.folder / "ballast").unlink(missing_ok=True)


class Client:
    """Sends requests, and remembers what was acknowledged."""

    def __init__(self, model: Model, session: ToySession, saved: Path, report: Report) -> None:
        self.model, self.session, self.saved, self.report = model, session, saved, report
        self.acknowledged: dict[str, list[int]] = {}
        """Name → the tokens of the last save that was answered with 200."""
        self.later: dict[str, list[list[int]]] = {}
        """Name → the tokens of saves after that one, which may have come to the disk."""
        settings = ServerSettings(saved=saved, share_prefixes=True, log=False)
        transport = httpx.ASGITransport(create_app({model.name: model}, settings))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def send(self, number: int) -> None:
        """Sends a request of the kind that its number says."""
        kinds = {0: self._save, 1: self._restore, 2: self._chat}
        kind = kinds.get(number % 20, self._complete)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                answer = await kind(number)
        except TimeoutError:
            self.report.hanging += 1
            answer = "hangs"
        self.report.answers[f"{kind.__name__.strip('_')} {answer}"] += 1

    async def _complete(self, number: int) -> str:
        ids = self.model.text_ids(f"{number % 997} bottles of beer on the wall, {number % 13}")
        options = ReplyOptions(max_new_tokens=1 + number % 2, client=str(number % 5))
        await asyncio.to_thread(self.model.continue_ids(ids, options).reply)
        return "done"

    async def _chat(self, number: int) -> str:
        return str((await self._say(number, slot=999)).status_code)

    async def _restore(self, number: int) -> str:
        name = f"s{number // 20 % NAMES}"
        was_there = name in self.acknowledged
        status = (await self._act("restore", name, 998)).status_code
        if was_there and status == 404:
            self.report.lost.append(f"{name}: it was not found")
        return str(status)

    async def _save(self, number: int) -> str:
        turn = number // 20
        slot, name = turn, f"s{turn % NAMES}"
        answer = await self._say(number, slot=slot)
        assert answer.status_code == 200, answer.text
        said = {"role": "assistant", "content": answer.json()["choices"][0]["message"]["content"]}
        ids = self.model.conversation_ids([_user(number), said])
        self.later.setdefault(name, []).append(ids)
        status = (await self._act("save", name, slot)).status_code
        if status == 200:
            self.acknowledged[name] = ids
            self.later[name].clear()
        return str(status)

    async def _say(self, number: int, slot: int) -> httpx.Response:
        body = {"messages": [_user(number)], "max_tokens": 2, "temperature": 0, "id_slot": slot}
        return await self.http.post("/v1/chat/completions", json=body)

    async def _act(self, action: str, name: str, slot: int) -> httpx.Response:
        return await self.http.post(f"/slots/{slot}?action={action}", json={"filename": name})

    def check(self) -> None:
        """Reads all states that were acknowledged, and computes each again."""
        for name, ids in self.acknowledged.items():
            try:
                saved = read_state(self.saved / f"{name}.state", ToySession.state_shapes)
                tokens = [] if saved.tokens is None else saved.tokens.tolist()
                session = ToySession(self.model.vocab_size)
                session.prefill(np.array([tokens[: saved.position]]))
                same = np.allclose(saved.state[MEMORY], session.get_rows(range(1))[MEMORY])
                if not same or tokens not in [ids, *self.later[name]]:
                    self.report.lost.append(f"{name}: another text")
            except Exception as error:
                self.report.lost.append(f"{name}: {error}")


def _user(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"Hello {number % 1997}!"}


def run(disk: Disk, requests: int, *, period: int) -> Report:
    """Sends the requests, with a fault in every second period, and checks the files that remain."""
    report, tokenizer = Report(), load_tokenizer(DEMO)
    session = ToySession(tokenizer.vocab_size)
    identity = Identity("toy", "ab" * 32, 8, "cd" * 32)
    model = Model(
        session,
        tokenizer,
        ChatTemplate(GEMMA_TEMPLATE, "built-in"),
        identity,
        rows=8,
        cache_bytes=_BYTES,
        state_folder=disk.folder,
        folder_bytes=_BYTES,
    )
    client = Client(model, session, disk.folder / "saved", report)
    asyncio.run(_send_all(client, disk, requests, period))
    began = time.monotonic()
    model.close()
    report.close_seconds = time.monotonic() - began
    client.check()
    return report


async def _send_all(client: Client, disk: Disk, requests: int, period: int) -> None:
    marks = {requests * part // 10 // period * period for part in range(1, 10)}
    faults = itertools.cycle(disk.faults)
    for start in range(0, requests, period):
        if start in marks or start == period:
            _measure(client.report, disk, start)
        fault = next(faults) if start // period % 2 else ""
        if fault:
            disk.begin(fault)
        ending = asyncio.create_task(_end_of_hanging(disk)) if fault == "hanging" else None
        numbers = iter(range(start, min(start + period, requests)))
        client.report.faults[fault or "none"] += period
        await asyncio.gather(*(_work(client, numbers) for _ in range(TOGETHER)))
        if ending:
            await ending
        elif fault:
            disk.end()
        client.session.calls.clear()  # a record of the toy's, which would look like a leak
    await client.http.aclose()
    _measure(client.report, disk, requests)


async def _work(client: Client, numbers: Iterator[int]) -> None:
    for number in numbers:
        await client.send(number)


async def _end_of_hanging(disk: Disk) -> None:
    await asyncio.sleep(_HANGING_SECONDS)
    disk.end()


def _measure(report: Report, disk: Disk, requests: int) -> None:
    process = psutil.Process()
    nbytes = sum(path.stat().st_size for path in disk.folder.rglob("*") if path.is_file())
    memory = process.memory_info().rss / 1e6
    row = requests, memory, process.num_fds(), process.num_threads(), nbytes
    report.rows.append(row)
    print("| {} | {:.0f} MB | {} | {} | {} |".format(*row), flush=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Gives a file system of its own of 64 MB, or the folder itself where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={8 * _BYTES}", "tmpfs", str(folder)]
    mounted = (
        shutil.which("mount") is not None
        and not subprocess.run(mount, check=False, capture_output=True).returncode
    )
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> None:
    """Sends them, and prints a table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--period", type=int, default=500)
    parser.add_argument("--folder", type=Path)
    asked: Any = parser.parse_args()
    clients.DISK_SECONDS = _HANGING_SECONDS / 3
    with (
        tempfile.TemporaryDirectory() as temporary,
        small_disk(asked.folder or Path(temporary) / "states") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        print("| requests | memory | handles | threads | bytes of states |\n|---|---|---|---|---|")
        report = run(Disk(folder, patch), asked.requests, period=asked.period)
    print(f"\nanswers: {dict(sorted(report.answers.items()))}")
    print(f"requests by fault: {dict(sorted(report.faults.items()))}")
    print(f"hanging: {report.hanging}; lost: {report.lost or 'none'}")
    print(f"close: {report.close_seconds:.2f} s")


if __name__ == "__main__":
    main()
