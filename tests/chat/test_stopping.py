"""Stop strings against their definition."""

from hypothesis import given
from hypothesis import strategies as st

from rgexport.chat.stopping import StopStrings

LETTERS = st.text("ab\n", max_size=30)


@given(text=LETTERS, stops=st.lists(st.text("ab\n", max_size=4), max_size=3), data=st.data())
def test_the_text_ends_where_a_stop_string_begins(text, stops, data):
    """However it is cut into pieces, and never a character more or less."""
    stopping, found, rest = StopStrings(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += stopping.add(rest[:size])
        rest = rest[size:]
        if stopping.found:
            break
    if not stopping.found:
        found += stopping.finish()
    seen = text[: len(text) - len(rest)]
    places = [seen.index(stop) for stop in stops if stop and stop in seen]
    assert found == seen[: min(places, default=len(seen))]
    assert bool(places) == (stopping.found is not None)


def test_text_is_held_back_only_where_a_stop_string_may_begin() -> None:
    stopping = StopStrings(["\n\nUser:", "END"])
    assert stopping.add("Hello\n") == "Hello"
    assert stopping.add("there\n\nUs") == "\nthere"
    assert stopping.add("ual") == "\n\nUsual"
    assert stopping.add(" E") == " "
    assert stopping.finish() == "E"


def test_the_first_stop_string_counts() -> None:
    stopping = StopStrings(["b", "ab"])
    assert stopping.add("xxab") == "xx" and stopping.found == "ab"
    assert stopping.add("more") == ""
