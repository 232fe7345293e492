"""The patch that docs/development proposes for llama.cpp's own converter, beside our exporter."""

import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGUFReader

from rgexport.griffin.checkpoint import demo_folder
from rgexport.kernels.llama_cpp import build
from tests.artifacts import export_random_gguf
from tests.command_line import ROOT
from tests.models import ODD_CONFIGS

PATCH = ROOT / "docs" / "development" / "llama-cpp" / "conversion.patch"
NEEDED = "conversion/", "gguf-py/", "convert_hf_to_gguf.py"
NAMES = {"general.architecture", "general.file_type", "general.quantization_version"}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def converter(archive, tmp_path_factory):
    """`convert_hf_to_gguf.py` with the patch."""
    pytest.importorskip("transformers")
    folder, root = tmp_path_factory.mktemp("llama.cpp"), f"{build.ROOT}/{build.LLAMA_CPP}/"
    with tarfile.open(archive) as tree:
        for member in tree:
            inner = member.name.removeprefix(root)
            if inner.startswith(NEEDED) and (file := tree.extractfile(member)):
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                (folder / inner).write_bytes(file.read())
    command = ["git", "apply", "--unsafe-paths", f"--directory={folder}", str(PATCH)]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "convert_hf_to_gguf.py"


def contents(path):
    """The sizes and the tensors of a GGUF file."""
    reader = GGUFReader(path)
    names = [n for n in reader.fields if n in NAMES or n.startswith("recurrentgemma.")]
    sizes = {name: reader.fields[name].contents() for name in names}
    return sizes, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize(
    ("name", "kind"), [("wide_lru", "f32"), ("one_head", "f16"), ("attention_tail", "f32")]
)
def test_it_writes_what_we_write(converter, tmp_path, name, kind):
    """But for what is in the metadata about the vocabulary and the file."""
    config = replace(ODD_CONFIGS[name], vocab_size=8192)
    ours, _ = export_random_gguf(config, tmp_path, kind)
    shutil.copy(demo_folder() / "tokenizer.model", tmp_path / "model")
    target = tmp_path / "theirs.gguf"
    command = [sys.executable, str(converter), str(tmp_path / "model"), "--outtype", kind]
    command += ["--outfile", str(target), "--model-name", "model"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (sizes, theirs), (our_sizes, our_tensors) = contents(target), contents(ours.path)
    assert sizes == our_sizes and theirs.keys() == our_tensors.keys()
    for name, tensor in our_tensors.items():
        other = theirs[name]
        assert other.tensor_type == tensor.tensor_type, name
        # ggml does not count dimensions of 1 at the end.
        dims = (np.trim_zeros(t.shape.astype(int) - 1, "b") for t in (other, tensor))
        assert np.array_equal(*dims), name
        values = other.data.reshape(tensor.data.shape)
        assert np.allclose(values, tensor.data, rtol=2e-7, atol=0), name
