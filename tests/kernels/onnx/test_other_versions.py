"""A file with our functions in other releases of stock ONNX Runtime, with and without our library.

The releases are installed into `out/`, each into its own folder; without a network the tests skip.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rgexport.cli import run as rgexport
from rgexport.kernels.onnx import library
from tests.built import one_at_a_time
from tests.command_line import ROOT
from tests.sessions import distance

pytestmark = pytest.mark.nightly
VERSIONS = ["1.23.0", "1.27.0"]
"""The oldest that pyproject.toml allows, and one between it and the newest."""
CHUNKS = 1, 40, 3, 1
CLOSE = 1e-3
FIRST = 4
"""Tokens of the demo before any code is rounded the other way."""

PROGRAM = f"""
import json, sys
import numpy as np
import onnxruntime as ort
from rgexport.export.opening import open_artifact
from rgexport.kernels.onnx.library import calls
from rgexport.runtimes.onnx.session import OrtSession
session = OrtSession(open_artifact(sys.argv[1]), threads=2)
tokens = np.random.default_rng(8).integers(0, session.vocab_size, (1, sum({CHUNKS})))
logits, start = [], 0
for size in {CHUNKS}:
    logits.append(session.prefill(tokens[:, start : start + size], size))
    start += size
np.save(sys.argv[2], np.concatenate(logits, 1))
print(json.dumps([ort.__version__, sum(calls().values())]))
"""


def installed(version: str) -> Path:
    """The folder of a release, which pip fills if it is not there."""
    folder = ROOT / "out" / f"ort-{version}"
    with one_at_a_time(folder.name):
        if not (folder / "onnxruntime").is_dir():
            _install(version, folder)
    return folder


def _install(version: str, folder: Path) -> None:
    new = folder.with_name(f"{folder.name}.{os.getpid()}")
    asked = ["install", "-q", "--no-deps", "--target", str(new), f"onnxruntime=={version}"]
    done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(new, ignore_errors=True)
        pytest.skip(f"onnxruntime {version} cannot be installed: {done.stderr.strip()[-200:]}")
    new.rename(folder)


def run(artifact: Path, result: Path, native: bool, folder: Path | None) -> tuple[str, int]:
    """Logits into a file; returns the version that ran, and how often our kernels did."""
    paths = [str(p) for p in (folder, ROOT) if p is not None]
    more = {"PYTHONPATH": os.pathsep.join(paths), library.NO_NATIVE: "" if native else "1"}
    command = [sys.executable, "-c", PROGRAM, str(artifact), str(result)]
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    version, calls = json.loads(done.stdout.splitlines()[-1])
    return version, calls


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """The demo in int4 with float32 activations, and its logits by the current release."""
    folder = tmp_path_factory.mktemp("exact")
    command = ["onnx", "--size", "demo", "--int4", "--exact", "-o", str(folder / "demo")]
    assert rgexport(command) == 0
    return folder / "demo", logits_of(folder / "demo", folder)


@pytest.fixture(scope="module")
def rounding(demo_artifact, tmp_path_factory) -> dict[bool, np.ndarray]:
    """The demo with int8 activations: likewise, and by our kernels, which have two digits."""
    folder, there = tmp_path_factory.mktemp("int4"), [False, *[True] * bool(library.kernels().ops)]
    return {native: logits_of(demo_artifact, folder, native) for native in there}


def logits_of(artifact: Path, folder: Path, native: bool = False) -> np.ndarray:
    """By the current release, with its own kernels or ours."""
    _, calls = run(artifact, folder / "now.npy", native, None)
    assert (calls > 0) == native
    return np.load(folder / "now.npy")


@pytest.fixture(params=[False, True], ids=["stock", "native"])
def native(request) -> bool:
    if request.param and not library.kernels().ops:
        pytest.skip(library.kernels().reason)
    return request.param


@pytest.fixture(params=VERSIONS)
def then(request, native, tmp_path):
    """Logits of an artifact by another release; none of its files may change."""

    def logits(artifact: Path) -> np.ndarray:
        before = {p.name: p.stat().st_mtime_ns for p in artifact.iterdir()}
        version, calls = run(artifact, tmp_path / "then.npy", native, installed(request.param))
        assert version == request.param
        assert (calls > 0) == native
        assert {p.name: p.stat().st_mtime_ns for p in artifact.iterdir()} == before
        return np.load(tmp_path / "then.npy")

    return logits


def test_float32_activations(then, exact):
    artifact, now = exact
    assert distance(then(artifact), now) < CLOSE


def test_int8_activations(then, native, demo_artifact, rounding, exact):
    """Until a code is rounded the other way, which one bit of a float32 sum decides, all is equal.

    After that, two releases are as far from each other as from the exact result. So over a longer
    text we ask for the distance from that.
    """
    now = rounding[native]
    found = then(demo_artifact)
    assert distance(found[:, :FIRST], now[:, :FIRST]) < CLOSE
    allowed = np.sqrt(np.mean((now - exact[1]) ** 2))
    assert np.sqrt(np.mean((found - exact[1]) ** 2)) < 1.5 * allowed


def test_the_oldest_release_is_the_one_that_is_required():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"onnxruntime>={VERSIONS[0].rsplit(".", 1)[0]},' in project
