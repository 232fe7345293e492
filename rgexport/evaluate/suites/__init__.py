"""The suites, each in a module of its own.

A suite has a `NAME` and four functions: `pieces` of work for a model, `measure` of a piece,
`summary` of what the pieces gave, and `differences` to the first model.
"""

from types import ModuleType

from rgexport.evaluate.suites import length, memory, noise, tasks, text, window

SUITES: dict[str, ModuleType] = {
    suite.NAME: suite for suite in (text, memory, noise, window, length, tasks)
}
"""Name → module."""
BY_DEFAULT = text.NAME, memory.NAME, noise.NAME
"""What runs where no suite is asked for; and `tasks`, where tasks are."""
