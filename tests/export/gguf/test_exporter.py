"""From a checkpoint to a GGUF file: every shape, every type, and llama-quantize's own bytes."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from rgexport.artifacts.gguf import integrity
from rgexport.artifacts.gguf.format import ALGORITHMS_KEY, GgufArtifact, open_gguf
from rgexport.artifacts.gguf.naming import file_tensors
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.quantize.algorithms.statistics import Statistics
from rgexport.quantize.gguf_header import read_header
from rgexport.quantize.schemes.ggml_types import FILE_TYPES, TYPES
from tests.artifacts import export_random_gguf, require_ggml
from tests.llama_tools import llama_quantize, needs_llama_cpp, run_tool
from tests.models import ODD_CONFIGS, make_config, random_weights
from tests.models import write_hugging_face as write_model
from tests.quantize.ggml_files import write_imatrix
from tests.quantize.test_algorithms import statistics

QUANTIZED = [
    row.name
    for word, row in FILE_TYPES.items()
    if TYPES[row.default].is_quantized and word == row.name
]
BY_IMPORTANCES = [kind for kind in QUANTIZED if kind.startswith("iq2")] + ["iq3_xxs", "iq3_xs"]
"""These need an importance matrix, or statistics."""
WITHOUT_IMPORTANCES = [kind for kind in QUANTIZED if kind not in BY_IMPORTANCES]
ERROR = {"f32": 0, "bf16": 3e-3, "f16": 3e-4, "q8_0": 0.01, "q6_k": 0.03, "q5_k": 0.06}
ERROR |= {"q5_1": 0.06, "q5_0": 0.07, "q4_k": 0.11, "q4_1": 0.11, "q4_0": 0.13, "q3_k": 0.25}
ERROR |= {"q2_k": 0.45, "iq4_nl": 0.11, "iq4_xs": 0.11, "iq3_s": 0.25}
"""Type → ‖W−Ŵ‖/‖W‖, at most, of any tensor."""
K_QUANTS = make_config("rrar", width=256, heads=2, mlp_width=512, vocab_size=300)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "q4_k_m") for name in ODD_CONFIGS]
    + [("k_quants", kind) for kind in ("f16", "bf16", *WITHOUT_IMPORTANCES)],
)
def test_every_shape_and_type(name, kind, tmp_path):
    if kind in QUANTIZED:
        require_ggml()
    config = ODD_CONFIGS.get(name, K_QUANTS)
    artifact, weights = export_random_gguf(config, tmp_path, kind)
    assert artifact.manifest.precision == kind
    tensors, plan = file_tensors(config), artifact.manifest.plan
    for name, original in weights.items():
        restored, type = artifact.tensor(name).whole(), plan[name].type
        assert restored.shape == original.shape and restored.dtype == np.float32
        error = np.linalg.norm(restored - original) / np.linalg.norm(original)
        assert error <= ERROR[type] + 2e-7, f"{name} as {type}: {error}"
    assert all(plan[t.canonical].type == "f32" or t.quantizable for t in tensors)
    names = [tensor.name for tensor in GGUFReader(artifact.path).tensors]
    assert names == [tensor.name for tensor in tensors]


def without_hashes_of_data(path: Path) -> bytes:
    """The file without what must differ where data or types do."""
    header, data = read_header(path), bytearray(path.read_bytes())
    for key in (integrity.DATA, integrity.TYPES):
        end = header.spans[key][1]
        data[end - 64 : end] = bytes(64)
    return bytes(data)


@needs_llama_cpp
@pytest.mark.parametrize("pure", [False, True], ids=["mixed", "pure"])
@pytest.mark.parametrize("kind", ["f16", "bf16", *WITHOUT_IMPORTANCES])
@pytest.mark.parametrize("name", ["k_quants", *ODD_CONFIGS])
def test_bytes_are_those_of_llama_quantize(name, kind, pure, tmp_path):
    require_ggml()
    config = ODD_CONFIGS.get(name, K_QUANTS)
    full = export_random_gguf(config, tmp_path)[0].path
    asked = {"pure": True} if pure and kind not in ("f16", "bf16", "q8_0") else {}
    ours = export_random_gguf(config, tmp_path, kind, **asked)[0]
    theirs = tmp_path / "theirs.gguf"
    llama_quantize(full, theirs, kind, pure=pure)
    assert without_hashes_of_data(theirs) == without_hashes_of_data(ours.path)
    again = open_gguf(theirs)
    assert again.manifest.plan == ours.manifest.plan
    assert again.manifest.precision == ours.manifest.precision
    assert not again.facts()["gguf"]["data_hash"]


def test_command_line(tmp_path, monkeypatch, capsys):
    require_ggml()
    monkeypatch.chdir(tmp_path)
    config = ODD_CONFIGS["regular"]
    write_model(config, random_weights(config), Path("mine"))
    assert run(["gguf", "-m", "mine", "--type", "q5_1", "--no-check"]) == 0
    captured, name = capsys.readouterr(), "mine-Q5_1.gguf"
    assert captured.out.startswith(f"{name} is complete (") and captured.out.count("\n") == 1
    assert "`rgexport llama-cpp build`" in captured.out and "LM Studio do not" in captured.out
    assert captured.out.endswith(f"rgexport generate {name} --ids 2\n")
    assert "Warning: mine has no tokenizer" in captured.err
    assert run(["gguf", "-m", "mine", "-o", name]) == 2
    assert f"{name} exists; pass --force" in capsys.readouterr().err
    assert run(["inspect", name, "--json"]) == 0
    Path("plan.json").write_text(capsys.readouterr().out)
    assert run(["gguf", "-m", "mine", "--plan", "plan.json", "-o", "two.gguf", "--no-check"]) == 0
    assert Path(name).read_bytes() == Path("two.gguf").read_bytes()


@pytest.fixture
def imatrix(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    tensors = (tensor for tensor in file_tensors(K_QUANTS) if tensor.quantizable)
    shapes = {tensor.name: tensor.shape[-1] for tensor in tensors}
    entries = {n: generator.uniform(0.01, 9, k).astype(np.float32) for n, k in shapes.items()}
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, entries)
    return path


def test_importances_reach_the_quantizer(imatrix, tmp_path):
    require_ggml()
    plain = export_random_gguf(K_QUANTS, tmp_path, "q4_k_m")[0]
    weighted = export_random_gguf(K_QUANTS, tmp_path, "q4_k_m", imatrix=imatrix)[0]
    assert weighted.manifest.weighted and not plain.manifest.weighted
    assert weighted.header.values["quantize.imatrix.file"] == str(imatrix)[:127]
    assert list(weighted.header.values)[-1].startswith("quantize.imatrix.")
    assert ALGORITHMS_KEY not in plain.header.values
    name = "layers.0.mlp_block.up_proj.weight"
    assert not np.array_equal(weighted.tensor(name).whole(), plain.tensor(name).whole())
    # The metadata's hash does not cover what is said of the matrix.
    assert len({file.header.values[integrity.METADATA] for file in (weighted, plain)}) == 1


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m", "q2_k", "iq4_nl", "iq3_m", *BY_IMPORTANCES])
def test_importances_are_used_as_llama_quantize_does(kind, imatrix, tmp_path, llama_tools):
    require_ggml()
    full = export_random_gguf(K_QUANTS, tmp_path)[0].path
    ours = export_random_gguf(K_QUANTS, tmp_path, kind, imatrix=imatrix)[0].path
    theirs = tmp_path / "theirs.gguf"
    run_tool(llama_tools / "llama-quantize", "--imatrix", imatrix, full, theirs, kind.upper())
    assert without_hashes_of_data(theirs) == without_hashes_of_data(ours)


CALIBRATED = make_config("ra", width=256, heads=2, mlp_width=256, vocab_size=64)
SHAPES = {t.canonical: t.shape for t in file_tensors(CALIBRATED) if t.quantizable}


@functools.cache
def known(name: str) -> Statistics:
    """Statistics of random inputs of a matrix of `CALIBRATED` that go together."""
    return statistics(SHAPES[name][-1])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> GgufArtifact:
    """Random weights in q4_k_m, with levels by GPTQ."""
    require_ggml()
    folder = tmp_path_factory.mktemp("calibrated")
    write_model(CALIBRATED, random_weights(CALIBRATED), folder / "model")
    options = GgufOptions(type="q4_k_m", algorithm="gptq")
    checkpoint, target = open_checkpoint(folder / "model"), folder / "calibrated.gguf"
    return open_gguf(export_gguf(checkpoint, options, target, statistics=known))


def test_statistics_reach_the_algorithm_which_the_file_names(calibrated, tmp_path, capsys):
    plain, weights = export_random_gguf(CALIBRATED, tmp_path, "q4_k_m")
    for name, scheme in calibrated.manifest.plan.items():
        levels, expected = (artifact.tensor(name).whole() for artifact in (calibrated, plain))
        if TYPES[scheme.type].is_quantized:
            (part,) = known(name).hessians
            off = np.stack([levels, expected]) - weights[name]
            ours, theirs = np.einsum("tri,ij,trj->t", off, part.matrix, off, optimize=True)
            assert ours < 0.9 * theirs, name
            assert scheme.algorithm == "gptq"
        else:
            np.testing.assert_array_equal(levels, expected)
    stated = json.loads(calibrated.header.values[ALGORITHMS_KEY])
    quantized = {tensor.name for tensor in file_tensors(CALIBRATED) if tensor.quantizable}
    assert stated == dict.fromkeys(quantized, "gptq") and calibrated.manifest.weighted
    assert run(["inspect", str(calibrated.path)]) == 0
    assert re.search(r"algorithms +gptq", capsys.readouterr().out)


def test_a_plan_by_gptq_takes_statistics_and_slabs_make_no_difference(
    calibrated, tmp_path, monkeypatch
):
    monkeypatch.setattr("rgexport.export.storage.SLAB_BYTES", 5000)
    model = open_checkpoint(calibrated.path.parent / "model")
    options = GgufOptions(plan=calibrated.manifest.plan)
    with pytest.raises(RequestError, match=r"gptq needs statistics .* --calibration FILE"):
        export_gguf(model, options, tmp_path / "none.gguf")
    assert not [*tmp_path.iterdir()]
    again = export_gguf(model, options, tmp_path / "plan.gguf", statistics=known)
    assert again.read_bytes() == calibrated.path.read_bytes()


def test_inspect_describes_the_file(demo_gguf, capsys):
    assert run(["inspect", str(demo_gguf.path), "--verify"]) == 0
    shown = capsys.readouterr().out
    for words in ("demo: gguf artifact, f16 weights", "bits per weight", "recurrentgemma", "8192"):
        assert words in shown
    assert "rgexport llama-cpp build" in shown and "All hashes were verified." in shown
    assert run(["inspect", str(demo_gguf.path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokenizer"]["pieces"] == 8192 and facts["tokenizer"]["chat_template"] is True
    assert 16 < facts["bits_per_weight"] < 17
    assert sum(share["weights"] for share in facts["stored"]) == facts["parameters"]
