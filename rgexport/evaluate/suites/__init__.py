"""The suites, one module each.

A suite has a `NAME` and four functions: `pieces` yields the pieces to measure for a model,
`measure` returns the result of a piece, `summary` the figures of a model from the results of its
pieces, and `differences` compares the results of two models.
"""

from types import ModuleType

from rgexport.evaluate.suites import length, memory, noise, tasks, text, window

SUITES: dict[str, ModuleType] = {
    suite.NAME: suite for suite in (text, memory, noise, window, length, tasks)
}
"""Name → module."""
BY_DEFAULT = text.NAME, memory.NAME, noise.NAME
"""The suites that run if none is named; and `tasks`, if tasks are named."""
