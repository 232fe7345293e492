"""The suites: a module for each name in `choices.SuiteName`, which is their registry.

A suite has functions: `chains` yields the pieces to measure for a model, `measure` returns the
result of a piece, `summary` the figures of a model from the results of its pieces, and
`differences` compares the results of two models. `tables` and `charts` show the figures of several
models, which are in `model["suites"][name]`. For the verdict, `lost` returns what a model loses in
each place, such as a domain. `UNIT` is the unit of losses, empty if those of several places cannot
be added up, and `INDEPENDENT` says whether their errors are. A suite may also have `scored`, which
makes other results of those of the pieces, for `summary` and `differences`.
"""

from importlib import import_module
from typing import get_args

from rgexport.choices import SuiteName

SUITES = {name: import_module(f"{__name__}.{name}") for name in get_args(SuiteName)}
BY_DEFAULT = "text", "memory", "noise"
"""The suites that run if none is named; and `tasks`, if tasks are named."""


def forget_files() -> None:
    """Clears the caches of all suites, as files may have changed."""
    for suite in SUITES.values():
        for function in vars(suite).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
