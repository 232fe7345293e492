"""What users ask for, what they are told to do next, and what the model card says."""

import dataclasses
import math
import os
from pathlib import Path, PureWindowsPath

import pytest

from rgexport.artifacts import card as module
from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.card import algorithms, levels_sentence, shares
from rgexport.artifacts.describe import as_text, describe
from rgexport.artifacts.hub import is_hub_name, parse
from rgexport.artifacts.manifest import CARD, NOT_ASKED_FOR, CheckRecord, skipped
from rgexport.artifacts.opening import as_argument, check_line, closing_line
from rgexport.artifacts.origin import Origin, origin_of_card
from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.request import algorithm_word
from rgexport.files.hashing import FileRecord
from rgexport.files.targets import require_free_disk
from rgexport.quantize.schemes.registry import Affine
from tests.artifacts import export_random_coreml, export_random_gguf
from tests.files import windows_rules
from tests.models import ODD_CONFIGS


def test_options_that_are_refused():
    with pytest.raises(RequestError, match=r"--quality fast takes no calibration; .* best"):
        algorithm_word("fast", "file", None)
    with pytest.raises(RequestError, match="--quality is 'better'; expected one of fast, default"):
        algorithm_word("better", None, None)
    assert algorithm_word(None, "file", None) == "gptq"
    assert algorithm_word(None, "file", "plan") is None


def test_check_line(made):
    def line(record: CheckRecord) -> str | None:
        return check_line(Artifact(Path("out"), dataclasses.replace(made.manifest, check=record)))

    assert line(NOT_ASKED_FOR) is None
    # A manifest may be from anybody: its texts are shown on one line.
    later = "Do it later: rgexport validate out"
    assert line(skipped("a\x1bb\nc")) == f"Not checked: a\\u001bb\\nc. {later}"
    unverified = "Checked: unverified, since so. Look closer: rgexport validate out"
    assert line(CheckRecord(status="unverified", reason="so")) == unverified
    verified = CheckRecord(
        **{"status": "verified", "tokens": 130, "positions": 3, "kl": 0.01234, "engine": "toy 1"},
        **{"kl_standard_error": 0.00123, "relative_max": 0.004},
    )
    assert line(verified) == (
        "Checked on 130 tokens (3 compared) in toy 1: KL to the original 0.0123 ± 0.001 nats; "
        "largest difference to the dequantized reference 0.4 % of the largest logit: verified."
    )


TOKENIZER = {"tokenizer.model": FileRecord("0" * 64, 1)}
NO_TOKENIZER = "It has no tokenizer; try: rgexport generate out --ids 2"


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({}, NO_TOKENIZER),
        ({"files": TOKENIZER, "instruction_tuned": True}, "Chat with it: rgexport chat out"),
        ({"files": TOKENIZER}, 'Try: rgexport generate out -p "The meaning of life is"'),
        ({"kind": "coreml"}, f"Xcode project. {NO_TOKENIZER}"),
        ({"files": TOKENIZER, "name": "recurrentgemma-9b"}, "to chat, export --size 9b-it)"),
    ],
)
def test_closing_line(made, change, advice, monkeypatch):
    manifest = dataclasses.replace(made.manifest, **change)
    monkeypatch.setattr(Artifact, "nbytes", 9_000_000)
    line = closing_line(Artifact(Path("out"), manifest))
    assert line.startswith("out is complete (") and line.endswith(advice)


def test_paths_can_be_pasted(made, monkeypatch):
    monkeypatch.setattr(Artifact, "nbytes", 9_000_000)
    words = {"out": "out", "/a b/c": "'/a b/c'", "-my out": "'./-my out'", "$HOME": "'$HOME'"}
    for path, typed in words.items():
        line = closing_line(Artifact(Path(path), made.manifest))
        assert line.endswith(f"rgexport generate {typed} --ids 2")


def test_paths_and_names_of_the_hub_on_windows(monkeypatch):
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        quoted = as_argument(PureWindowsPath("C:\\my models\\out"))
    assert quoted == '"C:\\my models\\out"'
    path = PureWindowsPath("hf:a/b/c/d.gguf@v1")
    assert is_hub_name(path) and parse(path) == parse("hf:a/b/c/d.gguf@v1")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(RequestError, match=r"cannot write .*: there is no drive"):
        require_free_disk(Path("out"), 1)


@pytest.mark.full
@pytest.mark.parametrize(
    "options", [["onnx", "--int4"], ["gguf", "--type", "f32"], ["coreml", "--precision", "fp16"]]
)
def test_windows_lets_every_format_be_exported_checked_and_replaced(options, tmp_path, monkeypatch):
    """Nothing of the new folder is open when it is renamed."""
    windows_rules.apply(monkeypatch)
    target = tmp_path / "models" / "out"
    target.parent.mkdir()
    for more in ([], ["--force"]):
        assert run([*options, "--size", "demo", "-o", str(target), *more]) == 0
    assert os.listdir(target.parent) == ["out"]


UNKNOWN = Origin(None, None)


def card(manifest) -> str:
    return module.card(manifest, UNKNOWN)


def test_card_says_what_it_is(made):
    text = card(made.manifest)
    assert "# model: int4 for ONNX Runtime\n" in text
    assert "| linear | int4/32 asym | 10,368 | 9.02 kB | 6.96 |" in text
    assert "Gemma Terms of Use" in text and "{" not in text
    assert "`pip install .` in a clone" in text and "pip install rgexport" not in text
    assert "onnxruntime_genai.Model" in text and "on the device `cpu`" in text
    assert "## Checked\n\nNot checked: it was not asked for.\n" in text


def test_what_chose_the_levels(made):
    """The card and `inspect` count all weights and bytes, and say how levels were chosen."""
    plan, tensors = made.manifest.plan, made.manifest.tensors
    counted = list(shares(made.manifest))
    assert sum(share.weights for share in counted) == sum(w.size for w in made.weights.values())
    sizes = {n: sum(part.nbytes for part in t.parts.values()) for n, t in tensors.items()}
    assert sum(share.bytes for share in counted) == sum(sizes.values())
    quantized = [name for name, scheme in plan.items() if isinstance(scheme, Affine)]
    weights = sum(made.weights[name].size for name in quantized)
    bits = 8 * sum(sizes[name] for name in quantized) / weights
    sentence = "Levels were chosen by rounding to nearest."
    text = card(made.manifest)
    assert f"Matrices and head take {bits:.2f} bits per weight" in text and sentence in text
    assert sentence in as_text(describe(str(made.folder)))
    mixed = plan | {quantized[0]: dataclasses.replace(plan[quantized[0]], algorithm="search")}
    counts = algorithms(dataclasses.replace(made.manifest, plan=mixed))
    assert counts == {"rtn": len(quantized) - 1, "search": 1}
    assert levels_sentence(counts).endswith("tensors), clip search (1).")


def test_the_header_tells_what_is_known(made):
    """And is read back where an artifact is uploaded."""
    origin = Origin("google/recurrentgemma-2b", "gemma")
    for told in (origin, UNKNOWN):
        (made.folder / CARD).write_text(module.card(made.manifest, told), "utf-8")
        assert origin_of_card(made.folder / CARD) == told
    text = module.card(made.manifest, origin)
    assert text.startswith("---\n") and "base_model_relation: quantized\n" in text
    for kl in (None, math.nan):
        record = dataclasses.replace(made.manifest.check, kl=kl)
        assert "model-index" not in card(dataclasses.replace(made.manifest, check=record))


def test_card_for_a_browser(made):
    text = card(dataclasses.replace(made.manifest, profile="webgpu"))
    assert "# model: int4 for onnxruntime-web (webgpu)\n" in text
    assert 'import * as ort from "onnxruntime-web/webgpu";' in text
    assert 'externalData: ["model.onnx.data"]' in text and "{{" not in text


def test_cards_of_other_formats(tmp_path):
    gguf = card(export_random_gguf(ODD_CONFIGS["wide_lru"], tmp_path)[0].manifest)
    assert "`pip install .` in a clone" in gguf and "`llama-server`" in gguf
    assert "rgexport llama-cpp build\n    rgexport generate FILE.gguf" in gguf
    pytest.importorskip("coremltools")
    coreml, _ = export_random_coreml(ODD_CONFIGS["wide_lru"], tmp_path, "int4", prefill_length=7)
    package = card(coreml.manifest)
    assert package == (coreml.path / CARD).read_text("utf-8")
    assert "# model: int4 for Core ML\n" in package and "`prefill` takes\n7; " in package
    assert "`position_ids`, `recurrent_state`" in package and "swift-transformers" in package
    assert "`pip install '.[coreml]'` in a clone" in package
    for text in (gguf, package):
        assert "{" not in text and "onnx" not in text.lower()


def test_card_says_why_an_artifact_is_not_verified(made):
    """`test_self_check.py` looks at the numbers of a card."""
    record = CheckRecord(
        **{"status": "unverified", "reason": "it is not right", "engine": "toy 1", "tokens": 32},
        **{"positions": 30, "kl": 0.5, "kl_standard_error": 0.01, "relative_max": 0.25},
    )
    text = card(dataclasses.replace(made.manifest, check=record))
    assert "value: 0.5\n" in text and "| verdict | unverified, since it is not right |" in text
