"""Spreads what is independent over the workers of a Dask cluster.

What is spread: the layers' sums for a calibration, by sequences; factorizations, by the inputs of
matrices; and GPTQ, by slabs of rows. Results do not depend on the workers. When one is lost, Dask
runs its jobs again elsewhere; each is a function of its arguments and of files that do not change.

Dask and not Ray: it is pure Python, runs wherever this package does, and a lost result is computed
again from the jobs before it.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from rgexport import __version__
from rgexport.errors import NotInstalled, RequestError
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.kernels.rounding import library
from rgexport.processors import more_jobs
from rgexport.quantize.affine import Parts
from rgexport.quantize.algorithms import encode
from rgexport.quantize.calibration import Calibration, open_calibration
from rgexport.quantize.scheme import Uniform
from rgexport.quantize.statistics import (
    Calibrated,
    LastInputs,
    RemoteStatistics,
    Statistics,
    StatisticsOf,
)

if TYPE_CHECKING:
    from rgexport.compress.statistics import RunLayer

_SECONDS = 10
"""For a scheduler to answer, and for a worker to be there."""
_JOBS_PER_THREAD = 2
"""That are on their way, so that no worker waits."""


class Cluster:
    """Workers that are connected."""

    def __init__(self, client: Any, address: str):
        self._client, self._address = client, address

    def start(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A future of `function(*arguments)`; futures among the arguments become their results."""
        with warnings.catch_warnings():
            # Data that go with a job are there when it runs again; those on a worker may be lost.
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            with self._connected():
                return self._client.submit(function, *arguments, pure=False)

    def result(self, future: Any) -> Any:
        """Waits for a future.

        Raises:
            RequestError: the job ended in one, or the cluster is lost.
        """
        with self._connected():
            return future.result()

    @contextmanager
    def _connected(self) -> Iterator[None]:
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

    def statistics(self, calibration: Calibration, config: GriffinConfig) -> StatisticsOf:
        """Statistics by a calibration whose file the workers see, too."""
        return _Spread(self, calibration, config)

    def run_layer(self, checkpoint: Checkpoint, device: str) -> "RunLayer":
        """Workers that see the checkpoint's files, too, take sequences through layers."""
        import torch

        adapter = checkpoint.adapter and checkpoint.adapter.resolve()
        place = checkpoint.path.resolve(), adapter
        model = uuid4().hex, place, checkpoint.config, device
        threads = torch.get_num_threads()  # another number could give other sums

        def run(index: int, batches: Iterable[Any]) -> Iterator[Any]:
            arrays = (x.cpu().numpy() for x in batches)
            jobs = [self.start(_forward, model, index, x, threads) for x in arrays]
            while jobs:
                yield self.result(jobs.pop(0))

        return run


@contextmanager
def connected(address: str | None) -> Iterator[Cluster | None]:
    """The workers at a scheduler's address; None gives none.

    Raises:
        NotInstalled: Dask is missing.
        RequestError: nobody answers there, there is no worker, or one has another rgexport.
    """
    if address is None:
        yield None
        return
    client = _client(address)
    try:
        _require_same(client, address)
        with more_jobs(_JOBS_PER_THREAD * sum(client.nthreads().values())):
            yield Cluster(client, address)
    finally:
        client.close()


def _client(address: str) -> Any:
    try:
        from distributed import Client
        from distributed.comm import get_address_host_port
    except ImportError:
        raise NotInstalled("--cluster needs Dask: pip install 'rgexport[cluster]'") from None
    try:
        get_address_host_port(address, strict=True)
    except ValueError:
        raise RequestError(
            f"--cluster is {address!r}; expected the address of a Dask scheduler, such as "
            "tcp://host:8786"
        ) from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # errors are raised, too
    try:
        client = Client(address, timeout=_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise RequestError(
            f"--cluster is {address!r}, where no Dask scheduler answers ({error}); start one: dask "
            "scheduler"
        ) from None
    try:
        client.wait_for_workers(1, timeout=_SECONDS)
    except TimeoutError:
        client.close()
        raise RequestError(
            f"the Dask scheduler at {address} has no workers; start some: dask worker {address}"
        ) from None
    return client


def _require_same(client: Any, address: str) -> None:
    """Refuses workers that would compute something else."""
    ours = _able()
    try:
        found = client.run(_able)
    except ModuleNotFoundError:
        found = {"a worker": "no rgexport"}
    for worker, able in found.items():
        if able != ours:
            raise RequestError(
                f"{worker} of the cluster {address} has {able}, and here is {ours}; install the "
                "same for both"
            )


def _able() -> str:
    built = "" if library.is_there() else " without its library (python -m rgexport.kernels.build)"
    return f"rgexport {__version__}{built}"


class _Spread(LastInputs):
    """What is known stays on the cluster, where it is factored once."""

    def __init__(self, cluster: Cluster, calibration: Calibration, config: GriffinConfig):
        super().__init__()
        self._cluster = cluster
        path, text = calibration.path.resolve(), calibration.provenance.tokens_sha256
        self._asked = uuid4().hex, path, text, config

    def _read(self, name: str) -> "_OnCluster":
        return _OnCluster(self._cluster, self._cluster.start(_read, *self._asked, name))


class _OnCluster(RemoteStatistics):
    def __init__(self, cluster: Cluster, statistics: Any):
        self._cluster, self._statistics = cluster, statistics

    def encode(self, name: str, rows: np.ndarray, scheme: Uniform, ids: np.ndarray | None) -> Parts:
        job = self._cluster.start(_encode, name, rows, scheme, self._statistics, ids)
        parts: Parts = self._cluster.result(job)
        return parts


# The jobs. What a worker keeps is for one run of a command, because files may change after it:
# `run` is another text for each.


def _read(run: str, path: Path, text: str, config: GriffinConfig, name: str) -> Statistics | None:
    found = _calibrated(run, path, text, config)(name)
    if isinstance(found, Statistics):
        found.factor()
        return found
    return None


@lru_cache(maxsize=1)
def _calibrated(run: str, path: Path, text: str, config: GriffinConfig) -> Calibrated:
    calibration = open_calibration(path) if path.exists() else None
    if calibration is None or calibration.provenance.tokens_sha256 != text:
        raise RequestError(
            f"a worker of the cluster does not have the calibration {path}; put it where all "
            "workers see it under this path"
        )
    return Calibrated(calibration, config)


_Place = tuple[Path, Path | None]
"""A model, and its adapter."""


def _encode(
    name: str,
    rows: np.ndarray,
    scheme: Uniform,
    statistics: Statistics | None,
    ids: np.ndarray | None,
) -> Parts:
    return encode(name, rows, scheme, statistics, ids)


def _forward(
    model: tuple[str, _Place, GriffinConfig, str], index: int, x: np.ndarray, threads: int
) -> tuple[Any, Any]:
    import torch

    from rgexport.compress.statistics import forward

    torch.set_num_threads(threads)
    _, _, config, device = model
    return forward(config, _layer(*model, index), index, torch.from_numpy(x).to(device))


@lru_cache(maxsize=1)
def _layer(run: str, place: _Place, config: GriffinConfig, device: str, index: int) -> Any:
    from rgexport.griffin.reference import Reference

    try:
        path, adapter = place
        checkpoint = open_checkpoint(path, adapter=adapter)
    except RequestError as error:
        raise RequestError(
            f"a worker of the cluster cannot open the model: {error}; put it where all workers see "
            "it under the same path"
        ) from None
    return Reference(config, checkpoint.weights, device=device).layer(index)
