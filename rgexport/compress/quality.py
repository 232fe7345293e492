"""What `--quality` and `--calibration` mean for an export."""

from pathlib import Path

from rgexport.compress.calibrate import SUFFIX, CalibrationOptions, calibrate
from rgexport.export.verified import hash_new_files
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.progress import group, note
from rgexport.quantize.calibration import open_calibration
from rgexport.quantize.statistics import Calibrated, StatisticsOf


def known_statistics(checkpoint: Checkpoint, file: Path | None) -> StatisticsOf:
    """The statistics in a calibration file; without one, those of `./MODEL.calibration`.

    Where that is not there, it is made: that takes minutes, and an interrupted run goes on.

    Raises:
        RequestError: the file cannot be read, or is of another model.
    """
    if file is None:
        file = Path(f"{checkpoint.name}{SUFFIX}")
        if file.exists():
            note(f"Taking the calibration {file}")
        else:
            with group("Calibration"):
                calibrate(checkpoint, CalibrationOptions(), file)
    found = open_calibration(file)
    found.require_for(hash_new_files(checkpoint.weight_files).values())
    return Calibrated(found, checkpoint.config)
