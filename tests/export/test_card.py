"""The model card, and what it counts."""

import dataclasses
import math

from rgexport.export import card as module
from rgexport.export.card import CARD, algorithms, levels_sentence, shares, write_card
from rgexport.export.checked import CheckRecord
from rgexport.export.describe import as_text, describe
from rgexport.export.origin import Origin, origin_of_card
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.scheme import Affine, Float, Ggml
from tests.artifacts import export_random_coreml, export_random_gguf
from tests.models import ODD_CONFIGS

UNKNOWN = Origin(None, None)


def card(manifest) -> str:
    return module.card(manifest, UNKNOWN)


def test_shares_cover_every_weight_and_byte(made):
    found = list(shares(made.manifest))
    assert sum(share.tensors for share in found) == len(model_tensors(made.manifest.config))
    assert sum(share.weights for share in found) == sum(w.size for w in made.weights.values())
    parts = [part for t in made.manifest.tensors.values() for part in t.parts.values()]
    assert sum(share.bytes for share in found) == sum(part.nbytes for part in parts)


def test_card_says_what_it_is(made):
    write_card(made.folder, made.manifest, UNKNOWN)
    text = (made.folder / CARD).read_text("utf-8")
    assert text == card(made.manifest)
    assert "# model: int4 for ONNX Runtime\n" in text
    assert "| linear | int4/32 asym | 10,368 | 9.02 kB | 6.96 |" in text
    assert "Gemma Terms of Use" in text and "{" not in text
    assert "`pip install .` in a clone" in text and "pip install rgexport" not in text
    assert "onnxruntime_genai.Model" in text and "on the device `cpu`" in text


def test_what_chose_the_levels(made):
    """Of each tensor that is stored as integers: in the card, and in what `inspect` says."""
    plan = made.manifest.plan
    quantized = [name for name, scheme in plan.items() if isinstance(scheme, Affine)]
    assert algorithms(made.manifest) == {"rtn": len(quantized)}
    sentence = "Levels were chosen by rounding to nearest."
    weights = sum(math.prod(made.manifest.tensors[name].shape) for name in quantized)
    size = sum(p.nbytes for name in quantized for p in made.manifest.tensors[name].parts.values())
    bits = f"Matrices and head take {8 * size / weights:.2f} bits per weight"
    assert bits in card(made.manifest)
    assert sentence in card(made.manifest) and sentence in as_text(describe(str(made.folder)))
    mixed = plan | {quantized[0]: dataclasses.replace(plan[quantized[0]], algorithm="search")}
    counts = algorithms(dataclasses.replace(made.manifest, plan=mixed))
    assert counts == {"rtn": len(quantized) - 1, "search": 1}
    assert levels_sentence(counts).endswith("tensors), clip search (1).")
    floats = {name: Float("float32") for name in plan} | {quantized[0]: Ggml("f16")}
    assert algorithms(dataclasses.replace(made.manifest, plan=floats)) == {}


def test_the_header_tells_what_is_known(made):
    """And is read back where an artifact is uploaded."""
    origin = Origin("google/recurrentgemma-2b", "gemma")
    for given in (origin, UNKNOWN):
        write_card(made.folder, made.manifest, given)
        assert origin_of_card(made.folder / CARD) == given
    text = module.card(made.manifest, origin)
    assert text.startswith("---\n") and "base_model_relation: quantized\n" in text
    assert "model-index" not in text
    measured = dataclasses.replace(made.manifest.check, kl=0.5, tokens=32)
    assert "value: 0.5\n" in card(made.manifest.with_check(measured))
    broken = dataclasses.replace(measured, kl=math.nan)
    assert "model-index" not in card(made.manifest.with_check(broken))


def test_card_for_a_browser(made):
    text = card(dataclasses.replace(made.manifest, profile="webgpu"))
    assert "# model: int4 for onnxruntime-web (webgpu)\n" in text
    assert 'import * as ort from "onnxruntime-web/webgpu";' in text
    assert 'externalData: ["model.onnx.data"]' in text and "{{" not in text
    assert "on the device `webgpu`" in text


def test_cards_of_other_formats(tmp_path):
    gguf, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    text = card(gguf.manifest)
    assert "`pip install .` in a clone" in text and "`llama-server`" in text
    assert "rgexport llama-cpp build\n    rgexport generate FILE.gguf" in text
    coreml, _ = export_random_coreml(ODD_CONFIGS["regular"], tmp_path, "int4", prefill_length=7)
    package = card(coreml.manifest)
    assert package == (coreml.path / CARD).read_text("utf-8")
    assert "# model: int4 for Core ML\n" in package and "`prefill` takes\n7; " in package
    assert "`position_ids`, `recurrent_state`" in package and "swift-transformers" in package
    assert "`pip install '.[coreml]'` in a clone" in package
    for other in (text, package):
        assert "{" not in other and "onnx" not in other.lower()


def test_card_says_how_the_check_ended(made):
    assert "## Checked\n\nNot checked: it was not asked for.\n" in card(made.manifest)
    found = CheckRecord(
        **{"status": "unverified", "reason": "it is not right", "engine": "toy 1", "tokens": 32},
        **{"positions": 30, "kl": 0.5, "kl_standard_error": 0.01, "relative_max": 0.25},
    )
    text = card(made.manifest.with_check(found))
    assert "on 32 tokens in toy 1" in text
    assert "| KL to the original, over 30 tokens | 0.5 ± 0.01 nats |" in text
    assert "| 25 % of the largest logit |" in text
    assert "| verdict | unverified, since it is not right |" in text
