"""Drafts from what a text repeats, and replies that stay the same whatever is drafted."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.chat.jobs import End, Request
from rgexport.chat.lookup import Draft, Lookup
from rgexport.chat.prefix_store import PrefixStore
from rgexport.chat.sampling import Sampling
from rgexport.chat.scheduler import Counters, Scheduler
from rgexport.chat.speculation import Speculation
from tests.chat.test_scheduler import VOCAB, Heard
from tests.toy_session import ToySession


def best_drafts(ids: Sequence[int], source: Sequence[int], most: int) -> list[list[int]]:
    """The drafts from all places with the longest match, each looked at one token at a time."""
    found: dict[int, list[list[int]]] = {}
    for text, own in ((list(source), False), (list(ids), True)):
        for end in range(2, len(text)):
            same = 0
            while same < min(end, len(ids)) and text[end - 1 - same] == ids[-1 - same]:
                same += 1
            after = text[end:]
            while own and len(after) < most:
                after.append((text + after)[end + len(after)])
            if same >= 2:
                found.setdefault(min(same, 8), []).append(after[:most])
    return found[max(found)] if found else [[]]


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    source=st.lists(st.integers(0, 2), max_size=4),
    first=st.integers(1, 6),
)
def test_a_draft_is_what_came_after_the_longest_match(ids, source, first):
    """Also while the text grows; so short that all places are remembered."""
    text = ids[:first]
    lookup = Lookup(text, source)
    assert list(lookup.draft(5).tokens) in best_drafts(text, source, 5)
    text.extend(ids[first:])
    assert list(lookup.draft(5).tokens) in best_drafts(text, source, 5)


def test_the_longest_match_wins_and_then_the_last() -> None:
    assert Lookup([1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3]).draft(2) == Draft([4, 5], 3)
    assert Lookup([2, 3, 4, 0, 2, 3, 5, 1, 6, 2, 3]).draft(1) == Draft([5], 2)
    assert Lookup([7, 8, 9, 1, 2], [0, 1, 2, 3]).draft(9) == Draft([3], 2)
    assert Lookup([1, 2, 3]).draft(4) == Draft()


def test_a_text_that_repeats_itself_goes_on_so() -> None:
    assert Lookup([9, 1, 2, 1, 2, 1]).draft(5) == Draft([2, 1, 2, 1, 2], 3)


def test_chances_follow_what_came() -> None:
    lookup = Lookup([1, 2, 3, 4, 1, 2])
    draft = lookup.draft(2)
    first, second = lookup.chances(draft)
    assert first < second, "the second one is tried only where the first was right"
    for _ in range(40):
        lookup.learn(draft, [3, 9])
    first, second = lookup.chances(draft)
    assert first > 0.9 and second < 0.1


class Circle(ToySession):
    """It goes round twelve tokens, but stumbles at some positions; it is exact for any number."""

    def __init__(self) -> None:
        super().__init__(VOCAB)
        self.info = replace(self.info, exact_tokens=8)

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        place = slice(rows.start, rows.stop)
        at = self.position[place, None] + np.arange(tokens.shape[1])
        super()._take(rows, tokens, 1)
        following = (tokens + 1 + (at % 20 == 7)) % 12
        logits: np.ndarray = 3 * np.eye(VOCAB, dtype=np.float32)[following]
        return logits[:, -num_logits:]


def replies(
    asked: Sequence[dict[str, Any]], *, rows: int, lookup: bool
) -> tuple[list[tuple[list[int], str]], Counters]:
    """What is written for each request, and why it ended."""
    scheduler = Scheduler(Circle(), PrefixStore(1 << 20), rows=rows, lookup=lookup)
    heard = []
    for request in asked:
        listener = Heard(request.get("leaves"))
        fields = {name: value for name, value in request.items() if name != "leaves"}
        scheduler.submit(Request(listener=listener, **fields))
        heard.append(listener)
    ends: list[End] = [listener.wait() for listener in heard]
    scheduler.close()
    written = [listener.tokens for listener in heard]
    return list(zip(written, [end.reason for end in ends], strict=True)), scheduler.counters


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drafted is tried, however long that takes."""
    monkeypatch.setattr(Speculation, "_time", lambda self, rows, tokens, step: step)


REQUEST = st.fixed_dictionaries(
    {
        "ids": st.lists(st.integers(0, 12), min_size=1, max_size=30),
        "max_new_tokens": st.integers(1, 40),
        "sampling": st.sampled_from(
            [Sampling(), Sampling(temperature=0.9, seed=4), Sampling(repetition_penalty=1.4)]
        ),
        "stop_ids": st.sampled_from([(), (5,)]),
        "draft": st.sampled_from([(), (3, 4, 5, 6, 7, 8)]),
        "leaves": st.sampled_from([None, None, 6]),
    }
)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 5), asked=st.lists(REQUEST, min_size=1, max_size=6))
@pytest.mark.usefixtures("eager")
def test_drafts_change_no_reply(rows: int, asked: list[dict[str, Any]]) -> None:
    """Greedy or by chance, with stops and penalties, alone and with others."""
    plain, counted = replies(asked, rows=rows, lookup=False)
    assert counted.drafted_tokens == 0
    assert replies(asked, rows=rows, lookup=True)[0] == plain


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("rows", [1, 2])
def test_drafts_save_steps(rows: int) -> None:
    # So long that it does not matter when the second one joins.
    asked = [{"ids": [1, 2, 3], "max_new_tokens": 900}] * rows
    plain, counted = replies(asked, rows=rows, lookup=False)
    found, faster = replies(asked, rows=rows, lookup=True)
    assert found == plain
    assert faster.steps < counted.steps / 2
    assert faster.accepted_tokens > 0.5 * faster.drafted_tokens


def test_nothing_is_drafted_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tokens take eight steps' time."""
    monkeypatch.setattr(Speculation, "_time", lambda self, rows, tokens, step: tokens * step)
    asked = [{"ids": [1, 2, 3], "max_new_tokens": 120}]
    assert replies(asked, rows=1, lookup=True)[1].drafted_tokens == 0


def test_times_are_those_of_this_machine() -> None:
    passes = Speculation(8)
    likely = [[0.9] * 7]
    assert passes._length(likely, 7) == 0, "nothing is known"
    passes.passed(1, 1, 9.0)
    assert passes._length(likely, 7) == 0, "the first pass tells nothing"
    passes.passed(1, 1, 1.0)
    assert passes._length(likely, 7) > 1
    for _ in range(30):
        passes.passed(1, 4, 4.0)
    assert passes._length(likely, 7) == 0, "what is known of four tokens goes for other numbers"
    for _ in range(30):
        passes.passed(1, 8, 1.1)
    assert passes._length(likely, 7) == 7
    assert passes._length([[]], 7) == 0


def test_a_bad_time_of_the_machine_is_forgotten() -> None:
    """The truth is that each further token takes a tenth of a step."""
    passes, likely = Speculation(8), [[0.9] * 7]

    def run(count: int, slower: float = 1.0) -> int:
        for _ in range(count):
            tokens = passes._length(likely, 7) + 1
            passes.passed(1, tokens, (1 + 0.1 * (tokens - 1)) * (slower if tokens > 1 else 1))
        return passes._length(likely, 7)

    assert run(40) == 7
    assert run(40, slower=9) == 0
    assert run(400) >= 5


def test_a_plain_step_is_measured_again() -> None:
    passes, likely = Speculation(8), [[0.9] * 7]
    taken = []
    for _ in range(300):
        taken.append(passes._length(likely, 7) + 1)
        passes.passed(1, taken[-1], 1.0)
    assert 4 <= taken.count(1) <= 12
