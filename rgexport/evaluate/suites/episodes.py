"""The episodes of `memory`: something to remember, and questions about it.

All episodes of a task have the same number of tokens, so that they can share a batch. Each answer
is one token, chosen among candidates: chance is one in so many, whatever the model has learned of
the language.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError
from rgexport.validate.text import built_in_text

_NOUNS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work number night point home water
room mother area money story fact month lot right study book eye job word business issue side kind
head house service friend father power hour game line end member law car city name team minute idea
body back parent face others level office door health person art war history party result change
morning reason girl guy moment air teacher force
""".split()
_LEAST = 16
"""Nouns of one token that are needed; a vocabulary with fewer is taken by ids."""
_FEWEST = _LEAST + 14 + 6
"""Ids of a vocabulary: symbols, digits, marks, and some for the filler."""


@dataclass(frozen=True)
class Words:
    """The ids that episodes are made of.

    Attributes:
        symbols: keys, values, and what is copied.
        digits: ten, from 0 on.
        between: follow a key or a question.
        end: follow an answer.
        passkey, copy: begin what is to be remembered, and ask for it.
        filler: [N], a text that goes on and on.
    """

    symbols: list[int]
    digits: list[int]
    between: list[int]
    end: list[int]
    passkey: list[int]
    copy: list[int]
    filler: np.ndarray


@dataclass(frozen=True)
class Question:
    """What is asked, the id that is right, and the ids that it is chosen from."""

    asked: list[int]
    answer: int
    candidates: list[int]


@dataclass(frozen=True)
class Episode:
    """What is to be remembered, and the questions; each answer is given before the next one."""

    told: list[int]
    questions: list[Question]


def words_of(tokenizer: Tokenizer | None, vocab_size: int) -> Words:
    """Words of the vocabulary, or ids that stand for such.

    Without a tokenizer, or with too few nouns of one token, the ids are spread over the vocabulary,
    and the filler is drawn from the others.
    """
    if tokenizer is not None:
        single = [tokenizer.encode_text(f" {noun}") for noun in _NOUNS]
        symbols = [ids[0] for ids in single if len(ids) == 1]
        if len(symbols) >= _LEAST:
            encode = tokenizer.encode_text
            digits = [encode(str(digit))[-1] for digit in range(10)]
            lead, copied = encode("\nThe pass key is "), encode("\nThe list is")
            own = {*symbols, *digits, *encode(":")}
            filler = np.array([i for i in encode(built_in_text()) if i not in own], np.int64)
            return Words(symbols, digits, encode(":"), encode("\n"), lead, copied, filler)
    return _ids(vocab_size)


def _ids(vocab_size: int) -> Words:
    """Each id has one part; those of symbols, digits and marks are spread over the vocabulary.

    Raises:
        RequestError: the vocabulary is too small.
    """
    first = min(3, max(0, vocab_size - _FEWEST))  # what is special is there as a rule
    if vocab_size < _FEWEST:
        raise RequestError(
            f"a vocabulary of {vocab_size} is too small for the suite memory; expected {_FEWEST}"
        )
    chosen = np.linspace(first, vocab_size - 1, _LEAST + 14).astype(int)
    random = np.random.default_rng(0)
    own = random.permutation(chosen).tolist()
    others = np.setdiff1d(np.arange(first, vocab_size), chosen)
    between, end, passkey, copied = ([token] for token in own[_LEAST + 10 :])
    symbols, digits = own[:_LEAST], own[_LEAST : _LEAST + 10]
    return Words(symbols, digits, between, end, passkey, copied, random.choice(others, 1 << 14))


def _pairs(words: Words, random: np.random.Generator, pairs: int, asked: int) -> Episode:
    chosen = random.permutation(words.symbols)[: 2 * pairs].tolist()
    keys, values = chosen[:pairs], chosen[pairs:]
    told = [token for pair in zip(keys, values, strict=True) for token in _line(words, *pair)]
    order = random.permutation(pairs)[:asked].tolist()
    leads = [[], *[words.end] * (asked - 1)]
    questions = [
        Question([*lead, keys[i], *words.between], values[i], sorted({*values} - given))
        for lead, i, given in zip(leads, order, _before([values[i] for i in order]), strict=True)
    ]
    return Episode(told, questions)


def _before(answers: list[int]) -> list[set[int]]:
    """What was answered before each answer: no value comes twice."""
    return [{*answers[:place]} for place in range(len(answers))]


def _line(words: Words, key: int, value: int) -> list[int]:
    return [key, *words.between, value, *words.end]


def _recall(words: Words, random: np.random.Generator) -> Episode:
    return _pairs(words, random, 4, 1)


def _several(words: Words, random: np.random.Generator) -> Episode:
    return _pairs(words, random, 8, 4)


def _induction(words: Words, random: np.random.Generator) -> Episode:
    key, *values = random.permutation(words.symbols)[:9].tolist()
    return Episode(
        _line(words, key, values[0]), [Question([key, *words.between], values[0], sorted(values))]
    )


def _passkey(words: Words, random: np.random.Generator) -> Episode:
    ids = random.choice(words.digits, 4).tolist()
    leads = [words.passkey, [], [], []]
    questions = [Question(lead, i, words.digits) for lead, i in zip(leads, ids, strict=True)]
    return Episode([*words.passkey, *ids, *words.end], questions)


def _copying(words: Words, random: np.random.Generator) -> Episode:
    """The last word is not asked for: it is the only one that is left."""
    ids = random.permutation(words.symbols)[:8].tolist()
    questions = [
        Question([] if place else words.copy, token, sorted(ids[place:]))
        for place, token in enumerate(ids[:-1])
    ]
    return Episode([*words.copy, *ids, *words.end], questions)


def _counting(words: Words, random: np.random.Generator) -> Episode:
    """How often a symbol was said, after five examples."""
    mark, most = words.symbols[0], 5
    numbers = random.permutation(np.arange(1, most + 1)).tolist()
    told = [
        token
        for number in numbers
        for token in [*[mark] * number, *words.end, *_line(words, mark, words.digits[number])]
    ]
    asked = int(random.integers(1, most + 1))
    told += [words.symbols[1]] * (most - asked) + [mark] * asked + words.end
    question = Question([mark, *words.between], words.digits[asked], words.digits[1 : most + 1])
    return Episode(told, [question])


TASKS: dict[str, Callable[[Words, np.random.Generator], Episode]] = {
    "induction": _induction,
    "recall": _recall,
    "several": _several,
    "passkey": _passkey,
    "copying": _copying,
    "counting": _counting,
}
"""Name → what makes an episode: one pair; one of four pairs; four of eight pairs; four digits;
eight words in their order; how often a word was said. Of `induction`, only the right candidate was
told: it shows that something is known, the others whether what belongs together is."""
