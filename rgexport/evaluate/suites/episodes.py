"""The episodes of `memory`: something to remember, and questions about it.

All episodes of a task have the same number of tokens, so that they can share a batch. Each answer
is one token, chosen among candidates: chance is one in so many, whatever the model has learned of
the language.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rgexport.chat.tokenizer import Tokenizer
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
            filler = np.array(encode(built_in_text()), np.int64)
            lead, copied = encode("\nThe pass key is "), encode("\nThe list is")
            return Words(symbols, digits, encode(":"), encode("\n"), lead, copied, filler)
    return _ids(vocab_size)


def _ids(vocab_size: int) -> Words:
    """Every id has one part: symbols, digits and marks first, all others are filler."""
    free = list(range(min(3, max(0, vocab_size - 36)), vocab_size))
    count = max(2, min(_LEAST, (len(free) - 14) // 2))
    symbols, rest = free[:count], free[count:]
    digits, marks = (rest[:10] or symbols), (rest[10:14] or symbols)
    others = np.array(rest[14:] or symbols, np.int64)
    filler = np.random.default_rng(0).choice(others, 1 << 14)
    mark = [[marks[i % len(marks)]] for i in range(4)]
    return Words(symbols, digits, mark[0], mark[1], mark[2], mark[3], filler)


def _pairs(words: Words, random: np.random.Generator, pairs: int, asked: int) -> Episode:
    pairs = min(pairs, len(words.symbols) // 2)
    chosen = random.permutation(words.symbols).tolist()
    keys, values = chosen[:pairs], chosen[pairs : 2 * pairs]
    told = [token for pair in zip(keys, values, strict=True) for token in _line(words, *pair)]
    questions = [
        Question([keys[i], *words.between], values[i], sorted(values))
        for i in random.permutation(len(keys))[:asked].tolist()
    ]
    return Episode(told, questions)


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


def _sequence(lead: list[int], ids: list[int], candidates: list[int], words: Words) -> Episode:
    first, *others = ids
    questions = [Question(lead, first, candidates)]
    questions += [Question([], token, candidates) for token in others]
    return Episode([*lead, *ids, *words.end], questions)


def _passkey(words: Words, random: np.random.Generator) -> Episode:
    return _sequence(words.passkey, random.choice(words.digits, 4).tolist(), words.digits, words)


def _copying(words: Words, random: np.random.Generator) -> Episode:
    ids = random.permutation(words.symbols)[:8].tolist()
    return _sequence(words.copy, ids, sorted(ids), words)


def _counting(words: Words, random: np.random.Generator) -> Episode:
    """How often a symbol was said, after five examples."""
    mark, most = words.symbols[0], 5
    numbers = random.permutation(np.arange(1, most + 1)).tolist()
    told = [
        token
        for number in numbers
        for token in [*[mark] * number, *words.between, words.digits[number], *words.end]
    ]
    asked = int(random.integers(1, most + 1))
    told += [words.symbols[1]] * (most - asked) + [mark] * asked
    question = Question(words.between, words.digits[asked], words.digits[1 : most + 1])
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
eight words in their order; how often a word was said."""
