"""Converts coremltools' program to Core ML's protobuf; only this file uses its private names.

Written against coremltools 9, whose `MILProtoExporter` calls a method for the value of every
constant. Placeholders of weights become places in the file of weights, which is written without
coremltools. All other constants are small and are stored in the program itself.
"""

from collections.abc import Mapping
from typing import Any

from coremltools import _SPECIFICATION_VERSION_IOS_18 as IOS_18
from coremltools.converters.mil.backend.mil import helper
from coremltools.converters.mil.backend.mil.load import CoreMLProtoExporter, MILProtoExporter
from coremltools.converters.mil.mil import Builder, Program, Var
from coremltools.proto.MIL_pb2 import Value
from coremltools.proto.Model_pb2 import Model

from rgexport.export.coreml.storage import BLOB_HEADER_BYTES
from rgexport.export.manifest import StoredPart

_FILE = "@model_path/weights/weight.bin"


class _Exporter(MILProtoExporter):
    """Replaces placeholders of weights by places in the file of weights."""

    def __init__(self, program: Program, parts: Mapping[str, StoredPart]):
        super().__init__(program, weights_dir="", specification_version=IOS_18)
        self._parts = parts

    def get_milproto_value(self, var: Var) -> Value:
        part = self._parts.get(var.name)
        if part is None:
            return helper.create_immediate_value(var)
        return helper.create_file_value_tensor(
            file_name=_FILE,
            offset=part.offset - BLOB_HEADER_BYTES,
            dim=var.shape,
            data_type=helper.types_to_proto_primitive(var.dtype),
        )


def forget_names() -> None:
    """Resets coremltools' counters, so that names do not depend on earlier exports."""
    Builder.name_count.clear()


def to_model(program: Program, parts: Mapping[str, StoredPart]) -> Model:
    """Converts a program; `parts` has the name of each placeholder → the stored part.

    No passes run over the program: coremltools' deduplication would merge placeholders.
    """
    program.export_as_multifunction = True
    names: dict[str, Any] = dict.fromkeys(
        ("predicted_feature_name", "predicted_probabilities_name", "classifier_config")
    )
    exporter = CoreMLProtoExporter(
        program,
        _Exporter(program, parts).export(),
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=IOS_18,
        **names,
    )
    return exporter.export(IOS_18)
