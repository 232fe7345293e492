"""Spreads independent jobs over the workers of a Dask cluster.

When a worker is lost, Dask runs its jobs again elsewhere; each is a function of its arguments and
of files that do not change.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rgexport._version import __version__
from rgexport.errors import NotInstalled, RequestError
from rgexport.kernels.rounding import library
from rgexport.parallelism import job_count, usable_processors

_SECONDS = 10
"""Longest wait for a scheduler to answer, and for its first worker."""
_JOBS_PER_THREAD = 2
"""Jobs that are started for each thread of a worker, so that the next one always waits."""


class Cluster:
    """A connection to a Dask scheduler."""

    def __init__(self, client: Any, address: str):
        self._client = client
        self._address = address

    def start(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns a future of `function(*arguments)`, which takes futures as arguments, too."""
        with warnings.catch_warnings():
            # Data that go with a job are there when it runs again; those on a worker may be lost.
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            with self._connected():
                return self._client.submit(function, *arguments, pure=False)

    def everywhere(self, function: Callable[[], Any]) -> None:
        """Calls a function once in the process of each worker."""
        with self._connected():
            self._client.run(function)

    def result(self, future: Any) -> Any:
        """Waits for a future; raises RequestError if its job did, or the cluster is lost."""
        with self._connected():
            return future.result()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Raises RequestError for the errors by which Dask says that the cluster is lost."""
        from concurrent.futures import CancelledError

        from distributed import KilledWorker
        from distributed.client import ClosedClientError
        from distributed.comm import CommClosedError

        try:
            yield
        except KilledWorker as error:
            raise RequestError(
                f"a job ended the workers of {self._address} that ran it, one after another; give "
                f"workers more memory ({error.last_worker.address})"
            ) from None
        except (CancelledError, ClosedClientError, CommClosedError, TimeoutError):
            raise RequestError(
                f"the Dask scheduler at {self._address} is gone; start it and run the command again"
            ) from None


@contextmanager
def connected(address: str | None) -> Iterator[Cluster | None]:
    """Connects to a scheduler with workers of this rgexport; yields None for None.

    Raises:
        NotInstalled: Dask is missing.
        RequestError: no scheduler answers, it has no workers, or a worker has another rgexport.
    """
    if address is None:
        yield None
        return
    client = _client(address)
    try:
        _require_same_version(client, address)
        jobs = _JOBS_PER_THREAD * sum(client.nthreads().values())
        with job_count(max(jobs, usable_processors())):
            yield Cluster(client, address)
    finally:
        client.close()


def _require_same_version(client: Any, address: str) -> None:
    """Raises RequestError if a worker has another rgexport than this process."""
    ours = _installed()
    try:
        installed = client.run(_installed)
    except ModuleNotFoundError:
        installed = {"a worker": "no rgexport"}
    for worker, theirs in installed.items():
        if theirs != ours:
            raise RequestError(
                f"{worker} of the cluster {address} has {theirs}, and here is {ours}; "
                "install the same for both"
            )


def _client(address: str) -> Any:
    """Returns a client of the scheduler, when that has a worker."""
    try:
        from distributed import Client
        from distributed.comm import get_address_host_port
    except ImportError:
        raise NotInstalled("--cluster needs Dask: pip install 'rgexport[cluster]'") from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # errors are raised, too

    try:
        get_address_host_port(address, strict=True)  # for a wrong one, `Client` prints later, too
        client = Client(address, timeout=_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--cluster is {address!r}, where no Dask scheduler answers ({error}); start one with "
            "`dask scheduler`, and give its address, such as tcp://host:8786"
        ) from None

    try:
        client.wait_for_workers(1, timeout=_SECONDS)
    except TimeoutError:
        client.close()
        raise RequestError(
            f"the Dask scheduler at {address} has no workers; start some: dask worker {address}"
        ) from None
    return client


def _installed() -> str:
    """Returns the rgexport of this process in words; the client and all workers call it."""
    name = f"rgexport {__version__}"
    if library.unusable():
        return f"{name} without its library (python -m rgexport.kernels.build)"
    return name
