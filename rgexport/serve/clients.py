"""Clients, which take turns, and what they own: slots by number, and states by name."""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import TypeVar

from rgexport.chat.jobs import Busy
from rgexport.chat.masks import DaemonExecutor
from rgexport.chat.model import Model
from rgexport.chat.prompts import Message, PromptTokens
from rgexport.chat.reply import ModelReply
from rgexport.chat.state_file import SavedState, file_chunks, require_replaceable, write_chunks
from rgexport.errors import RequestError, system_error
from rgexport.files.atomic import remove_abandoned, sync_folder
from rgexport.serve.errors import DiskFailed, NotFound
from rgexport.units import amount

_NETWORK_BITS = 64  # prefix of an IPv6 address that one client has: it may choose the rest
_MOST_SLOTS = 1024
DISK_SECONDS = 30.0
_MOST_WAITING = 8
_END = ".state"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Client:
    """The sender of a request; `name` is its network, `owner` a hash of its key or address."""

    name: str
    owner: str
    is_sharing: bool = False

    @property
    def namespace(self) -> str:
        return "" if self.is_sharing else self.owner


def network_of(address: str) -> str:
    """Returns the network that counts as one client: an IPv4 address, or 64 bits of IPv6."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ip_network((int(parsed), _NETWORK_BITS), strict=False))


@dataclass(frozen=True)
class Slot:
    """A conversation with its last reply, or a text; `known` are tokens that need no rendering."""

    count: int
    messages: tuple[Message, ...] | None
    known: tuple[int, ...] = ()

    def ids(self, model: Model) -> list[int]:
        return [*self.known] if self.known else model.conversation_ids(self.messages or ())


def slot_after(prompt: PromptTokens, reply: ModelReply) -> Slot:
    count = reply.prompt_tokens + reply.new_tokens
    if prompt.messages is None:
        return Slot(count, None, (*prompt.ids, *reply.ids))
    return Slot(count, (*prompt.messages, {"role": "assistant", "content": reply.text}))


def slot_from(saved: SavedState) -> Slot | None:
    if saved.tokens is None:
        return None
    messages = None if saved.messages is None else (*saved.messages,)
    return Slot(saved.count, messages, (*saved.tokens.tolist(),))


SlotKey = tuple[str, str, int]
"""Owner and model of a slot, and its number."""


class ClientSlots(dict[SlotKey, Slot]):
    """The last slots of all clients, at most `most`: the client with the most loses its oldest."""

    def __init__(self, most: int = _MOST_SLOTS) -> None:
        self._most = most

    def put(self, key: SlotKey, slot: Slot) -> None:
        self.pop(key, None)
        self[key] = slot
        while len(self) > self._most:
            ((most, _),) = Counter(owner for owner, _, _ in self).most_common(1)
            del self[next(key for key in self if key[0] == most)]


class NamedStates:
    """A folder with the states of all clients: at most `most` of each, `max_bytes` in all.

    A thread uses the disk, so that one that hangs delays only the requests for named states, and
    these only for a limited time. A state that is saved is on the disk.
    """

    def __init__(self, folder: Path | None, most: int, max_bytes: int) -> None:
        self._folder, self._most, self._max_bytes = folder, most, max_bytes
        self._queue = threading.Semaphore(_MOST_WAITING)
        self._thread = DaemonExecutor("named states")

    async def require_space(self, client: Client, name: str) -> None:
        await self._use_disk(client, name, lambda path: self._require_space(path, 0))

    async def save(self, client: Client, name: str, model: Model, saved: SavedState) -> int:
        def write(path: Path) -> int:
            chunks = file_chunks(saved, model.state_precision)
            self._require_space(path, sum(chunk.nbytes for chunk in chunks))
            require_replaceable(path)
            return write_chunks(path, chunks)

        return await self._use_disk(client, name, write)

    async def restore(self, client: Client, name: str, model: Model) -> SavedState:
        def read(path: Path) -> SavedState:
            _require_file(path)
            return model.load_state(path, namespace=client.namespace)

        return await self._use_disk(client, name, read)

    async def erase(self, client: Client, name: str) -> None:
        def remove(path: Path) -> None:
            _require_file(path)
            path.unlink(missing_ok=True)
            sync_folder(path.parent)

        await self._use_disk(client, name, remove)

    async def _use_disk(self, client: Client, name: str, task: Callable[[Path], Result]) -> Result:
        if self._folder is None:
            raise RequestError("this server keeps no states: it was started without --state-folder")
        if not self._queue.acquire(blocking=False):
            raise Busy("the disk of saved states is busy; try again later")
        folder = self._folder if client.is_sharing else self._folder / client.owner
        path = folder / f"{name}{_END}"
        future = self._thread.submit(partial(task, path))
        self._thread.submit(self._queue.release)  # when the thread has passed it, cancelled or not
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), DISK_SECONDS)
        except TimeoutError:
            raise DiskFailed("the disk of saved states does not answer; try again later") from None
        except (OSError, RequestError) as error:
            raise _for_client(error, path) from None

    def _require_space(self, path: Path, nbytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = [entry for entry in self._files() if entry.path != str(path)]
        count = sum(os.path.dirname(entry.path) == str(path.parent) for entry in saved)
        total = sum(entry.stat().st_size for entry in saved)
        if count >= self._most:
            raise RequestError(
                f"filename: you have {count} saved states, and this server keeps at most "
                f"{self._most} of each client (--max-saved-states); erase one first"
            )
        if total + nbytes > self._max_bytes:
            raise RequestError(
                f"filename: the state of {amount(nbytes)} does not fit beside {amount(total)} of "
                f"others, and this server keeps at most {amount(self._max_bytes)} "
                "(--saved-states-size); erase one first"
            )

    def _files(self) -> Iterator[os.DirEntry[str]]:
        folders = [str(self._folder)]
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    remove_abandoned(entry)
                    if entry.name.endswith(_END):
                        yield entry
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise NotFound(f"filename: there is no saved state {path.stem!r}", "filename")


def _for_client(error: OSError | RequestError, path: Path) -> RequestError:
    """Returns the error for a client: without the names of folders."""
    system = system_error(error)
    if system is not None:
        return DiskFailed(f"the disk of saved states fails: {system.strerror}; try again later")
    if isinstance(error, NotFound):
        return error
    return RequestError(str(error).replace(str(path), path.stem))
