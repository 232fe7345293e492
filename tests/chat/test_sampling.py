"""The sampler against its definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.chat.sampling import Sampler
from rgexport.errors import RequestError

# Eighths: many ties, and no difference so small that the exponential swallows it.
logit_rows = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.integers(-240, 240).map(lambda i: i / 8)
)


@given(logits=logit_rows)
def test_temperature_zero_is_the_first_maximum(logits: np.ndarray) -> None:
    assert Sampler()(logits) == int(np.flatnonzero(logits == logits.max())[0])


@given(
    logits=logit_rows,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1),
)
def test_distribution_is_the_definition(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> None:
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))[: top_k or None]
    best = float(logits.max())
    weights = [math.exp((float(logits[i]) - best) / temperature) for i in order]
    tokens, probabilities = Sampler(temperature, top_k, top_p).distribution(logits)
    count = len(tokens)
    assert sorted(tokens) == sorted(order[:count])
    # The fewest whose share reaches top_p, but for rounding.
    assert sum(weights[:count]) / sum(weights) > top_p - 1e-12
    assert top_p == 1 or sum(weights[: count - 1]) / sum(weights) < top_p + 1e-12
    assert count == len(order) or top_p < 1
    share = dict(zip(order, weights, strict=True))
    expected = np.array([share[i] for i in tokens.tolist()]) / sum(weights[:count])
    assert probabilities.dtype == np.float64
    assert probabilities == pytest.approx(expected, rel=1e-9)


def test_samples_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(temperature=1.0, top_k=3, seed=1)
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4)
    assert counts / 4000 == pytest.approx(np.array([0.5, 0.3, 0.15, 0]) / 0.95, abs=0.03)


def test_a_seed_repeats() -> None:
    logits = np.zeros(1000, np.float32)
    first, second = Sampler(1.0, seed=7), Sampler(1.0, seed=7)
    drawn = [first(logits) for _ in range(20)]
    assert drawn == [second(logits) for _ in range(20)] and len(set(drawn)) > 10


def test_a_tiny_temperature_is_greedy() -> None:
    assert Sampler(temperature=1e-300)(np.array([1, 3, 2], np.float32)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -3},
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(RequestError, match=f"{name} is .*; expected"):
        Sampler(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.9}])
def test_options_of_sampling_need_a_temperature(option: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="change nothing at temperature 0"):
        Sampler(**option)  # type: ignore[arg-type]
    Sampler(temperature=0.7, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logits", [[0, np.nan], [0, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_no_numbers_are_an_error(logits: list[float], temperature: float) -> None:
    with pytest.raises(RequestError, match="NaN or infinite"):
        Sampler(temperature)(np.array(logits, np.float32))


def test_a_great_temperature_makes_all_equal_but_what_cannot_be() -> None:
    logits = np.array([3e38, -3e38, -np.inf], np.float32)
    tokens, probabilities = Sampler(temperature=1e300).distribution(logits)
    assert tokens.tolist() == [0, 1, 2] and probabilities == pytest.approx([0.5, 0.5, 0])
