"""Which pieces of a vocabulary are markup, not text: turn tokens, `<mask>`, `<unusedN>`."""

import re

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# A piece that looks like markup is special, unless it is one of the HTML tags that Gemma gives
# a piece of their own: those are text.
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|[bius]|sub|sup|code)>"
)


def is_markup(piece: str) -> bool:
    """Whether a user-defined piece is markup that no text should be able to write."""
    return bool(_MARKUP.fullmatch(piece)) and not _HTML.fullmatch(piece)
