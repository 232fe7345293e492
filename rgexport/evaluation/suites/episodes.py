"""The episodes of `memory`: facts to remember, and questions about them.

All episodes of a task have the same number of tokens, so that they can share a batch. Each answer
is one token, chosen among candidates, so the chance level is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from rgexport.chat.sample_text import built_in_text
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError

_NOUNS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work number night point home water
room mother area money story fact month lot right study book eye job word business issue side kind
head house service friend father power hour game line end member law car city name team minute idea
body back parent face others level office door health person art war history party result change
morning reason girl guy moment air teacher force
""".split()
_SYMBOLS, _DIGITS, _MARKS = 16, 10, 4  # ids that episodes need, at least so many symbols
_MIN_IDS = _SYMBOLS + _DIGITS + _MARKS + 6  # some for the filler


@dataclass(frozen=True)
class EpisodeVocabulary:
    """The ids that episodes consist of; `symbols` are keys, values, and the list of `copying`.

    A key or a question ends with `between`, an answer with `end`; `passkey` and `copy` begin the
    facts of these tasks, and ask for them. `filler` [N] is the text in between, repeated as needed.
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
    """A prompt, the id of the right answer, and the ids it is chosen from."""

    prompt: list[int]
    answer: int
    candidates: list[int]


@dataclass(frozen=True)
class Episode:
    """Facts and questions; each right answer is fed to the model before the next question."""

    facts: list[int]
    questions: list[Question]


def vocabulary_of(tokenizer: Tokenizer | None, vocab_size: int) -> EpisodeVocabulary:
    """Returns words of the tokenizer; RequestError for a vocabulary that is too small.

    Without a tokenizer, or with too few nouns of one token, ids spread over the vocabulary stand
    for words, and the filler is drawn from the others.
    """
    if tokenizer is not None:
        encode = tokenizer.encode_text
        nouns = [encode(f" {noun}") for noun in _NOUNS]
        symbols = [ids[0] for ids in nouns if len(ids) == 1]
        if len(symbols) >= _SYMBOLS:
            digits = [encode(str(digit))[-1] for digit in range(10)]
            passkey, copy = encode("\nThe pass key is "), encode("\nThe list is")
            used = {*symbols, *digits, *encode(":")}
            filler = np.array([i for i in encode(built_in_text()) if i not in used], np.int64)
            return EpisodeVocabulary(
                symbols, digits, encode(":"), encode("\n"), passkey, copy, filler
            )
    if vocab_size < _MIN_IDS:
        raise RequestError(
            f"a vocabulary of {vocab_size} is too small for the suite memory; expected {_MIN_IDS}"
        )
    first = min(3, vocab_size - _MIN_IDS)  # the first ids are usually control tokens
    chosen = np.linspace(first, vocab_size - 1, _SYMBOLS + _DIGITS + _MARKS).astype(int)
    random = np.random.default_rng(0)
    ids = random.permutation(chosen).tolist()
    others = np.setdiff1d(np.arange(first, vocab_size), chosen)
    between, end, passkey, copy = ([token] for token in ids[_SYMBOLS + _DIGITS :])
    symbols, digits = ids[:_SYMBOLS], ids[_SYMBOLS : _SYMBOLS + _DIGITS]
    filler = random.choice(others, 1 << 14)
    return EpisodeVocabulary(symbols, digits, between, end, passkey, copy, filler)


def _line(vocabulary: EpisodeVocabulary, key: int, value: int) -> list[int]:
    return [key, *vocabulary.between, value, *vocabulary.end]


def _pairs(
    vocabulary: EpisodeVocabulary, random: np.random.Generator, num_pairs: int, num_questions: int
) -> Episode:
    """Tells keys with values, and asks for some; an earlier answer is no candidate again."""
    chosen = random.permutation(vocabulary.symbols)[: 2 * num_pairs].tolist()
    keys, values = chosen[:num_pairs], chosen[num_pairs:]
    facts = [i for pair in zip(keys, values, strict=True) for i in _line(vocabulary, *pair)]
    order = random.permutation(num_pairs)[:num_questions].tolist()
    questions = []
    for number, index in enumerate(order):
        answer_end = vocabulary.end if number else []
        candidates = sorted({*values} - {values[i] for i in order[:number]})
        prompt = [*answer_end, keys[index], *vocabulary.between]
        questions.append(Question(prompt, values[index], candidates))
    return Episode(facts, questions)


def _induction(vocabulary: EpisodeVocabulary, random: np.random.Generator) -> Episode:
    """Tells one pair; the other candidates are not told, so the answer takes no key."""
    key, *values = random.permutation(vocabulary.symbols)[:9].tolist()
    question = Question([key, *vocabulary.between], values[0], sorted(values))
    return Episode(_line(vocabulary, key, values[0]), [question])


def _passkey(vocabulary: EpisodeVocabulary, random: np.random.Generator) -> Episode:
    ids = random.choice(vocabulary.digits, 4).tolist()
    leads = [vocabulary.passkey, [], [], []]
    questions = [Question(lead, i, vocabulary.digits) for lead, i in zip(leads, ids, strict=True)]
    return Episode([*vocabulary.passkey, *ids, *vocabulary.end], questions)


def _copying(vocabulary: EpisodeVocabulary, random: np.random.Generator) -> Episode:
    """Tells a list of eight symbols; the last is not asked for, as no other candidate is left."""
    ids = random.permutation(vocabulary.symbols)[:8].tolist()
    questions = [
        Question([] if index else vocabulary.copy, token, sorted(ids[index:]))
        for index, token in enumerate(ids[:-1])
    ]
    return Episode([*vocabulary.copy, *ids, *vocabulary.end], questions)


def _counting(vocabulary: EpisodeVocabulary, random: np.random.Generator) -> Episode:
    """Repeats a symbol and asks how often, after five examples."""
    mark, most = vocabulary.symbols[0], 5
    numbers = random.permutation(np.arange(1, most + 1)).tolist()
    facts = []
    for number in numbers:
        facts += [mark] * number + vocabulary.end
        facts += _line(vocabulary, mark, vocabulary.digits[number])
    count = int(random.integers(1, most + 1))
    facts += [vocabulary.symbols[1]] * (most - count) + [mark] * count + vocabulary.end
    candidates = vocabulary.digits[1 : most + 1]
    question = Question([mark, *vocabulary.between], vocabulary.digits[count], candidates)
    return Episode(facts, [question])


TASKS: dict[str, Callable[[EpisodeVocabulary, np.random.Generator], Episode]] = {
    "induction": _induction,
    "recall": partial(_pairs, num_pairs=4, num_questions=1),
    "several": partial(_pairs, num_pairs=8, num_questions=4),
    "passkey": _passkey,
    "copying": _copying,
    "counting": _counting,
}
"""Name → function that makes an episode: one pair; one of four pairs; four of eight pairs; four
digits; a list of eight words; the number of repetitions of a word."""
