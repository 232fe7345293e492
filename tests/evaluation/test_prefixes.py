"""Reading of texts that begin alike, on a session whose state tells any two texts apart."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.errors import RequestError
from rgexport.evaluation.harness import prefixes
from rgexport.evaluation.harness.answers import GreedyReply, LmRequest, answer, write_replies
from rgexport.evaluation.harness.prefixes import ScoredText, score
from rgexport.evaluation.losses import nats
from rgexport.griffin.checkpoint import demo_folder
from tests.toy_session import ToySession

VOCAB = 30
TOKENIZER = load_tokenizer(demo_folder())
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


@settings(max_examples=100)
@given(st.lists(st.tuples(TEXTS, IDS, st.integers(0, 12)), min_size=1, max_size=12))
def test_likelihoods_are_those_of_each_text_alone(drawn):
    """Scores the last tokens of each text; the very last one is arbitrary."""
    scored = [
        ScoredText(ids, (*ids[1:], last)[-count:] if count else ()) for ids, last, count in drawn
    ]
    session = Watched()
    sums, likeliest, read = score(session, scored)
    for index, one in enumerate(scored):
        logits = ToySession(VOCAB).prefill(np.array([one.ids]), len(one.targets))
        logits = logits[:, -len(one.targets) :]
        expected = nats(logits, np.array([one.targets])).sum() if one.targets else 0
        assert sums[index] == pytest.approx(expected, abs=1e-6)
        top = logits.argmax(-1).tolist() == [[*one.targets]] if one.targets else True
        assert likeliest[index] == top
    assert read == session.fed <= sum(len(one.ids) for one in scored)


@pytest.mark.parametrize("wrong", [None, 0, 2, 5])
def test_likeliest_is_what_has_no_other_token(wrong, monkeypatch):
    monkeypatch.setattr(prefixes, "_LOGITS_BYTES", 4 * VOCAB * 2)
    session, targets, ids = ToySession(VOCAB), [], [4, 5, 6]
    logits = session.prefill(np.array([ids]))[:, -1]
    for place in range(6):
        likeliest = int(logits.argmax())
        targets.append((likeliest + 1) % VOCAB if place == wrong else likeliest)
        logits = session.step(np.array(targets[-1:]))
    watched = Watched()
    scored = [ScoredText((*ids, *targets[:-1]), tuple(targets))]
    _, likeliest, read = score(watched, scored)
    assert likeliest.tolist() == [wrong is None]
    assert watched.widest <= 2 and read == 8


@settings(max_examples=30)
@given(st.lists(TEXTS, min_size=1, max_size=20), st.lists(st.integers(0, 6), min_size=20))
def test_replies_are_those_to_each_text_alone(contexts, most):
    settings = [{"max_gen_toks": n, "until": "e"} for n in most[: len(contexts)]]
    replies = [GreedyReply(TOKENIZER, each) for each in settings]
    write_replies(ToySession(TOKENIZER.vocab_size), contexts, replies)
    for ids, reply, each in zip(contexts, replies, settings, strict=True):
        alone, expected = ToySession(TOKENIZER.vocab_size), GreedyReply(TOKENIZER, each)
        logits = alone.prefill(np.array([ids]))[0]
        while not expected.done:
            expected.add(int(logits.argmax()))
            logits = alone.step(np.array([expected.ids[-1]]))
        assert reply.text == expected.text


def test_what_questions_have_in_common_is_read_once():
    """Examples before all questions, and each question before its answers."""
    shown = "".join(f"Question: is {n} a small number?\nAnswer: yes\n\n" for n in range(5))
    asked = [
        LmRequest.of("loglikelihood", f"{shown}Question: is a {noun} larger than me?\nAnswer:", end)
        for noun in ("house", "mouse", "cathedral", "letter", "number")
        for end in (" yes", " no", " perhaps it is so", " perhaps it is not")
    ]
    session = Watched(TOKENIZER.vocab_size)
    result = answer(TOKENIZER, session, asked)
    prefix = [2, *TOKENIZER.encode_text(f"{shown}Question: is a")]
    assert {session.taken[place] for place in enumerate(prefix)} == {1}
    question = TOKENIZER.encode_text(" larger than me?\nAnswer:")
    assert result["read"] == session.fed < len(prefix) + 5 * (len(question) + 4 + 12)
    assert result["asked"] > 20 * len(prefix)
    assert len({log for log, _ in result["answers"]}) == len(asked)


def test_a_reply_ends_before_a_stop_and_with_a_turn():
    ids = TOKENIZER.encode_text("One. Two. Three")
    for until, text in (([". T"], "One"), ("Three", "One. Two. "), ([], "One. Two. Three")):
        reply = GreedyReply(TOKENIZER, {"until": until})
        for token in [*ids, TOKENIZER.end_of_turn_id]:
            if not reply.done:
                reply.add(token)
        assert reply.done and reply.text == text


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (("generate_until", "Once", {"do_sample": True, "temperature": 0.7}), r"at random \(temp"),
        (("generate_until", "Once", {"num_beams": 4}), "sets num_beams for its answers; expected"),
        (("loglikelihood", "Is it so?", ""), "how likely an empty text is, after 'Is it so"),
        (("generate_until", "Once", {}), "logits are NaN or infinite"),
    ],
)
def test_what_has_no_answer_is_told_of(asked, line):
    broken = ToySession(TOKENIZER.vocab_size)
    broken._embedding[:] = np.nan
    with pytest.raises(RequestError, match=line):
        answer(TOKENIZER, broken, [LmRequest.of(*asked)])
