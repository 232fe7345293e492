"""Converts a coremltools program to Core ML's protobuf.

The program has placeholders for weights, which become offsets in the weight file; rgexport writes
that without coremltools. Only this file uses internals of coremltools, as of version 9:
`MILProtoExporter` calls `get_milproto_value` for the value of every constant.
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

_WEIGHT_FILE = "@model_path/weights/weight.bin"


class _Exporter(MILProtoExporter):
    def __init__(self, program: Program, parts: Mapping[str, StoredPart]):
        super().__init__(program, weights_dir="", specification_version=IOS_18)
        self._parts = parts

    def get_milproto_value(self, var: Var) -> Value:
        part = self._parts.get(var.name)
        if part is None:
            return helper.create_immediate_value(var)
        return helper.create_file_value_tensor(
            file_name=_WEIGHT_FILE,
            offset=part.offset - BLOB_HEADER_BYTES,  # Core ML expects the offset of the header
            dim=var.shape,
            data_type=helper.types_to_proto_primitive(var.dtype),
        )


def reset_name_counters() -> None:
    """Makes generated names independent of earlier exports in this process."""
    Builder.name_count.clear()


def to_model(program: Program, parts: Mapping[str, StoredPart]) -> Model:
    """Converts a program; `parts` has placeholder → its part in the weight file.

    No passes run over it, because coremltools' deduplication would merge placeholders.
    """
    program.export_as_multifunction = True
    no_classifier: dict[str, Any] = dict.fromkeys(  # required arguments
        ("predicted_feature_name", "predicted_probabilities_name", "classifier_config")
    )
    exporter = CoreMLProtoExporter(
        program,
        _Exporter(program, parts).export(),
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=IOS_18,
        **no_classifier,
    )
    return exporter.export(IOS_18)
