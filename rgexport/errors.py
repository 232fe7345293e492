"""Errors that users see, and untrusted text on one printable line."""

import errno
import json
from unicodedata import category

MOST_SHOWN = 900
"""Limit of a message in characters; a longer one loses its middle."""


class RequestError(Exception):
    """The request cannot be met as it was put.

    The message is one line: what is wrong, what was found, what was expected, what to do.
    """


class NotExported(RequestError):
    """A checkpoint was given where an artifact is needed."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} is a checkpoint; export it first: rgexport onnx {model} --int4")


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some space, or choose another disk"),
    errno.EROFS: "; choose another folder",
}


def system_reason(error: OSError) -> str:
    """Returns what the system says of an error, and what to do about a full or read-only disk."""
    return f"{error.strerror or error}{_REMEDIES.get(error.errno or 0, '')}"


class NotInstalled(RequestError):
    """A program or package that the request needs is missing, or is unsuitable."""


def system_error(error: BaseException) -> OSError | None:
    """Returns the error of the operating system that led to this one, if one did."""
    causes = error, error.__cause__, error.__context__
    return next((cause for cause in causes if isinstance(cause, OSError)), None)


def reason(error: BaseException) -> str:
    """Returns the message of another program's error on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


_HARMFUL = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # categories that a terminal obeys or hides
JOINERS = "\u200c\u200d"  # harmless characters of category Cf: scripts and emoji need them


def printable(text: str, allowed: str = "") -> str:
    """Escapes control characters except those in `allowed`, as JSON does: JSON stays equal JSON."""
    if text.isprintable():
        return text
    harmless = allowed + JOINERS
    return "".join(
        json.dumps(c)[1:-1] if category(c) in _HARMFUL and c not in harmless else c for c in text
    )


def one_line(text: str, most: int = MOST_SHOWN) -> str:
    """Returns `text` as one printable line of bounded length."""
    line = printable(" ".join(text.split()))
    if len(line) <= most:
        return line
    end = most // 3  # what to do comes last
    return f"{line[: most - end - 5]} ... {line[-end:]}"
