"""The one error type that a user sees, and how untrusted text is shown."""

MOST_SHOWN = 900
"""Characters of a message; a longer one loses its middle."""


class RequestError(Exception):
    """The request cannot be met as it was put.

    The message is one line: what is wrong, what was found, what was expected, what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class NotInstalled(RequestError):
    """A program or package that the request needs is missing, or is unsuitable."""


def system_error(error: BaseException) -> OSError | None:
    """Returns the error of the operating system that led to this one, if one did."""
    causes = error, error.__cause__, error.__context__
    return next((each for each in causes if isinstance(each, OSError)), None)


def printable(text: str, kept: str = "") -> str:
    """`text` with `?` for control characters, except those in `kept`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else "?" for c in text)


def one_line(text: str) -> str:
    """`text` as one printable line of bounded length."""
    line = printable(" ".join(text.split()))
    if len(line) <= MOST_SHOWN:
        return line
    end = MOST_SHOWN // 3  # what to do comes last
    return f"{line[: MOST_SHOWN - end - 5]} ... {line[-end:]}"
