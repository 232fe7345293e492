"""The patch that docs/development proposes for llama.cpp's own converter, beside our exporter."""

import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.griffin.checkpoint import demo_folder
from rgexport.kernels.llama_cpp import sources
from tests.artifacts import export_random_gguf
from tests.command_line import ROOT
from tests.models import ODD_CONFIGS

PATCH = ROOT / "docs" / "development" / "llama-cpp" / "conversion.patch"
NEEDED = "conversion/", "gguf-py/", "convert_hf_to_gguf.py"
NAMES = {"general.architecture", "general.file_type", "general.quantization_version"}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def converter(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`convert_hf_to_gguf.py` with the patch."""
    pytest.importorskip("transformers")
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    folder = tmp_path_factory.mktemp("llama.cpp")
    root = f"{sources.ROOT}/{sources.LLAMA_CPP}/"
    with tarfile.open(archive) as tree:
        for member in tree:
            inner = member.name.removeprefix(root)
            if inner.startswith(NEEDED) and (file := tree.extractfile(member)):
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                (folder / inner).write_bytes(file.read())
    command = ["git", "apply", "--unsafe-paths", f"--directory={folder}", str(PATCH)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "convert_hf_to_gguf.py"


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sizes and the tensors of a GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    sizes = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name in NAMES or name.startswith("recurrentgemma.")
    }
    return sizes, {tensor.name: tensor for tensor in reader.tensors}


def dims(shape: np.ndarray) -> list[int]:
    """Without those of 1 at the end, which ggml does not count."""
    return np.trim_zeros(shape.astype(int) - 1, "b").tolist()


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("name", ["wide_lru", "one_head", "attention_tail"])
def test_it_writes_what_we_write(converter: Path, tmp_path: Path, name: str, kind: str) -> None:
    """But for what is in the metadata about the vocabulary and the file."""
    config = replace(ODD_CONFIGS[name], vocab_size=8192)
    ours, _ = export_random_gguf(config, tmp_path, kind)
    shutil.copy(demo_folder() / "tokenizer.model", tmp_path / "model")
    target = tmp_path / "theirs.gguf"
    command = [sys.executable, str(converter), str(tmp_path / "model"), "--outtype", kind]
    command += ["--outfile", str(target), "--model-name", "model"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (sizes, tensors), (own_sizes, own_tensors) = contents(target), contents(ours.path)
    assert sizes == own_sizes
    assert tensors.keys() == own_tensors.keys()
    for tensor, own in own_tensors.items():
        found = tensors[tensor]
        assert found.tensor_type == own.tensor_type, tensor
        assert dims(found.shape) == dims(own.shape), tensor
        assert np.allclose(found.data.reshape(own.data.shape), own.data, rtol=2e-7, atol=0), tensor
