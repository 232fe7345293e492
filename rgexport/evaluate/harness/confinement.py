"""Where lm_eval works: silent, by its own seeds, and with templates that can do no harm."""

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError

_SEEDS = 0, 1234
"""lm_eval's own, of Python and numpy."""


def require_installed() -> None:
    """Refuses what lm_eval is for where it is missing.

    Raises:
        NotInstalled: it is.
    """
    try:
        import lm_eval.evaluator  # noqa: F401
    except ImportError:
        raise NotInstalled("the suite tasks needs lm_eval: pip install 'rgexport[tasks]'") from None


@contextmanager
def within(what: str) -> Iterator[None]:
    """All that lm_eval does is done within.

    Raises:
        RequestError: it fails to do `what`.
    """
    import datasets
    import lm_eval.utils

    templates, counted = lm_eval.utils.env, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    before = random.getstate(), np.random.get_state(), logging.root.manager.disable
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    logging.disable(logging.CRITICAL)
    lm_eval.utils.env = _sandbox(templates)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request to the hub, even for local files
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RequestError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())
        raise RequestError(f"lm_eval cannot {what}: {type(cause).__name__}: {reason}") from None
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        logging.disable(before[2])
        lm_eval.utils.env = templates
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted


def _sandbox(environment: Any) -> Any:
    """As an environment of Jinja: a template is a program, too, and comes with a task file."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    sandbox = SandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    sandbox.filters |= environment.filters
    return sandbox
