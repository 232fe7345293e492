"""Models of odd shapes, and statistics of them on given sequences."""

from rgexport.files.targets import COMPLETE
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.planning.calibrate import CalibrationOptions, collect
from rgexport.planning.calibration_folder import CalibrationFolder
from rgexport.quantize.algorithms.calibration_file import open_calibration
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face


def checkpoint_of(name, folder, seed=0):
    config = ODD_CONFIGS[name]
    return open_checkpoint(write_hugging_face(config, random_weights(config, seed), folder))


def collected(checkpoint, text, folder, *, gradients=10**6):
    options = CalibrationOptions(gradient_tokens=gradients, device="cpu")
    options = options.for_model(checkpoint.config, readable=False)
    work = CalibrationFolder.open(folder, {}, force=False)
    text, nothing = text.without_last(0)
    collect(work, checkpoint, text, nothing, options, require_sound(checkpoint))
    return open_calibration(folder / COMPLETE)
