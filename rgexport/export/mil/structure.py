"""All that can be known to be wrong with a package without running it or reading its weights."""

from collections.abc import Iterator

from rgexport.export.mil.agreement import check_against
from rgexport.export.mil.interface_checks import check_interfaces
from rgexport.export.mil.package import Package
from rgexport.export.mil.state_checks import check_states
from rgexport.export.mil.typing_checks import check_operations
from rgexport.export.mil.weight_checks import check_weights

__all__ = ["check_against", "check_package"]

ALIGNMENT = 32
"""Of the last axis of a state, so that the Neural Engine takes it."""


def check_package(
    package: Package, *, alignment: int | None = ALIGNMENT, types: bool = True
) -> list[str]:
    """Complaints, each of one line that names the function, and the operation, state or tensor.

    Args:
        package: from anyone.
        alignment: what the last axes of states must be multiples of; None for any.
        types: whether those of all operations are inferred, for which coremltools is loaded.
    """
    return list(_complaints(package, alignment, types))


def _complaints(package: Package, alignment: int | None, types: bool) -> Iterator[str]:
    for function in package.functions.values():
        yield from check_states(function, alignment)
        if types:
            yield from check_operations(function)
    yield from check_interfaces(package)
    yield from check_weights(package)
