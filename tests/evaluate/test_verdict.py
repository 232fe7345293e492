"""The verdict of `evaluate`, from figures that say what it must say."""

import numpy as np
import pytest

from rgexport.evaluate import figures
from rgexport.evaluate.figures import ends, mean, mean_difference
from rgexport.evaluate.verdict import verdict

DOMAINS = "code", "prose"
COUNTS = [64] * 40


def models(*losses, domains=DOMAINS, seed=0):
    """A first model, and one for each row of mean losses by domain; noise of 0.1 nats a token."""
    rng = np.random.default_rng(seed)
    first = {domain: rng.normal(128, 10, 40) for domain in domains}
    entries = []
    for index, row in enumerate([[0.0] * len(domains), *losses]):
        sums = {d: first[d] + 64 * gap for d, gap in zip(domains, row, strict=True)}
        if index:
            sums = {d: each + rng.normal(0, 0.8, 40) for d, each in sums.items()}
        mode = {"context": None, "stride": None}
        texts = [
            {"domain": d, **mode, "tokens": 2560, "perplexity": 7.4, "nll": ends(mean(s, COUNTS))}
            for d, s in sums.items()
        ]
        gaps = [
            {"domain": d, **mode, "nll": mean_difference(first[d], s, COUNTS)}
            for d, s in sums.items()
        ]
        shown = {"suites": {"text": {"domains": texts, "by_position": []}}, "bytes": 1}
        entries.append({"label": f"m{index}", "differences": {"text": {"domains": gaps}}} | shown)
    del entries[0]["differences"]
    return entries


@pytest.mark.parametrize(
    ("losses", "conclusion", "reason"),
    [
        ([[0.1, 0.02]], "m1 certainly loses in text.", "text: m1 loses 0.059"),
        ([[0.0, 0.0]], "m1 loses nothing for certain in text.", "perhaps by chance."),
        ([[-0.1, -0.1]], "m1 loses nothing for certain in text.", "text: m1 gains 0.1"),
        ([[0.04, -0.04]], "m1 certainly loses in text.", "most surely in code (0.04"),
        (
            [[0.0, 0.0], [0.1, 0.2]],
            "m1 loses nothing for certain in text; m2 certainly",
            "text: m2",
        ),
    ],
)
def test_it_says_what_is_lost_and_where(losses, conclusion, reason):
    result = verdict(models(*losses))
    assert result.conclusion.startswith("Against m0: ") and conclusion in result.conclusion
    told, how_sure = result.reasons
    assert reason in told and how_sure.startswith("How sure: ±")
    assert result.is_loss == ("certainly loses" in result.conclusion)


def test_of_many_domains_some_seem_worse_by_chance(monkeypatch):
    """Without a correction for their number, every fourth verdict would be wrong."""
    monkeypatch.setattr(figures, "_FLIPS", 9)
    gaps = {f"domain {index}": 0.0 for index in range(12)}
    judged = [verdict(models(gaps.values(), domains=gaps, seed=seed)) for seed in range(40)]
    assert sum(each.is_loss for each in judged) <= 5


def test_equal_answers_leave_room_for_a_rare_loss():
    tasks = [{"task": "recall", "points": [{"count": 32}]}]
    gap = {"task": "recall", "distance": 16, "value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    suites = {"memory": {"tasks": tasks}}
    entries = [{"label": "m0", "suites": suites}, {"label": "m1", "suites": suites}]
    entries[1]["differences"] = {"memory": {"points": [gap]}}
    told, _ = verdict(entries).reasons
    assert told == "memory: m1 loses 0.0 ± 9.4 of 100 answers, perhaps by chance."
