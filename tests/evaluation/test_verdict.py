"""The verdict of `evaluate`, from figures that say what it must say."""

import numpy as np
import pytest

from rgexport.evaluation.verdict import verdict


def figure(value, margin):
    return {"value": value, "low": value - margin, "high": value + margin, "p": None}


def models(*losses, margin=0.01):
    """A first model, and one for each mapping of domains to lost nats."""
    mode = {"context": None, "stride": None}
    texts = [{"domain": domain, "tokens": 2560, **mode} for domain in losses[0]]
    suites = {"text": {"domains": texts}}
    yield {"label": "m0", "suites": suites}
    for index, lost in enumerate(losses, 1):
        gaps = [{"domain": d, "nll": figure(nats, margin), **mode} for d, nats in lost.items()]
        differences = {"text": {"domains": gaps}}
        yield {"label": f"m{index}", "suites": suites, "differences": differences}


@pytest.mark.parametrize(
    ("losses", "conclusion", "reason"),
    [
        ([(0.1, 0.02)], "m1 certainly loses in text.", "m1 loses 0.0600 ± 0.0071 nats per token"),
        ([(0, 0)], "m1 shows no certain loss in text.", "perhaps by chance."),
        ([(-0.1, -0.1)], "m1 shows no certain loss in text.", "text: m1 gains 0.1"),
        ([(0.04, -0.04)], "m1 certainly loses in text.", "most surely in code (0.040 ± 0.010)"),
        (
            [(0, 0), (0.1, 0.2)],
            "certain loss in text; m2 certainly loses in text.",
            "text: m2 loses",
        ),
    ],
)
def test_it_says_what_is_lost_and_where(losses, conclusion, reason):
    result = verdict(list(models(*({"code": a, "prose": b} for a, b in losses))))
    assert result.conclusion.startswith("Against m0: ") and conclusion in result.conclusion
    told, how_sure = result.reasons
    assert reason in told and how_sure.startswith("How sure: ±")
    assert result.is_loss == ("certainly loses" in result.conclusion)


def test_of_many_domains_some_seem_worse_by_chance():
    """Without a correction for their number, every fourth verdict would be wrong."""
    draws = np.random.default_rng(0).normal(size=(400, 12))
    judged = [verdict(list(models(dict(enumerate(draw)), margin=1.96))) for draw in draws]
    assert sum(each.is_loss for each in judged) < 40


def test_equal_answers_leave_room_for_a_rare_loss():
    suites = {"memory": {"tasks": [{"task": "recall", "points": [{"count": 32}]}]}}
    gap = {"task": "recall", "distance": 16, **figure(0.0, 0.0)}
    second = {"label": "m1", "suites": suites, "differences": {"memory": {"points": [gap]}}}
    told, _ = verdict([{"label": "m0", "suites": suites}, second]).reasons
    assert told == "memory: m1 loses 0.0 ± 9.4 of 100 answers, perhaps by chance."
