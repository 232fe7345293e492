"""The suite `noise` against DeepMind's model."""

import numpy as np
import pytest
import torch

from rgexport.evaluate.request import Request
from rgexport.evaluate.subjects import open_subject
from rgexport.evaluate.suites import noise
from rgexport.validate.text import built_in_text
from tests.deepmind import deepmind_logits, deepmind_model
from tests.evaluate.small_model import small_model

TEXT = built_in_text()


@pytest.mark.parametrize("kind", [kind for kind in noise.NOISES if kind != "none"])
def test_each_kind_spoils_in_one_way_for_a_seed(kind):
    context = TEXT[:3000]
    spoilt = [noise.NOISES[kind](context, np.random.default_rng(seed)) for seed in (1, 1)]
    assert spoilt[0] == spoilt[1] != context
    assert 0.5 < len(spoilt[0]) / len(context) < 1.5


def test_passages_follow_one_another():
    found = noise.passages(TEXT)
    assert len(found) > 3
    whole = "".join(context + rest for context, rest in found)
    assert len(whole) > len(TEXT) - noise.SPOILT - noise.KEPT - 200 and TEXT.startswith(whole)
    assert noise.passages("too short") == []


def test_losses_and_flips_are_deepminds(tmp_path):
    folder, config, weights = small_model(tmp_path)
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:2000])
    subject, request = open_subject(str(folder)), Request(texts=(file,), seed=5)
    session, deepmind = subject.session(), deepmind_model(config, weights)
    found = [
        (piece.work, noise.measure(subject, session, piece.work, request))
        for piece in noise.pieces(subject, request)
    ]
    tops, losses = {}, {}
    for work, result in found:
        if work["noise"] in ("none", "upper case"):
            spoil = noise.NOISES[work["noise"]]
            parts = [(spoil(context, None), rest) for context, rest in noise.passages(TEXT[:2000])]
            each = [logits_of(deepmind, subject, *part) for part in parts]
            expected = [nats(logits, ids).sum() for logits, ids in each]
            np.testing.assert_allclose(list(map(sum, result["nats"])), expected, rtol=1e-4)
            losses[work["noise"]] = [nats(logits, ids) for logits, ids in each]
            tops[work["noise"]] = np.concatenate([logits.argmax(-1) for logits, _ in each])
    summed = {entry["noise"]: entry for entry in noise.summary(found)["noises"]}
    flips = (tops["none"] != tops["upper case"]).mean()
    assert summed["upper case"]["flips"]["value"] == pytest.approx(flips)
    grown = [b - a for a, b in zip(losses["none"], losses["upper case"], strict=True)]
    for point, part in zip(
        summed["upper case"]["by_distance"], [slice(0, 1), slice(1, 3), slice(3, 7)], strict=False
    ):
        expected = np.concatenate([gap[part] for gap in grown]).mean()
        assert point["token"] == part.start + 1
        assert point["more"]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    longest = max(map(len, grown))
    assert 2 ** len(summed["upper case"]["by_distance"]) > longest
    assert summed["none"]["more"] == {"value": 0, "low": 0, "high": 0, "p": 1}
    same = noise.differences(found, found)["noises"]
    assert {entry["value"] for entry in same} == {0.0}


def logits_of(model, subject, context: str, rest: str) -> tuple[np.ndarray, np.ndarray]:
    encode = subject.tokenizer.encode_text
    ids = encode(rest)
    logits = deepmind_logits(model, np.array([[2, *encode(context), *ids[:-1]]]))
    return logits[0, -len(ids) :], np.array(ids)


def nats(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    odds = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    return -odds.numpy()[np.arange(len(ids)), ids]
