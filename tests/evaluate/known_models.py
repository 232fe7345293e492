"""Models whose weights are set by hand, so that it is known what they remember.

They read the tokens of `memory` for a model without a tokenizer: sixteen *symbols*, which keys and
values are drawn from, and *others* (marks and filler). Each has one layer; of its weights, all that
are not named here are 0, the MLP's among them.

Embedding and head (they are one matrix). Symbol s is the direction s of the residual stream and a
small part `favour[s]` of the direction `OTHER`, which all other tokens are. The layer adds what it
remembers of each symbol, m[s], in the direction s. Behind an other token the stream is then
`OTHER + Σ m[s] · s`, and the head finds for symbol s: m[s] + favour[s], times what the final norm
makes of all alike. A question ends with an other token, and of its candidates one was told. So the
answer is right if and only if

    m[answer] + favour[answer] > favour[other]    for all seven other candidates.

Favours are apart by one `step`: a model that remembers nothing is right where the answer is the
candidate with the largest favour, in one of eight episodes; one that remembers more than fifteen
steps, always; for what is in between, see `share_right`. No layer binds values to keys: of
`recall`, where all candidates were told, such a model knows nothing.
"""

from math import comb, exp, expm1, log, sqrt

import numpy as np

from rgexport.evaluate.suites.episodes import Question, words_of
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, model_tensors
from tests.models import Weights, make_config

Model = tuple[GriffinConfig, Weights]

WIDTH, VOCAB, SYMBOLS, CANDIDATES = 32, 80, 16, 8
OTHER = SYMBOLS
"""The direction behind those of the symbols."""
BEHIND = 3
"""Tokens of `induction` behind the value that are no filler, up to the question's last one: the end
of the line, the key, and the mark."""

_BLOCK = "layers.0.temporal_block"
_OPEN = 30.0
"""The input of a sigmoid that is 1 to the last bit."""
_FASTEST = 2.0
"""softplus(Λ): with an open recurrence gate, a = exp(-8 · 2) forgets all but 1e-7."""


def remembering(lifetime: float | None, step: float) -> Model:
    """An RG-LRU with a channel for each symbol: m[s] = exp(-tokens since s / `lifetime`).

    `linear_x` shows channel s a 1 where the token is s, else a 0, and the convolution passes it on.
    That 1 opens both gates of its channel: a is 0, sqrt(1 - a²) is 1, and so the state becomes 1.
    Otherwise the input gate is closed, and the recurrence gate lets a be exp(-1 / lifetime); or,
    without a lifetime, 1 to the last bit, and what was told is kept for ever.
    """
    config = make_config("r", width=WIDTH, heads=1, mlp_width=32, vocab_size=VOCAB, scaled=False)
    weights = _common(config, step)
    at_rest = -2 * _OPEN if lifetime is None else _logit(1 / (8 * _FASTEST * lifetime))
    channels = _of_symbols(np.ones(SYMBOLS))
    weights[f"{_BLOCK}.linear_x.weight"] = _shows_symbols(step)
    weights[f"{_BLOCK}.conv_1d.weight"][:, 0, -1] = 1  # the tap of the current token
    for gate, rest in (("input", -_OPEN), ("recurrent", at_rest)):
        weights[f"{_BLOCK}.rg_lru.{gate}_gate_weight"][0] = (_OPEN - rest) * channels
        weights[f"{_BLOCK}.rg_lru.{gate}_gate_bias"][:] = rest
    weights[f"{_BLOCK}.rg_lru.recurrent_param"][:] = log(expm1(_FASTEST))
    # The other branch is the same for all tokens: a factor, which the way out takes away.
    weights[f"{_BLOCK}.linear_y.bias"][:] = 1
    weights[f"{_BLOCK}.linear_out.weight"] = channels / _gelu(1)
    return config, weights


def attending(window: int, step: float) -> Model:
    """Attention that sees the symbols of the window alike: m[s] = 1 / symbols in the window.

    Queries and keys have one dim that is not 0, beyond those that RoPE turns: in it, queries of
    other tokens and keys of symbols are such that their score is `_OPEN`. All other scores are 0,
    so their tokens get nothing. A value is the direction of its symbol.
    """
    config = make_config(
        "a", width=WIDTH, heads=1, mlp_width=32, vocab_size=VOCAB, window=window, scaled=False
    )
    weights = _common(config, step)
    shown = _shows_symbols(step)
    score = _OPEN * sqrt(config.head_dim)  # which attention divides by that
    weights[f"{_BLOCK}.q_proj.weight"][-1, OTHER] = score / sqrt(WIDTH)  # the norm's factor
    weights[f"{_BLOCK}.k_proj.weight"][-1] = shown.sum(0)
    weights[f"{_BLOCK}.v_proj.weight"] = shown
    weights[f"{_BLOCK}.o_proj.weight"] = _of_symbols(np.ones(SYMBOLS))
    return config, weights


def share_right(reach: float) -> float:
    """The share of all episodes of `induction` whose answer is right, by m[answer] in steps.

    All choices of eight symbols, one of them the answer, are alike. The answer is right if the
    seven others are among the symbols that it beats.
    """
    others = CANDIDATES - 1
    ranks = range(SYMBOLS)
    beaten = [sum(beats(rank, other, reach) for other in ranks if other != rank) for rank in ranks]
    return sum(comb(count, others) for count in beaten) / (SYMBOLS * comb(SYMBOLS - 1, others))


def is_right(question: Question, reach: float) -> bool:
    """Whether this answer is right, by m[answer] in steps."""
    rank = words_of(None, VOCAB).symbols.index
    answer, others = question.answer, {*question.candidates} - {question.answer}
    return all(beats(rank(answer), rank(other), reach) for other in others)


def beats(rank: int, other: int, reach: float) -> bool:
    """Whether the symbol of `rank` wins over another one, of which nothing is remembered."""
    return other - rank < reach


def kept(distance: int, lifetime: float) -> float:
    """m[answer] of `remembering` after so much filler."""
    return exp(-(distance + BEHIND) / lifetime)


def last_inside(window: int) -> int:
    """The most filler with which the value is among the `window` tokens before the last one."""
    return window - BEHIND


def _common(config: GriffinConfig, step: float) -> Weights:
    """The embedding; all else is 0, also what norms add to their factor of 1."""
    weights = {
        name: np.zeros(spec.shape, np.float32) for name, spec in model_tensors(config).items()
    }
    table = weights[EMBEDDING]
    table[:, OTHER] = 1
    symbols = words_of(None, VOCAB).symbols
    table[symbols] = np.eye(SYMBOLS, WIDTH)
    table[symbols, OTHER] = _favours(step)
    return weights


def _favours(step: float) -> np.ndarray:
    return step * np.arange(SYMBOLS)


def _shows_symbols(step: float) -> np.ndarray:
    """A matrix that makes a 1 in the direction of a symbol of its embedding behind the norm.

    The norm makes vectors of the length sqrt(WIDTH).
    """
    return _of_symbols(np.sqrt((1 + _favours(step) ** 2) / WIDTH))


def _of_symbols(values: np.ndarray) -> np.ndarray:
    """A diagonal matrix that is 0 behind the symbols."""
    return np.diag(np.pad(values, (0, WIDTH - SYMBOLS))).astype(np.float32)


def _gelu(x: float) -> float:
    """In its tanh form."""
    return x / 2 * (1 + np.tanh(sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _logit(share: float) -> float:
    return log(share / (1 - share))
