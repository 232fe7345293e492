"""Spreads compression over the workers of a cluster (`runtimes.cluster`).

The sums of a calibration are spread by sequences, factorizations by the inputs of matrices, and
GPTQ by slabs of rows. Results do not depend on the workers.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.algorithms.calibrated import Calibrated, LastInputs
from rgexport.quantize.algorithms.calibration_file import Calibration, open_calibration
from rgexport.quantize.algorithms.statistics import (
    RemoteStatistics,
    RowEncoder,
    Statistics,
    StatisticsOf,
)
from rgexport.quantize.schemes.base import Parts
from rgexport.runtimes.cluster import Cluster

if TYPE_CHECKING:
    from rgexport.planning.layer_pass import RunLayer


def spread_layer(cluster: Cluster, checkpoint: Checkpoint, device: str) -> "RunLayer":
    """Returns a `RunLayer` that runs on workers, which read the checkpoint under the same path."""
    import torch

    adapter = checkpoint.adapter and checkpoint.adapter.resolve()
    model = uuid4().hex, checkpoint.path.resolve(), adapter, checkpoint.config, device
    threads = torch.get_num_threads()  # another number could give other sums

    def run(index: int, batches: Iterable[Any]) -> Iterator[Any]:
        arrays = (x.cpu().numpy() for x in batches)
        jobs = [cluster.start(_forward, model, index, x, threads) for x in arrays]
        while jobs:
            yield cluster.result(jobs.pop(0))

    return run


class SpreadStatistics(LastInputs):
    """Statistics of a calibration file that stay on the cluster and are factored there once."""

    def __init__(self, cluster: Cluster, calibration: Calibration, config: GriffinConfig):
        super().__init__()
        self._cluster = cluster
        path, text = calibration.path.resolve(), calibration.provenance.tokens_sha256
        self._source = uuid4().hex, path, text, config

    def _read(self, name: str) -> RemoteStatistics:
        cluster, statistics = self._cluster, self._cluster.start(_read, *self._source, name)

        def encode(
            name: str, rows: np.ndarray, scheme: RowEncoder, ids: np.ndarray | None
        ) -> Parts:
            return dict(cluster.result(cluster.start(scheme.encode, name, rows, statistics, ids)))

        return RemoteStatistics(encode)


def encoder_statistics(
    calibration: Calibration, config: GriffinConfig, cluster: Cluster | None
) -> StatisticsOf:
    """Returns what encoders take of a calibration; the workers of a cluster quantize by it."""
    if cluster is None:
        return Calibrated(calibration, config)
    return SpreadStatistics(cluster, calibration, config)


# The jobs. A worker caches for one run of a command, because files may change between them: `run`
# differs between commands.


def _read(run: str, path: Path, text: str, config: GriffinConfig, name: str) -> Statistics | None:
    statistics = _calibrated(run, path, text, config)(name)
    if isinstance(statistics, Statistics):
        statistics.factor()
        return statistics
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


_Model = tuple[str, Path, Path | None, GriffinConfig, str]
"""The run, the paths of a model and its adapter, its shape, and the device."""


def _forward(model: _Model, index: int, x: np.ndarray, threads: int) -> tuple[Any, Any]:
    import torch

    from rgexport.planning.layer_pass import run_layer

    torch.set_num_threads(threads)
    reference = _reference(model, index)
    return next(run_layer(reference, index, [torch.from_numpy(x).to(reference.device)]))


@lru_cache(maxsize=1)
def _reference(model: _Model, index: int) -> Any:
    """Opens a model anew for each layer, so that it keeps the weights of one alone."""
    from rgexport.griffin.reference import Reference

    _, path, adapter, config, device = model
    try:
        checkpoint = open_checkpoint(path, adapter=adapter)
    except RequestError as error:
        raise RequestError(
            f"a worker of the cluster cannot open the model: {error}; put it where all workers see "
            "it under the same path"
        ) from None
    return Reference(config, checkpoint.weights, device=device, keep=True)
