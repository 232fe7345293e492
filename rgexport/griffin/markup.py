"""Tells markup in a vocabulary (turn tokens, `<mask>`, `<unusedN>`) from text."""

import re

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# Gemma has pieces for some HTML tags: those are text.
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|[bius]|sub|sup|code)>"
)


def is_markup(piece: str) -> bool:
    """Whether a user-defined piece is markup, which text must not be encoded to."""
    return bool(_MARKUP.fullmatch(piece)) and not _HTML.fullmatch(piece)
