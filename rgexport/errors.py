"""The one error type that a user sees, and how text of somebody's file is shown to them."""

MOST_SHOWN = 900
"""Characters of a message; more of it is cut out of its middle."""


class RequestError(Exception):
    """The request cannot be met as it was put.

    The message is one line: what is wrong, what was found, what was expected, what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class NotInstalled(RequestError):
    """What would run or compute it is not on this machine, or not in a form that can."""


def printable(text: str, kept: str = "") -> str:
    """`text` with `?` for what a terminal would obey instead of showing, but for `kept`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else "?" for c in text)


def one_line(text: str) -> str:
    """`text` as one line of bounded length, whatever a file has put into it."""
    line = printable(" ".join(text.split()))
    if len(line) <= MOST_SHOWN:
        return line
    end = MOST_SHOWN // 3  # what to do comes last
    return f"{line[: MOST_SHOWN - end - 5]} ... {line[-end:]}"
