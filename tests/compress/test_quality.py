"""`--quality` and `--calibration`, from the command line to the weights in the file."""

import numpy as np
import pytest

from rgexport.compress.calibrate import CalibrationOptions, calibrate
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import QUANTIZABLE, role_of
from rgexport.quantize.calibration import open_calibration
from tests.command_line import rgexport
from tests.models import ODD_CONFIGS, make_config, random_weights, write_hugging_face

CONFIG = make_config("rra", width=96, heads=4, lru_width=64, mlp_width=160)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "odd"
    return write_hugging_face(CONFIG, random_weights(CONFIG), folder)


@pytest.fixture(scope="module")
def calibration(model):
    options = CalibrationOptions(tokens=256, gradient_tokens=64)
    return calibrate(open_checkpoint(str(model)), options, model.parent / "odd.calibration")


def loss(artifact, calibration, weights) -> float:
    """Σ tr(ΔW H ΔWᵀ) over all matrices, H as it was measured."""
    total = 0.0
    for name, tensor in open_artifact(artifact).weights.items():
        if role_of(name) not in QUANTIZABLE:
            continue
        off = (tensor.whole() - weights[name]).astype(np.float64)
        start = 0
        for block in calibration.hessian(name):
            part = off[:, start : start + len(block)]
            total += np.einsum("nk,kl,nl->", part, block.astype(np.float64), part)
            start += len(block)
        assert start == off.shape[1]
    return total


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        ("onnx", "--int4"),
        ("coreml", "--precision", "pal4"),
        ("gguf", "--type", "q4_0", "--pure"),
    ],
    ids=" ".join,
)
def test_better_quality_has_less_loss(words, model, calibration, tmp_path):
    known, weights = open_calibration(calibration), random_weights(CONFIG)
    losses = []
    for quality in ("fast", "default", "best"):
        target = tmp_path / f"{quality}{'.gguf' if words[0] == 'gguf' else ''}"
        given = ["--calibration", calibration] if quality == "best" else []
        done = rgexport(
            *words,
            "--no-check",
            "-m",
            model,
            "--quality",
            quality,
            *given,
            "-o",
            target,
            folder=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        losses.append(loss(target, known, weights))
    fast, default, best = losses
    assert default <= fast * 1.001
    assert best < 0.95 * default


@pytest.mark.full
def test_best_makes_a_calibration_and_takes_it_again(model, tmp_path):
    words = ("onnx", "-m", model, "--int4", "--quality", "best", "--no-check", "--force")
    first = rgexport(*words, folder=tmp_path)
    assert first.returncode == 0 and (tmp_path / "odd.calibration").is_file(), first.stderr
    data = (tmp_path / "odd-int4-onnx/model.onnx.data").read_bytes()
    second = rgexport(*words, folder=tmp_path)
    assert second.returncode == 0 and "Taking the calibration odd.calibration" in second.stderr
    assert (tmp_path / "odd-int4-onnx/model.onnx.data").read_bytes() == data


def test_a_calibration_of_another_model_is_refused(calibration, tmp_path):
    config = ODD_CONFIGS["regular"]
    other = write_hugging_face(config, random_weights(config), tmp_path / "other")
    target = tmp_path / "out"
    done = rgexport(
        *("onnx", "-m", other, "--int4", "--calibration", calibration, "-o", target),
        folder=tmp_path,
    )
    assert done.returncode == 2 and "was made from other weights" in done.stderr
    assert not target.exists()
