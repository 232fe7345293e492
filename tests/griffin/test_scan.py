"""The recurrence, in torch operations and as a Triton kernel."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rgexport.griffin import scan
from rgexport.griffin.scan import chunked_scan, linear_scan
from tests.griffin.scans import LENGTHS, scan_error, scan_inputs

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def limit(tokens: int) -> float:
    return 1e-6 * tokens**0.5


@pytest.mark.parametrize("tokens", LENGTHS)
def test_scan_equals_a_loop(tokens):
    inputs = scan_inputs(tokens)
    assert scan_error(linear_scan(*inputs), *inputs) <= limit(tokens)


@needs_cuda
@pytest.mark.parametrize("tokens", LENGTHS)
def test_cuda_scans_equal_a_loop(tokens):
    """The channels are no multiple of a tile; `linear_scan` takes the kernel if there is Triton."""
    inputs = scan_inputs(tokens, channels=45)
    on_gpu = [tensor.cuda() for tensor in inputs]
    for found in (linear_scan(*on_gpu), chunked_scan(*on_gpu)):
        assert scan_error(found.cpu(), *inputs) <= limit(tokens)
    assert (scan._triton_scan() is not None) == (find_spec("triton") is not None)


def test_without_triton_torch_operations_are_used(monkeypatch, capsys):
    """There is no GPU here, or the package is hidden."""
    if torch.cuda.is_available():
        monkeypatch.setitem(sys.modules, "rgexport.griffin.triton_scan", None)
    scan._triton_scan.cache_clear()
    monkeypatch.setattr("rgexport.progress.verbose", True)
    assert scan._triton_scan() is None
    assert "the scan runs without Triton" in capsys.readouterr().err
    scan._triton_scan.cache_clear()


INTERPRETED = """
from rgexport.griffin.triton_scan import scan
from tests.griffin.scans import scan_error, scan_inputs

for tokens in 1, 15, 64, 65, 130:
    inputs = scan_inputs(tokens, channels=45)
    error = scan_error(scan(*inputs), *inputs)
    assert error <= 1e-6 * tokens ** 0.5, (tokens, error)
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from rgexport.griffin import triton_scan

names = "a", "b", "h0", "h"
signature = dict.fromkeys(names, "*fp32") | dict.fromkeys(("tokens", "channels"), "i32")
sizes = {"TOKENS": triton_scan._TOKENS, "CHANNELS": triton_scan._CHANNELS}
signature |= dict.fromkeys(sizes, "constexpr")
for capability in 75, 80, 90:
    source = ASTSource(triton_scan._scan, signature=signature, constexprs=sizes)
    assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


@needs_triton
@pytest.mark.parametrize(("program", "interpret"), [(INTERPRETED, "1"), (COMPILED, "0")])
def test_triton_kernel_without_a_gpu(program, interpret, tmp_path):
    """Triton's interpreter runs it, and its compiler makes machine code for several GPUs."""
    own = {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=os.environ | own,
        check=True,
    )
