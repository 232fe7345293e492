"""What `--quality` and `--calibration` mean for an export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rgexport.compress.calibrate import SUFFIX, CalibrationOptions, calibrate
from rgexport.compress.cluster import spread_statistics
from rgexport.files.hashing import hash_new_files
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.progress import group, note
from rgexport.quantize.calibration import Calibration, open_calibration
from rgexport.quantize.statistics import Calibrated, StatisticsOf
from rgexport.runtimes.cluster import Cluster, connected


@contextmanager
def known_statistics(
    checkpoint: Checkpoint, file: Path | None, cluster: str | None = None
) -> Iterator[StatisticsOf]:
    """The statistics in a calibration file; without one, those of `./MODEL.calibration`.

    Where that is not there, it is made: that takes minutes, and an interrupted run goes on. With
    the address of a cluster, its workers do what needs statistics.

    Raises:
        RequestError: the file cannot be read, or is of another model; see `connected`.
    """
    with connected(cluster) as workers:
        found = _calibration(checkpoint, file, workers)
        if workers is None:
            yield Calibrated(found, checkpoint.config)
        else:
            yield spread_statistics(workers, found, checkpoint.config)


def _calibration(checkpoint: Checkpoint, file: Path | None, workers: Cluster | None) -> Calibration:
    if file is None:
        file = Path(f"{checkpoint.name}{SUFFIX}")
        if file.exists():
            note(f"Taking the calibration {file}")
        else:
            with group("Calibration"):
                calibrate(checkpoint, CalibrationOptions(), file, workers=workers)
    found = open_calibration(file)
    found.require_for(hash_new_files(checkpoint.weight_files.values()).values())
    return found
