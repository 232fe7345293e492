"""Whether the weights of a package lie where an artifact's manifest says.

The blobs of the operation that is named after a tensor must be the tensor's parts: so two weights
that were swapped are found, though both have the right types.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from rgexport.export.manifest import StoredPart, StoredTensor
from rgexport.export.mil.blob import HEADER_BYTES
from rgexport.export.mil.conventions import (
    Operations,
    bound_constants,
    check_conventions,
    operation_name,
    operations_by_name,
)
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import BITS, FileValue, Function, Immediate, Operation, Value
from rgexport.export.mil.typing_checks import CONST
from rgexport.quantize.scheme import Affine, Palette, Scheme

BLOCKWISE, LUT = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"
INPUTS: dict[str, dict[str, str]] = {
    CONST: {"val": "data"},
    BLOCKWISE: {"data": "data", "scale": "scales", "offset": "zero_points"},
    LUT: {"indices": "data", "lut": "lut"},
}
"""Operation that gives a weight → its inputs, and the parts of a tensor that these are."""

Tensors = Mapping[str, StoredTensor]


def check_against(package: Package, tensors: Tensors) -> list[str]:
    """Complaints about a package that an exporter of ours made, beside those of `check_package`.

    Args:
        package: the one in the artifact's folder.
        tensors: what the manifest says of each weight, by its canonical name.
    """
    return list(_complaints(package, tensors))


def _complaints(package: Package, tensors: Tensors) -> Iterator[str]:
    yield from check_conventions(package, {name: stored.shape for name, stored in tensors.items()})
    places = _Places(package, tensors)
    for function in package.functions.values():
        operations = operations_by_name(function)
        for tensor, stored in tensors.items():
            if operation := operations.get(operation_name(tensor)):
                where = f"{function.name}: {operation.type} {operation.label}"
                for complaint in places.check(operation, operations, tensor, stored):
                    yield f"{where}{complaint}"
        yield from places.foreign(function)


@dataclass(frozen=True)
class _Places:
    """Where the parts of all tensors lie."""

    package: Package
    tensors: Tensors

    def check(
        self, operation: Operation, operations: Operations, tensor: str, stored: StoredTensor
    ) -> Iterator[str]:
        """What is wrong with the operation that gives a weight; `, INPUT: …` or `: …`."""
        if operation.type not in (kinds := _kinds(stored.scheme)):
            yield f": {tensor} is stored as {stored.scheme.label}; expected {kinds[0]}"
            return
        values = bound_constants(operation, operations)
        for parameter, label in INPUTS[operation.type].items():
            complaints = self._check_part(values.get(parameter), tensor, stored, label)
            for complaint in complaints:
                yield f"{'' if parameter == 'val' else f', {parameter}'}: {complaint}"

    def _check_part(
        self, value: Value | None, tensor: str, stored: StoredTensor, label: str
    ) -> Iterator[str]:
        part, blob = stored.parts.get(label), f"{tensor}.{label}"
        if part is None:
            if value is not None and not _is_one(value):
                yield f"there is a value, but no {blob}"
        elif not isinstance(value, FileValue):
            yield f"it is no blob; expected {blob}"
        else:
            if (place := self._place(value)) != (part.file, part.offset):
                yield f"it is {self._owner(place)}; expected {blob} at {part.offset}"
            yield from _check_type(value, stored.scheme, part)

    def foreign(self, function: Function) -> Iterator[str]:
        """Blobs that are no part of any tensor."""
        known = {
            (part.file, part.offset)
            for stored in self.tensors.values()
            for part in stored.parts.values()
        }
        for operation in function.walk():
            for _, value in operation.constants:
                if isinstance(value, FileValue) and self._place(value) not in known:
                    where = f"{function.name}: {operation.type} {operation.label}"
                    yield f"{where}: its blob at {value.offset} is no tensor of the manifest"

    def _place(self, value: FileValue) -> tuple[str, int]:
        """The file, as a manifest has it, and where the data begin."""
        path = self.package.blob_files[value.file].path
        file = path.relative_to(self.package.path.parent).as_posix()
        return file, value.offset + HEADER_BYTES

    def _owner(self, place: tuple[str, int]) -> str:
        for tensor, stored in self.tensors.items():
            for label, part in stored.parts.items():
                if (part.file, part.offset) == place:
                    return f"{tensor}.{label}"
        return f"what lies at {place[1]} of {place[0]}"


def _kinds(scheme: Scheme) -> tuple[str, ...]:
    """The operations that give a weight that is stored so.

    Halves that are used as float32 come by way of a scale of 1, since a cast would be a copy.
    """
    if isinstance(scheme, Affine):
        return (BLOCKWISE,)
    return (LUT,) if isinstance(scheme, Palette) else (CONST, BLOCKWISE)


def _is_one(value: Value) -> bool:
    return isinstance(value, Immediate) and bool(np.all(value.array == 1))


def _check_type(value: FileValue, scheme: Scheme, part: StoredPart) -> Iterator[str]:
    """The dtype that the scheme means, and as many items as are stored; any shape of those."""
    dtype = part.dtype
    if isinstance(scheme, Affine | Palette) and dtype == "uint8" and scheme.bits < 8:
        signed = isinstance(scheme, Affine) and scheme.symmetric
        dtype = f"{'int' if signed else 'uint'}{scheme.bits}"
    items = 8 * part.nbytes // BITS[dtype]
    if value.type.dtype != dtype or value.type.size != items:
        yield f"it is {value.type}; the manifest has {items} items of {dtype}"
