"""The schema that is declared here is coremltools' own, as far as it goes."""

from typing import Any

import pytest

pytest.importorskip("coremltools")

from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2

from rgexport.export.mil import schema

ENTRIES = {
    **{"TextEntry": ("Metadata", "userDefined"), "FunctionEntry": ("Program", "functions")},
    **{"BlockEntry": ("Function", "block_specializations")},
    **{"ArgumentEntry": ("Operation", "inputs"), "ValueEntry": ("Operation", "attributes")},
}
"""Entries of maps → the message and the field that is the map."""
NESTED = {
    **{"Binding": MIL_pb2.Argument, "ConstantDimension": MIL_pb2.Dimension},
    **dict.fromkeys(("ImmediateValue", "BlobFileValue"), MIL_pb2.Value),
}
REPEATED = {
    name.removeprefix("Repeated"): message
    for name, message in MIL_pb2.TensorValue.DESCRIPTOR.nested_types_by_name.items()
}


def original(name: str) -> Any:
    """The descriptor of the message that is called `name` here."""
    if name in ENTRIES:
        owner, field = ENTRIES[name]
        return original(owner).fields_by_name[field].message_type
    if name in NESTED:
        return NESTED[name].DESCRIPTOR.nested_types_by_name[name]
    if name in REPEATED:
        return REPEATED[name]
    files = (MIL_pb2, Model_pb2, FeatureTypes_pb2)
    return next(getattr(f, name) for f in files if hasattr(f, name)).DESCRIPTOR


@pytest.mark.parametrize("name", sorted(schema.SCHEMA.keys() - {"Other"}))
def test_fields_are_those_of_coremltools(name: str) -> None:
    ours = schema.Model.DESCRIPTOR.file.message_types_by_name[name]
    theirs = original(name)
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.is_repeated) == (other.number, other.is_repeated)
        # An enumeration is a number on the wire.
        kinds = {other.type, other.TYPE_INT32} if other.enum_type else {other.type}
        assert field.type in kinds, field.name
        together = {f.name for f in other.containing_oneof.fields} if other.containing_oneof else ()
        if field.containing_oneof:
            assert {f.name for f in field.containing_oneof.fields} <= set(together)
        elif other.containing_oneof:
            assert len(together) == 1 or len([f for f in ours.fields if f.name in together]) == 1


def test_dtypes_are_those_of_coremltools() -> None:
    theirs = {
        number: name.lower() for name, number in MIL_pb2.DataType.items() if name != "UNUSED_TYPE"
    }
    assert theirs == schema.DATA_TYPES
    arrays = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.items()
    names = {number: name.lower().replace("double", "float64") for name, number in arrays if number}
    assert names == schema.ARRAY_TYPES
