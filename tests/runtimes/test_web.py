"""The same file in stock onnxruntime-web, in Node: nothing registered, nothing converted."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rgexport.runtimes.ort import OrtSession
from tests.artifacts import export_random
from tests.models import ODD_CONFIGS

WEB = Path(__file__).parents[1] / "web"
SHARE = 1e-3
"""Largest |Δlogit| allowed, as a share of the largest |logit|."""


@pytest.fixture(scope="module")
def node() -> str:
    program, npm = shutil.which("node"), shutil.which("npm")
    if not program or not npm:
        pytest.skip("Node and npm are not installed")
    if not (WEB / "node_modules").exists():
        command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock"]
        try:
            subprocess.run(command, cwd=WEB, capture_output=True, check=True, timeout=300)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            shutil.rmtree(WEB / "node_modules", ignore_errors=True)
            said = (error.stderr or b"").decode(errors="replace").strip()
            pytest.skip(f"onnxruntime-web cannot be installed: {said[:200] or error}")
    return program


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_runs_in_onnxruntime_web(node: str, precision: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS["narrow_lru"]
    exact = {"exact": True} if precision.startswith("int") else {}
    artifact, _ = export_random(config, tmp_path, precision, **exact)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, 2 * config.window + 9)
    chunks = np.split(tokens, [1, 2, config.window + 4])
    session = OrtSession(artifact)
    expected = np.concatenate([session.prefill(chunk[None])[0] for chunk in chunks])

    asked = [node, "run.mjs", str(artifact.path), json.dumps([c.tolist() for c in chunks])]
    done = subprocess.run(asked, cwd=WEB, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert np.abs(found - expected).max() <= SHARE * np.abs(expected).max()
