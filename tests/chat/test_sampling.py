"""The sampler and stop strings against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.chat import sampling
from rgexport.chat.sampling import Sampler, Sampling, _truncated
from rgexport.chat.stop_strings import StopStrings
from rgexport.errors import RequestError

# Eighths: many ties, and no difference so small that the exponential swallows it.
EIGHTHS = st.integers(-240, 240).map(lambda i: i / 8)
logit_rows = hnp.arrays(np.float32, st.integers(1, 40), elements=EIGHTHS)


@given(
    logits=logit_rows,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
    repeat=st.sampled_from([1, 1, 60]),
)
def test_distribution_is_the_definition(logits, temperature, top_k, top_p, repeat):
    """Also for vocabularies that are taken in blocks."""
    logits = np.tile(logits, repeat) - np.repeat(np.arange(repeat, dtype=np.float32), len(logits))
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))[: top_k or None]
    best = float(logits.max())
    weights = [math.exp((float(logits[i]) - best) / temperature) for i in order]
    options = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    chosen, unscaled = _truncated(logits, options)
    tokens = np.arange(len(logits)) if chosen is None else chosen
    count = len(tokens)
    assert sorted(tokens) == sorted(order[:count])
    # The fewest whose share reaches top_p, but for rounding.
    assert sum(weights[:count]) / sum(weights) > top_p - 1e-12
    assert top_p == 1 or sum(weights[: count - 1]) / sum(weights) < top_p + 1e-12
    assert count == len(order) or top_p < 1
    share = dict(zip(order, weights, strict=True))
    expected = np.array([share[i] for i in tokens.tolist()]) / sum(weights[:count])
    assert unscaled.dtype == np.float64
    assert unscaled / unscaled.sum() == pytest.approx(expected, rel=1e-9)


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for limit in ({"top_k": 3}, {"min_p": 0.29}):
        sampler = Sampler(Sampling(temperature=1.0, seed=1, **limit))
        counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4)
        assert counts / 4000 == pytest.approx(np.array([0.5, 0.3, 0.15, 0]) / 0.95, abs=0.03)


WRONG = {
    **{"temperature": [-1.0, math.nan, math.inf], "top_k": [-1], "top_p": [0.0, 1.5]},
    **{"min_p": [1.5], "repetition_penalty": [0.0], "presence_penalty": [math.nan]},
    **{"frequency_penalty": [math.inf], "seed": [-3], "logit_bias": [{-1: 1.0}, {3: math.nan}]},
}


@pytest.mark.parametrize("name", WRONG)
def test_an_option_out_of_range_is_named(name):
    for value in WRONG[name]:
        with pytest.raises(RequestError, match=f"{name} (is|of) .*; expected"):
            Sampling(**{name: value})


@given(logits=logit_rows, count=st.integers(1, 700), repeat=st.sampled_from([1, 90]))
def test_most_likely_are_the_first_of_a_stable_sort(logits, count, repeat):
    logits = np.tile(logits, repeat)
    expected = np.argsort(-logits, kind="stable")[:count]
    np.testing.assert_array_equal(sampling.most_likely(logits, count), expected)
    assert Sampler(Sampling())(logits) == expected[0], "temperature 0"


@given(point=st.floats(0, 1, exclude_max=True), size=st.integers(1, 3000), seed=st.integers(0, 9))
def test_a_point_falls_into_its_share(point: float, size: int, seed: int) -> None:
    """Zeros are never drawn, and the place is that in the cumulated sum."""
    random = np.random.default_rng(seed)
    weights = random.random(size) * (random.random(size) < 0.3)
    weights[random.integers(size)] += 1
    drawn, sums = sampling._draw(weights, point), weights.cumsum()
    assert weights[drawn] > 0
    assert sums[drawn] >= point * sums[-1] * (1 - 1e-12)
    assert sums[drawn] - weights[drawn] <= point * sums[-1] * (1 + 1e-12)


def test_penalties_are_those_of_their_definitions() -> None:
    """vLLM's: repetition counts the prompt and the reply, the others the reply alone."""
    logits = np.array([2.0, 2.0, -2.0, 1.0, 0.5], np.float32)
    penalties = {"repetition_penalty": 2.0, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    bias = {4: 1.25, 7: 9.0}  # there is no token 7
    sampler = Sampler(Sampling(logit_bias=bias, **penalties), prompt=[1, 2])
    seen, chosen = [], []
    for _ in range(4):
        seen.append(sampler._adjusted(logits, None))
        chosen.append(sampler(logits))
    assert seen[0].tolist() == [2.0, 1.0, -4.0, 1.0, 1.75]
    assert chosen == [0, 4, 1, 3]
    assert seen[1].tolist() == [1 - 0.75, 1.0, -4.0, 1.0, 1.75]
    assert seen[2].tolist() == [0.25, 1.0, -4.0, 1.0, 0.25 - 0.75 + 1.25]
    assert logits.tolist() == [2.0, 2.0, -2.0, 1.0, 0.5], "the session's logits stay"


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32) * 9
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(sampling.log_probabilities(logits), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logits", [[0, np.nan], [0, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_no_numbers_are_an_error(logits: list[float], temperature: float) -> None:
    with pytest.raises(RequestError, match="NaN or infinite"):
        Sampler(Sampling(temperature=temperature))(np.array(logits, np.float32))


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", max_size=4), max_size=3),
    data=st.data(),
)
def test_the_text_ends_where_a_stop_string_begins(text, stops, data):
    """However it is cut into pieces, and never a character more or less."""
    stopping, shown, end = StopStrings(stops), "", 0
    while end < len(text) and not stopping.match:
        start, end = end, data.draw(st.integers(end + 1, len(text)))
        shown += stopping.add(text[start:end])
    if not stopping.match:
        shown += stopping.finish()
    places = [text[:end].index(stop) for stop in stops if stop and stop in text[:end]]
    assert shown == text[: min(places, default=end)]
    assert bool(places) == (stopping.match is not None)
