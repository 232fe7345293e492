"""The part of Core ML's protobuf schema that a program consists of.

Declared here, field by field, so that a package can be read without coremltools (which imports
torch where there is one). Names and numbers are those of coremltools' `mlmodel/format/*.proto`.
A map is declared as the entries that it is on the wire: so a key that comes twice is seen.
"""

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "rgexport.mil"

_OTHER_KINDS = (
    "pipelineClassifier=200 pipelineRegressor=201 pipeline=202 glmRegressor=300 "
    "supportVectorRegressor=301 treeEnsembleRegressor=302 neuralNetworkRegressor=303 "
    "bayesianProbitRegressor=304 glmClassifier=400 supportVectorClassifier=401 "
    "treeEnsembleClassifier=402 neuralNetworkClassifier=403 kNearestNeighborsClassifier=404 "
    "neuralNetwork=500 itemSimilarityRecommender=501 customModel=555 linkedModel=556 "
    "classConfidenceThresholding=560 oneHotEncoder=600 imputer=601 featureVectorizer=602 "
    "dictVectorizer=603 scaler=604 categoricalMapping=606 normalizer=607 "
    "arrayFeatureExtractor=609 nonMaximumSuppression=610 identity=900 textClassifier=2000 "
    "wordTagger=2001 visionFeaturePrint=2002 soundAnalysisPreprocessing=2003 gazetteer=2004 "
    "wordEmbedding=2005 audioFeaturePrint=2006 serializedModel=3000"
)
"""What a model may be instead of a program: of several in one file, the last one counts."""

SCHEMA: dict[str, str] = {
    # Model.proto
    "Model": (
        "int32 specificationVersion 1, ModelDescription description 2, Program mlProgram 502 ?,"
        + ",".join(f"Other {kind.replace('=', ' ')} ?" for kind in _OTHER_KINDS.split())
    ),
    "ModelDescription": (
        "FeatureDescription* input 1, FeatureDescription* output 10, FeatureDescription* state 13,"
        "FunctionDescription* functions 20, string defaultFunctionName 21, Metadata metadata 100"
    ),
    "FunctionDescription": (
        "string name 1, FeatureDescription* input 2, FeatureDescription* output 3,"
        "FeatureDescription* state 6"
    ),
    "FeatureDescription": "string name 1, string shortDescription 2, FeatureType type 3",
    "Metadata": (
        "string shortDescription 1, string versionString 2, string author 3, string license 4,"
        "TextEntry* userDefined 100"
    ),
    "TextEntry": "string key 1, string value 2",
    # FeatureTypes.proto
    "FeatureType": "ArrayFeatureType multiArrayType 5 ?, StateFeatureType stateType 8 ?",
    "StateFeatureType": "ArrayFeatureType arrayType 1",
    "ArrayFeatureType": "int64* shape 1, int32 dataType 2",
    # MIL.proto
    "Program": (
        "int64 version 1, FunctionEntry* functions 2, string docString 3, ValueEntry* attributes 4"
    ),
    "FunctionEntry": "string key 1, Function value 2",
    "Function": (
        "NamedValueType* inputs 1, string opset 2, BlockEntry* block_specializations 3,"
        "ValueEntry* attributes 4"
    ),
    "BlockEntry": "string key 1, Block value 2",
    "Block": (
        "NamedValueType* inputs 1, string* outputs 2, Operation* operations 3,"
        "ValueEntry* attributes 4"
    ),
    "Operation": (
        "string type 1, ArgumentEntry* inputs 2, NamedValueType* outputs 3, Block* blocks 4,"
        "ValueEntry* attributes 5"
    ),
    "ArgumentEntry": "string key 1, Argument value 2",
    "Argument": "Binding* arguments 1",
    "Binding": "string name 1 ?, Value value 2 ?",
    "ValueEntry": "string key 1, Value value 2",
    "NamedValueType": "string name 1, ValueType type 2",
    "ValueType": (
        "TensorType tensorType 1 ?, Other listType 2 ?, Other tupleType 3 ?,"
        "Other dictionaryType 4 ?, StateType stateType 5 ?"
    ),
    "TensorType": "int32 dataType 1, int64 rank 2, Dimension* dimensions 3",
    "Dimension": "ConstantDimension constant 1 ?, Other unknown 2 ?",
    "ConstantDimension": "uint64 size 1",
    "StateType": "ValueType wrappedType 1",
    "Value": "ValueType type 2, ImmediateValue immediateValue 3 ?, BlobFileValue blobFileValue 5 ?",
    "ImmediateValue": (
        "TensorValue tensor 1 ?, Other tuple 2 ?, Other list 3 ?, Other dictionary 4 ?"
    ),
    "BlobFileValue": "string fileName 1, uint64 offset 2",
    "TensorValue": (
        "Floats floats 1 ?, Ints ints 2 ?, Bools bools 3 ?, Strings strings 4 ?,"
        "LongInts longInts 5 ?, Doubles doubles 6 ?, Bytes bytes 7 ?"
    ),
    "Floats": "float* values 1",
    "Ints": "int32* values 1",
    "Bools": "bool* values 1",
    "Strings": "string* values 1",
    "LongInts": "int64* values 1",
    "Doubles": "double* values 1",
    "Bytes": "bytes values 1",
    "Other": "",
}
"""Message → its fields: type (`*`: repeated), name, number (`?`: of the message's one oneof)."""

DATA_TYPES: dict[int, str] = {
    **{1: "bool", 2: "string", 10: "float16", 11: "float32", 12: "float64", 13: "bfloat16"},
    **{21: "int8", 22: "int16", 23: "int32", 24: "int64", 25: "int4", 31: "uint8", 32: "uint16"},
    **{33: "uint32", 34: "uint64", 35: "uint4", 36: "uint2", 37: "uint1", 38: "uint6"},
    **{39: "uint3", 40: "float8e4m3fn", 41: "float8e5m2"},
}
"""MIL.proto's `DataType` → name."""

ARRAY_TYPES: dict[int, str] = {
    **{65552: "float16", 65568: "float32", 65600: "float64", 131080: "int8", 131104: "int32"},
}
"""FeatureTypes.proto's `ArrayDataType` → name."""

_SCALARS = {
    word: getattr(FieldDescriptorProto, f"TYPE_{word.upper()}")
    for word in ("string", "bytes", "bool", "int32", "int64", "uint64", "float", "double")
}


def _field(message: DescriptorProto, text: str) -> None:
    word, name, number, *oneof = text.split()
    kind = word.removesuffix("*")
    field = message.field.add(name=name, number=int(number))
    field.label = (
        FieldDescriptorProto.LABEL_REPEATED
        if word.endswith("*")
        else FieldDescriptorProto.LABEL_OPTIONAL
    )
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    if oneof:
        if not message.oneof_decl:
            message.oneof_decl.add(name="choice")
        field.oneof_index = 0


def _pool() -> DescriptorPool:
    file = FileDescriptorProto(name="rgexport/mil.proto", package=PACKAGE, syntax="proto3")
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for text in filter(None, map(str.strip, fields.split(","))):
            _field(message, text)
    pool = DescriptorPool()
    pool.Add(file)
    return pool


Model = GetMessageClass(_pool().FindMessageTypeByName(f"{PACKAGE}.Model"))
"""The message class of a whole `.mlmodel` file."""
