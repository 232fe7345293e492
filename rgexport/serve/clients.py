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

_NETWORK_BITS = 64
"""Prefix of an IPv6 address that one client has: it may choose the rest."""

_MOST_SLOTS = 1024

DISK_SECONDS = 30.0
"""Longest wait for the disk of saved states."""

_MOST_WAITING = 8
"""Maximum number of requests that wait for that disk."""

_SUFFIX = ".state"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Client:
    """The sender of a request.

    Attributes:
        name: its network; requests of different names take turns.
        owner: a hash of its key or address, which owns slots and states.
        is_sharing: whether all clients share states.
    """

    name: str
    owner: str
    is_sharing: bool = False

    @property
    def namespace(self) -> str:
        """The namespace in which its states are found; "" is the one that all share."""
        if self.is_sharing:
            return ""
        return self.owner


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
    """A conversation with its last reply, or a text.

    Attributes:
        count: number of its tokens.
        messages: the conversation; None for a text.
        known: its tokens; empty if they must be rendered from the messages.
    """

    count: int
    messages: tuple[Message, ...] | None
    known: tuple[int, ...] = ()

    def ids(self, model: Model) -> list[int]:
        """Returns its tokens."""
        if self.known:
            return list(self.known)
        return model.conversation_ids(self.messages or ())


def slot_after(prompt: PromptTokens, reply: ModelReply) -> Slot:
    """Returns the slot of a prompt and the reply to it."""
    count = reply.prompt_tokens + reply.new_tokens
    if prompt.messages is None:
        return Slot(count, None, (*prompt.ids, *reply.ids))
    reply_message = {"role": "assistant", "content": reply.text}
    return Slot(count, (*prompt.messages, reply_message))


def slot_from(saved: SavedState) -> Slot | None:
    """Returns the slot of a saved state; None if the file does not have its tokens."""
    if saved.tokens is None:
        return None
    messages = None
    if saved.messages is not None:
        messages = tuple(saved.messages)
    return Slot(saved.count, messages, tuple(saved.tokens.tolist()))


SlotKey = tuple[str, str, int]
"""Owner and model of a slot, and its number."""


class ClientSlots(dict[SlotKey, Slot]):
    """The last slots of all clients, the oldest first.

    The event loop's thread uses it.
    """

    def __init__(self, most: int = _MOST_SLOTS) -> None:
        """Takes the maximum number of slots."""
        self._most = most

    def put(self, key: SlotKey, slot: Slot) -> None:
        """Stores a slot as the newest; beyond the limit, the client with the most loses one."""
        self.pop(key, None)
        self[key] = slot
        while len(self) > self._most:
            counts = Counter(owner for owner, _, _ in self)
            [(owner, _)] = counts.most_common(1)
            self._remove_oldest(owner)

    def _remove_oldest(self, owner: str) -> None:
        for key in self:
            if key[0] == owner:
                del self[key]
                return


class NamedStates:
    """A folder with the states of all clients.

    The event loop's thread calls its public methods. One thread uses the disk, so that a disk that
    hangs delays only the requests for named states, and these only for a limited time. A state that
    is saved is on the disk.

    Public methods raise:
        Busy: too many requests wait for the disk.
        DiskFailed: the disk does not answer, or fails.
        RequestError: the server has no folder, or the request does not fit the states in it.
    """

    def __init__(self, folder: Path | None, most: int, max_bytes: int) -> None:
        """Takes limits: `most` states of a client, `max_bytes` of all."""
        self._folder = folder
        self._most = most
        self._max_bytes = max_bytes
        self._queue = threading.Semaphore(_MOST_WAITING)
        self._thread = DaemonExecutor("named states")

    async def require_space(self, client: Client, name: str) -> None:
        """Raises RequestError if no more states fit."""
        await self._use_disk(client, name, partial(self._require_space, nbytes=0))

    async def save(self, client: Client, name: str, model: Model, saved: SavedState) -> int:
        """Writes a state, and returns the size of its file in bytes."""
        write = partial(self._write, model=model, saved=saved)
        return await self._use_disk(client, name, write)

    async def restore(self, client: Client, name: str, model: Model) -> SavedState:
        """Loads a state into the model; raises NotFound if there is none of this name."""
        load = partial(_load, model=model, namespace=client.namespace)
        return await self._use_disk(client, name, load)

    async def erase(self, client: Client, name: str) -> None:
        """Removes a state; raises NotFound if there is none of this name."""
        await self._use_disk(client, name, _remove)

    async def _use_disk(self, client: Client, name: str, task: Callable[[Path], Result]) -> Result:
        """Returns the result of `task` for the path of a state, computed in the disk's thread."""
        if self._folder is None:
            raise RequestError("this server keeps no states: it was started without --state-folder")
        if not self._queue.acquire(blocking=False):
            raise Busy("the disk of saved states is busy; try again later")

        folder = self._folder
        if not client.is_sharing:
            folder = folder / client.owner
        path = folder / f"{name}{_SUFFIX}"
        future = self._thread.submit(partial(task, path))
        self._thread.submit(self._queue.release)  # when the thread has passed it, cancelled or not

        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), DISK_SECONDS)
        except TimeoutError:
            raise DiskFailed("the disk of saved states does not answer; try again later") from None
        except (OSError, RequestError) as error:
            raise _for_client(error, path) from None

    def _write(self, path: Path, *, model: Model, saved: SavedState) -> int:
        """Writes a state, and returns the size of its file; runs in the disk's thread."""
        chunks = file_chunks(saved, model.state_precision)
        nbytes = sum(chunk.nbytes for chunk in chunks)
        self._require_space(path, nbytes)
        require_replaceable(path)
        return write_chunks(path, chunks)

    def _require_space(self, path: Path, nbytes: int) -> None:
        """Raises RequestError unless a state of `nbytes` fits; runs in the disk's thread.

        A state at `path` does not count, since it would be replaced.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [entry for entry in self._files() if entry.path != str(path)]
        count = 0
        total = 0
        for entry in others:
            if os.path.dirname(entry.path) == str(path.parent):
                count += 1
            total += entry.stat().st_size

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
        """Yields the states of all clients; removes what an interrupted save has left."""
        folders = [str(self._folder)]
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    remove_abandoned(entry)
                    if entry.name.endswith(_SUFFIX):
                        yield entry
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)


def _load(path: Path, *, model: Model, namespace: str) -> SavedState:
    _require_file(path)
    return model.load_state(path, namespace=namespace)


def _remove(path: Path) -> None:
    _require_file(path)
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


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
