"""Reading of texts that begin alike, on a session whose state tells any two texts apart."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.evaluate.harness import prefixes
from rgexport.evaluate.harness.answers import Asked, answered
from rgexport.evaluate.harness.generations import Generations, Reply
from rgexport.evaluate.harness.likelihoods import Likelihoods, Scored
from rgexport.evaluate.losses import nats
from rgexport.griffin.checkpoint import demo_folder
from tests.toy_session import ToySession

VOCAB = 30
IDS = st.integers(0, VOCAB - 1)
PARTS = st.sampled_from([tuple(range(n, n + length)) for n in (0, 5) for length in (1, 3, 9, 12)])
"""Of few kinds, so that texts begin alike over short and long stretches."""
TEXTS = st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: sum(parts, ()))


class Watched(ToySession):
    """Knows which tokens were taken at which positions."""

    def __init__(self, vocab_size: int = VOCAB) -> None:
        super().__init__(vocab_size)
        self.taken: Counter[tuple[int, int]] = Counter()
        self.widest = 0

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        for row, ids in zip(rows, tokens.tolist(), strict=True):
            self.taken.update(enumerate(ids, int(self.position[row])))
        self.widest = max(self.widest, len(rows) * num_logits)
        return super()._take(rows, tokens, num_logits)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXTS, IDS, st.integers(0, 12)), min_size=1, max_size=12))
def test_likelihoods_are_those_of_each_text_alone(drawn):
    """Of the last so many tokens, of which the very last is anyone's."""
    scored = [Scored(ids, (*ids[1:], last)[-count:] if count else ()) for ids, last, count in drawn]
    session = Watched()
    found = Likelihoods(session, scored)
    found.run()
    for index, one in enumerate(scored):
        alone = ToySession(VOCAB)
        logits = alone.prefill(np.array([one.ids]), len(one.targets))[:, -len(one.targets) :]
        expected = nats(logits, np.array([one.targets])).sum() if one.targets else 0
        assert found.nats[index] == pytest.approx(expected, abs=1e-6)
        likeliest = logits.argmax(-1).tolist() == [[*one.targets]] if one.targets else True
        assert found.likeliest[index] == likeliest
    assert found.read == session.fed <= sum(len(one.ids) for one in scored)


@pytest.mark.parametrize("wrong", [None, 0, 2, 5])
def test_likeliest_is_what_has_no_other_token(wrong, monkeypatch):
    monkeypatch.setattr(prefixes, "_LOGITS_BYTES", 4 * VOCAB * 2)
    session, targets, ids = ToySession(VOCAB), [], [4, 5, 6]
    logits = session.prefill(np.array([ids]))[:, -1]
    for place in range(6):
        likeliest = int(logits.argmax())
        targets.append((likeliest + 1) % VOCAB if place == wrong else likeliest)
        logits = session.step(np.array(targets[-1:]))
    found = Likelihoods(ToySession(VOCAB), [Scored((*ids, *targets[:-1]), tuple(targets))])
    found.run()
    assert found.likeliest.tolist() == [wrong is None]


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=20), st.lists(st.integers(0, 6), min_size=20))
def test_replies_are_those_to_each_text_alone(contexts, most):
    tokenizer = load_tokenizer(demo_folder())
    settings = [{"max_gen_toks": n, "until": "e"} for n in most[: len(contexts)]]
    replies = [Reply(tokenizer, each) for each in settings]
    Generations(Watched(tokenizer.vocab_size), contexts, replies).run()
    for ids, reply, each in zip(contexts, replies, settings, strict=True):
        alone, expected = ToySession(tokenizer.vocab_size), Reply(tokenizer, each)
        logits = alone.prefill(np.array([ids]))[0]
        while not expected.done:
            expected.add(int(logits.argmax()))
            logits = alone.step(np.array([expected.last]))
        assert reply.text == expected.text


def test_few_logits_are_there_at_once(monkeypatch):
    monkeypatch.setattr(prefixes, "_LOGITS_BYTES", 4 * VOCAB * 5)
    scored = [Scored((1, *range(20)), tuple(range(1, 21))), Scored((2, *range(20)), (3,) * 21)]
    session, whole = Watched(), Likelihoods(ToySession(VOCAB), scored)
    found = Likelihoods(session, scored)
    found.run()
    monkeypatch.undo()
    whole.run()
    np.testing.assert_allclose(found.nats, whole.nats, rtol=1e-6)
    assert session.widest <= 5 and found.read == 42


def test_what_questions_have_in_common_is_read_once():
    """Examples before all questions, and each question before its answers."""
    tokenizer = load_tokenizer(demo_folder())
    shown = "".join(f"Question: is {n} a small number?\nAnswer: yes\n\n" for n in range(5))
    asked = [
        Asked.of("loglikelihood", f"{shown}Question: is a {noun} larger than me?\nAnswer:", answer)
        for noun in ("house", "mouse", "cathedral", "letter", "number")
        for answer in (" yes", " no", " perhaps it is so", " perhaps it is not")
    ]
    session = Watched(tokenizer.vocab_size)
    found = answered(tokenizer, session, asked)
    prefix = [2, *tokenizer.encode_text(f"{shown}Question: is a")]
    assert {session.taken[place] for place in enumerate(prefix)} == {1}
    question = tokenizer.encode_text(" larger than me?\nAnswer:")
    assert found["read"] == session.fed < len(prefix) + 5 * (len(question) + 4 + 12)
    assert found["asked"] > 20 * len(prefix)
    assert len({log for log, _ in found["answers"]}) == len(asked)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"do_sample": True, "temperature": 0.7}, r"at random \(temperature 0.7\)"),
        ({"num_beams": 4}, "sets num_beams for its answers; expected do_sample, max_"),
    ],
)
def test_replies_are_of_the_likeliest_tokens(settings, line):
    with pytest.raises(RequestError, match=line):
        Reply(load_tokenizer(demo_folder()), settings)


def test_a_reply_ends_before_a_stop_and_with_a_turn():
    tokenizer = load_tokenizer(demo_folder())
    ids = tokenizer.encode_text("One. Two. Three")
    for until, text in (([". T"], "One"), ("Three", "One. Two. "), ([], "One. Two. Three")):
        reply = Reply(tokenizer, {"until": until})
        for token in [*ids, tokenizer.end_of_turn_id]:
            if not reply.done:
                reply.add(token)
        assert reply.done and reply.text == text


def test_nothing_to_judge_is_told_of():
    tokenizer = load_tokenizer(demo_folder())
    with pytest.raises(RequestError, match="how likely an empty text is, after 'Is it so"):
        answered(tokenizer, ToySession(8192), [Asked.of("loglikelihood", "Is it so?", "")])


def test_logits_that_are_no_numbers_are_told_of():
    class Broken(ToySession):
        def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
            return super()._take(rows, tokens, num_logits) * np.float32(np.nan)

    asked = [Asked.of("generate_until", "Once", {})]
    with pytest.raises(RequestError, match="logits are NaN or infinite"):
        answered(load_tokenizer(demo_folder()), Broken(8192), asked)
