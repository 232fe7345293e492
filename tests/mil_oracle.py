"""A second interpreter of saved .mlpackages, for tests: Apple's documentation to the letter.

It reads the protobuf and the weight file by itself and shares nothing with the code under test.
What the documentation does not allow, it refuses (`RefusedError`): an op that `mil_oracle_ops`
does not list, a parameter that the op does not have, an argument of another type or rank, a
variable where a constant is due, a declared type that is not the computed one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coremltools.proto import FeatureTypes_pb2, Model_pb2
from torch import Tensor

from tests.mil_oracle_ops import RULES, Operand, RefusedError, demand
from tests.mil_oracle_values import NUMPY, Type, model_file, read_type, read_value

__all__ = ["Oracle", "RefusedError"]

_FEATURES = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType
_FEATURE_DTYPES = {
    _FEATURES.Value("FLOAT16"): "fp16",
    _FEATURES.Value("FLOAT32"): "fp32",
    _FEATURES.Value("INT32"): "int32",
}
_OPSET = "CoreML8"  # iOS 18
_SPECIFICATION_VERSION = 9

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Call:
    """One operation, ready to run: `arguments` are values, or names of values in a tuple."""

    where: str
    op: str
    run: Callable[..., Tensor] | None  # None: it reads or writes a state
    arguments: dict[str, Any]
    output: str
    type: Type


@dataclass(frozen=True)
class Function:
    """A function of a package: its interface, its constants, its calls in order."""

    inputs: dict[str, Type]
    states: dict[str, Type]
    outputs: dict[str, Type]
    constants: dict[str, Any]
    calls: list[_Call]


class Oracle:
    """A saved package, whole in memory.

    Every operation is computed in `wide` arithmetic and rounded once to float16 where that is its
    declared type. Without `rounding`, activations and states that are declared float16 keep all
    digits: what is left of an error then is not float16's.
    """

    def __init__(
        self, path: Path, *, wide: torch.dtype = torch.float32, rounding: bool = True
    ) -> None:
        self.wide, self.rounding = wide, rounding
        file = model_file(path)
        self.folder = file.parent
        model = Model_pb2.Model.FromString(file.read_bytes())
        demand(model.WhichOneof("Type") == "mlProgram", "not an ML program")
        demand(model.specificationVersion >= _SPECIFICATION_VERSION, "no states before iOS 18")
        described = {each.name: each for each in model.description.functions}
        self.functions: dict[str, Function] = {}
        for name, function in model.mlProgram.functions.items():
            self.functions[name] = _Builder(self, name).function(function)
            _check_description(described.pop(name, model.description), self.functions[name])
        demand(not described, f"described only: {sorted(described)}")
        self.default = model.description.defaultFunctionName or "main"
        demand(self.default in self.functions, f"no function {self.default}")

    def new_state(self) -> State:
        """Zeros: what a conversation starts from. All functions share it."""
        types: dict[str, Type] = {}
        for function in self.functions.values():
            for name, kind in function.states.items():
                demand(types.setdefault(name, kind) == kind, f"state {name} differs by function")
        dtype = torch.half if self.rounding else self.wide
        return {name: torch.zeros(shape, dtype=dtype) for name, (_, shape) in types.items()}

    def run(
        self, name: str, inputs: Mapping[str, Any], state: State, keep: Iterable[str] = ()
    ) -> dict[str, Tensor]:
        """Runs a function; changes `state`. Returns its outputs and the values named in `keep`."""
        function = self.functions[name]
        demand(inputs.keys() == function.inputs.keys(), f"inputs are {sorted(function.inputs)}")
        values = dict(function.constants)
        for key, (dtype, shape) in function.inputs.items():
            values[key] = self.carried(np.asarray(inputs[key]), dtype)
            demand(tuple(values[key].shape) == shape, f"{key} is not of shape {shape}")
        for call in function.calls:
            self._step(call, values, state)
        return {key: values[key].clone() for key in (*function.outputs, *keep)}

    def _step(self, call: _Call, values: dict[str, Any], state: State) -> None:
        if call.op == "write_state":
            written = values[call.arguments["data"][0]]
            state[call.output] = written.to(state[call.output].dtype)
        elif call.op == "read_state":
            values[call.output] = state[call.arguments["input"][0]].to(self.wide)
        else:
            values[call.output] = self.compute(call, values, self.rounding)

    def compute(self, call: _Call, values: Mapping[str, Any], rounding: bool) -> Tensor:
        """The value of one call; refuses a shape other than the declared one."""
        arguments = {key: _resolve(value, values) for key, value in call.arguments.items()}
        assert call.run is not None
        try:
            result = call.run(**arguments)
        except (RefusedError, RuntimeError, IndexError) as error:
            raise RefusedError(f"{call.where}: {error}") from error
        dtype, shape = call.type
        found = tuple(result.shape)
        demand(found == shape, f"{call.where}: declared {shape}, computed {found}")
        return self._carry(result, dtype if rounding else dtype.replace("fp16", "fp32"))

    def carried(self, array: np.ndarray, dtype: str) -> Tensor:
        """An array of a declared type as it is carried: floats in `wide`, integers as they are."""
        if dtype in ("fp16", "fp32"):
            return self._carry(torch.from_numpy(array.astype(np.float64)), dtype)
        wanted = np.dtype(NUMPY.get(dtype) or dtype.replace("int4", "int8"))
        return torch.from_numpy(array.astype(wanted))

    def _carry(self, value: Tensor, dtype: str) -> Tensor:
        if dtype == "fp16":
            return value.half().to(self.wide)
        return value.to(self.wide) if dtype == "fp32" else value


class _Builder:
    """Turns one function's protobuf into calls, checking what can be known before it runs."""

    def __init__(self, oracle: Oracle, name: str) -> None:
        self._oracle = oracle
        self._function = name
        self._known: dict[str, Operand] = {}
        self._states: dict[str, Type] = {}
        self._constants: dict[str, Any] = {}
        self._calls: list[_Call] = []

    def function(self, proto: Any) -> Function:
        demand(proto.opset == _OPSET, f"{self._function}: op set {proto.opset}")
        inputs: dict[str, Type] = {}
        for each in proto.inputs:
            if each.type.WhichOneof("type") == "stateType":
                self._states[each.name] = read_type(each.type.stateType.wrappedType)
                demand(self._states[each.name][0] == "fp16", f"state {each.name} is not fp16")
            else:
                inputs[each.name] = read_type(each.type)
                self._define(each.name, inputs[each.name], is_const=False)
        block = proto.block_specializations[proto.opset]
        demand(not block.inputs, "a block with inputs")
        for operation in block.operations:
            self._operation(operation)
        outputs = {name: (self._known[name].dtype, self._known[name].shape) for name in
                   block.outputs}  # fmt: skip
        return Function(inputs, self._states, outputs, self._constants, self._calls)

    def _define(self, name: str, kind: Type, *, is_const: bool, constant: Any = None) -> None:
        demand(bool(name), f"{self._function}: a value without a name")
        fresh = name not in self._known and name not in self._states
        demand(fresh, f"{self._function}: {name} is defined twice")
        self._known[name] = Operand(*kind, is_const, constant)
        if is_const:
            self._constants[name] = constant

    def _operation(self, proto: Any) -> None:
        name = proto.outputs[0].name if proto.outputs else "(no output)"
        where = f"{self._function}: {proto.type} {name}"
        try:
            self._build(proto, where)
        except (RefusedError, KeyError) as error:
            raise RefusedError(f"{where}: {error}") from error

    def _build(self, proto: Any, where: str) -> None:
        demand(not proto.blocks, "a nested block")
        extra = set(proto.attributes) - {"name", *(["val"] if proto.type == "const" else [])}
        demand(not extra, f"attributes {extra}")
        bindings = {name: list(given.arguments) for name, given in proto.inputs.items()}
        if proto.type in ("read_state", "write_state"):
            return self._state_operation(proto, where, bindings)
        demand(len(proto.outputs) == 1, "one output expected")
        output, kind = proto.outputs[0].name, read_type(proto.outputs[0].type)
        if proto.type == "const":
            demand(not bindings, "a const with inputs")
            operand = self._value(proto.attributes["val"])
            demand((operand.dtype, operand.shape) == kind, "value and output differ in type")
            return self._define(output, kind, is_const=True, constant=operand.constant)
        rule = RULES.get(proto.type)
        demand(rule is not None, "unknown op")
        assert rule is not None
        operands = {key: [self._operand(each) for each in given] for key, given in bindings.items()}
        dtype = rule.output_dtype(operands)
        demand(dtype == kind[0], f"declared {kind[0]}, computed {dtype}")
        arguments = {key: self._argument(rule, key, bindings[key], operands[key]) for key in
                     operands}  # fmt: skip
        call = _Call(where, proto.type, rule.run, arguments, output, kind)
        if not proto.type.startswith("constexpr_"):
            self._define(output, kind, is_const=False)
            return self._calls.append(call)
        computed = self._oracle.compute(call, self._constants, True)
        return self._define(output, kind, is_const=True, constant=computed)

    def _state_operation(self, proto: Any, where: str, bindings: dict[str, list[Any]]) -> None:
        state = bindings["input"][0].name
        demand(state in self._states, f"{state} is no state")
        if proto.type == "read_state":
            demand(bindings.keys() == {"input"}, f"parameters {sorted(bindings)}")
            kind = read_type(proto.outputs[0].type)
            demand(kind == self._states[state], f"declared {kind}, {state} differs")
            self._define(proto.outputs[0].name, kind, is_const=False)
            output = proto.outputs[0].name
        else:
            demand(bindings.keys() == {"input", "data"}, f"parameters {sorted(bindings)}")
            demand(not proto.outputs, "write_state has no output")
            data = self._known[bindings["data"][0].name]
            demand((data.dtype, data.shape) == self._states[state], f"{state}: another type")
            output = state
        names = {key: (given[0].name,) for key, given in bindings.items()}
        self._calls.append(_Call(where, proto.type, None, names, output, self._states[state]))

    def _operand(self, binding: Any) -> Operand:
        if binding.WhichOneof("binding") == "value":
            return self._value(binding.value)
        demand(binding.name in self._known, f"{binding.name} is not defined before")
        return self._known[binding.name]

    def _argument(self, rule: Any, key: str, bindings: list[Any], operands: list[Operand]) -> Any:
        parameter = next(each for each in rule.parameters if each.name == key)
        if rule.is_setting(key):
            constant = operands[0].constant
            return constant if isinstance(constant, str) else constant.tolist()
        each = [
            operand.constant if operand.is_const else (binding.name,)
            for binding, operand in zip(bindings, operands, strict=True)
        ]
        return each if parameter.many else each[0]

    def _value(self, proto: Any) -> Operand:
        dtype, shape = read_type(proto.type)
        array = read_value(proto, self._oracle.folder)
        value = str(array.item()) if dtype == "str" else self._oracle.carried(array, dtype)
        return Operand(dtype, shape, True, value)


def _resolve(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, tuple):
        return values[argument[0]]
    if isinstance(argument, list):
        return [_resolve(each, values) for each in argument]
    return argument


def _check_description(described: Any, function: Function) -> None:
    """What Core ML shows of a function must be what the function takes and gives."""
    groups = {"input": function.inputs, "output": function.outputs, "state": function.states}
    for group, types in groups.items():
        features = {each.name: each.type for each in getattr(described, group)}
        demand(features.keys() == types.keys(), f"described {group}: {sorted(features)}")
        for name, (dtype, shape) in types.items():
            feature = features[name].stateType.arrayType if group == "state" else features[
                name].multiArrayType  # fmt: skip
            found = (_FEATURE_DTYPES.get(feature.dataType), tuple(feature.shape))
            demand(found == (dtype, shape), f"{name} is described as {found}")
