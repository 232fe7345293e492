"""The one error type that a user sees."""


class RequestError(Exception):
    """The request cannot be met as it was put.

    The message is one line: what is wrong, what was found, what was expected, what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class NotInstalled(RequestError):
    """What would run or compute it is not on this machine, or not in a form that can."""
