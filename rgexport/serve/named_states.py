"""States that clients save by name, in files of one folder."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

from rgexport.chat.daemon_executor import resolve
from rgexport.chat.jobs import Busy
from rgexport.chat.model import Model
from rgexport.chat.state_file import SavedState, file_chunks, require_replaceable, write_chunks
from rgexport.errors import RequestError, system_error
from rgexport.files.atomic import remove_abandoned, sync_folder
from rgexport.serve.clients import Client
from rgexport.serve.errors import DiskFailed, NotFound
from rgexport.units import amount

DISK_SECONDS = 30.0
"""Longest time that a client waits for the disk."""
_MOST_WAITING = 8
"""Maximum number of requests that wait for the disk."""
_END = ".state"

Result = TypeVar("Result")


class NamedStates:
    """A folder with the states of all clients: at most `most` of each, `max_bytes` in all.

    A thread uses the disk, so that a disk that hangs delays only the requests for named states, and
    these only for a limited time. All methods raise RequestError without a folder, NotFound for a
    missing state, and DiskFailed if the disk fails or does not answer.
    """

    def __init__(self, folder: Path | None, *, most: int, max_bytes: int) -> None:
        self._folder, self._most, self._max_bytes = folder, most, max_bytes
        self._queue, self._lock = threading.Semaphore(_MOST_WAITING), threading.Lock()

    async def require_space(self, client: Client, name: str) -> None:
        """Refuses a new name if there are too many, before its state is computed."""
        await self._use_disk(client, name, lambda path: self._require_space(path, 0))

    async def save(self, client: Client, name: str, model: Model, saved: SavedState) -> int:
        """Writes a state, which is on the disk when this returns; returns the size of its file."""

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
        path, future = client.folder(self._folder) / f"{name}{_END}", Future[Result]()
        threading.Thread(
            target=self._run, args=(task, path, future), name="named states", daemon=True
        ).start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), DISK_SECONDS)
        except TimeoutError:
            raise DiskFailed("the disk of saved states does not answer; try again later") from None
        except (OSError, RequestError) as error:
            raise _for_client(error, path) from None

    def _run(self, task: Callable[[Path], Result], path: Path, future: Future[Result]) -> None:
        with self._lock:
            resolve(future, partial(task, path))
        self._queue.release()

    def _require_space(self, path: Path, nbytes: int) -> None:
        """Refuses a state beyond the limits, which do not count the state that it replaces."""
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
        """Yields the states of all clients; removes incomplete files of killed processes."""
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
