"""The model card, and what it counts."""

from rgexport.export.card import CARD, card, shares, write_card
from rgexport.griffin.layout import model_tensors


def test_shares_cover_every_weight_and_byte(made):
    found = list(shares(made.manifest))
    assert sum(share.tensors for share in found) == len(model_tensors(made.manifest.config))
    assert sum(share.weights for share in found) == sum(w.size for w in made.weights.values())
    data = made.manifest.files["model.onnx.data"].size
    assert sum(share.bytes for share in found) == data


def test_card_says_what_it_is(made):
    write_card(made.folder, made.manifest)
    text = (made.folder / CARD).read_text("utf-8")
    assert text == card(made.manifest)
    assert text.startswith("# small: int4 for ONNX Runtime\n")
    assert "| linear | int4/32 asym | 10,368 | 9.02 kB | 6.96 |" in text
    assert "Gemma Terms of Use" in text and "{" not in text
