"""The tests' own interpreter of MIL, against torch and numpy on programs that coremltools built."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.converter import mil_convert
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.converters.mil.mil.program import Placeholder, StateTensorPlaceholder
from coremltools.proto import MIL_pb2, Model_pb2

from tests.mil_oracle import Oracle, RefusedError

Build = Callable[..., Any]
_BUILTIN = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32}


def save(
    folder: Path,
    build: Build,
    inputs: dict[str, np.ndarray],
    states: dict[str, tuple[int, ...]] | None = None,
) -> Path:
    """Saves the program `build(**inputs, **states)`; what it returns are the outputs, by name."""
    placeholders: dict[str, Any] = {
        name: Placeholder(array.shape, dtype=_BUILTIN[array.dtype.name], name=name)
        for name, array in inputs.items()
    }
    for name, shape in (states or {}).items():
        placeholders[name] = StateTensorPlaceholder(shape, dtype=types.fp16, name=name)
    program = Program()
    with Function(placeholders, opset_version=ct.target.iOS18) as function:
        outputs = build(**function.inputs)
        for name, value in outputs.items():
            value.name = name
        function.set_outputs(list(outputs.values()))
    program.add_function("main", function)
    program.skip_all_passes = True
    model = mil_convert(
        program,
        convert_to="mlprogram",
        convert_from="milinternal",
        specification_version=ct._SPECIFICATION_VERSION_IOS_18,
        compute_units=ct.ComputeUnit.ALL,
        skip_model_load=True,
    )
    target = folder / "toy.mlpackage"
    model.save(str(target))
    return target


def run(folder: Path, build: Build, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    oracle = Oracle(save(folder, build, inputs))
    outputs = oracle.run("main", inputs, oracle.new_state())
    return {name: value.numpy() for name, value in outputs.items()}


def edit(package: Path, change: Callable[[Any], None]) -> Path:
    """Changes the main block of a saved program."""
    path = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    model = Model_pb2.Model.FromString(path.read_bytes())
    function = model.mlProgram.functions["main"]
    change(function.block_specializations[function.opset])
    path.write_bytes(model.SerializeToString())
    return package


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_pointwise_operations_are_torch_s(tmp_path: Path) -> None:
    x, y = noise(3, 4), noise(1, 4, seed=1)
    u, v = torch.from_numpy(x), torch.from_numpy(y)
    expected = {
        "sum": u + v,
        "difference": u - v,
        "product": u * v,
        "exponential": u.exp(),
        "root": u.abs().sqrt(),
        "inverse_root": 1 / (u * u + 0.5).sqrt(),
        "sigmoid": u.sigmoid(),
        "tanh": u.tanh(),
        "gelu": torch.nn.functional.gelu(u, approximate="tanh"),
        "exact_gelu": torch.nn.functional.gelu(u),
        "cos": u.cos(),
        "sin": u.sin(),
        "mean": u.mean(1, keepdim=True),
        "total": u.sum(0),
        "softmax": u.softmax(0),
        "equal": (u == v).float(),
        "at_most": (u <= v).float(),
        "at_least": (u >= v).float(),
        "both": ((u <= v) & (u >= 0)).float(),
        "chosen": torch.where(u <= v, u, v),
    }

    def build(x: Any, y: Any) -> dict[str, Any]:
        squared = mb.mul(x=x, y=x)
        below, positive = mb.less_equal(x=x, y=y), mb.greater_equal(x=x, y=np.float32(0))
        return {
            "sum": mb.add(x=x, y=y),
            "difference": mb.sub(x=x, y=y),
            "product": mb.mul(x=x, y=y),
            "exponential": mb.exp(x=x),
            "root": mb.sqrt(x=mb.sqrt(x=squared)),
            "inverse_root": mb.rsqrt(x=squared, epsilon=np.float32(0.5)),
            "sigmoid": mb.sigmoid(x=x),
            "tanh": mb.tanh(x=x),
            "gelu": mb.gelu(x=x, mode="TANH_APPROXIMATION"),
            "exact_gelu": mb.gelu(x=x),
            "cos": mb.cos(x=x),
            "sin": mb.sin(x=x),
            "mean": mb.reduce_mean(x=x, axes=[1], keep_dims=True),
            "total": mb.reduce_sum(x=x, axes=[0]),
            "softmax": mb.softmax(x=x, axis=0),
            "equal": mb.cast(x=mb.equal(x=x, y=y), dtype="fp32"),
            "at_most": mb.cast(x=below, dtype="fp32"),
            "at_least": mb.cast(x=mb.greater_equal(x=x, y=y), dtype="fp32"),
            "both": mb.cast(x=mb.logical_and(x=below, y=positive), dtype="fp32"),
            "chosen": mb.select(cond=below, a=x, b=mb.add(x=mb.sub(x=y, y=x), y=x)),
        }

    found = run(tmp_path, build, x=x, y=y)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), rtol=3e-6, atol=1e-6, err_msg=name)


def test_float16_is_rounded_once_after_every_operation(tmp_path: Path) -> None:
    x, weight = noise(2, 48), noise(5, 48, seed=1).astype(np.float16)

    def build(x: Any) -> dict[str, Any]:
        half = mb.cast(x=x, dtype="fp16")
        product = mb.linear(x=half, weight=weight)
        return {"y": mb.cast(x=mb.mul(x=product, y=np.float16(1.1)), dtype="fp32")}

    exact = x.astype(np.float16).astype(np.float64) @ weight.astype(np.float64).T
    expected = (exact.astype(np.float16).astype(np.float64) * float(np.float16(1.1))).astype(
        np.float16
    )
    oracle = Oracle(save(tmp_path, build, {"x": x}), wide=torch.float64)
    found = oracle.run("main", {"x": x}, {})["y"].numpy()
    assert np.array_equal(found, expected.astype(np.float64))


def test_products_and_moves_are_numpy_s(tmp_path: Path) -> None:
    x, y = noise(2, 3, 4), noise(3, 5, 4, seed=1)
    weight, bias = noise(6, 4, seed=2), noise(6, seed=3)
    ids = np.array([[2, 0, 1]], dtype=np.int32)
    expected = {
        "linear": x @ weight.T + bias,
        "matmul": x[:, :, None, :] @ y.swapaxes(-1, -2),
        "rows": weight[ids],
        "columns": weight[:, ids[0]],
        "joined": np.concatenate([x, x[:, :1]], axis=1),
        "reshaped": x.reshape(4, 6),
        "zeros": x.reshape(1, 6, 4),
        "turned": x.transpose(2, 0, 1),
        "narrow": x[:, :1][:, 0],
        "deep": x[:, None, :, :, None],
        "whole": np.trunc(3 * x).astype(np.int32) % 5,
    }

    def build(x: Any, y: Any, ids: Any) -> dict[str, Any]:
        table = mb.const(val=weight)
        first = mb.slice_by_index(x=x, begin=[0, 0, 0], end=[2, 1, 4])
        whole = mb.cast(x=mb.mul(x=x, y=np.float32(3)), dtype="int32")
        deep = mb.expand_dims(x=x, axes=[1, -1])
        return {
            "linear": mb.linear(x=x, weight=table, bias=bias),
            "matmul": mb.matmul(x=mb.expand_dims(x=x, axes=[2]), y=y, transpose_y=True),
            "rows": mb.gather(x=table, indices=ids, axis=0),
            "columns": mb.gather(x=table, indices=mb.squeeze(x=ids, axes=[0]), axis=-1),
            "joined": mb.concat(values=[x, first], axis=-2),
            "reshaped": mb.reshape(x=x, shape=[4, -1]),
            "zeros": mb.reshape(x=x, shape=[1, -1, 0]),
            "turned": mb.transpose(x=x, perm=[-1, 0, 1]),
            "narrow": mb.squeeze(x=first, axes=[1]),
            "deep": deep,
            "whole": mb.mod(x=whole, y=np.int32(5)),
        }

    found = run(tmp_path, build, x=x, y=y, ids=ids)
    for name, value in expected.items():
        assert found[name].shape == value.shape
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


SLICES: dict[str, tuple[dict[str, Any], Any]] = {
    "negative ends": ({"begin": [-3, -6], "end": [-1, -2]}, np.s_[-3:-1, -6:-2]),
    "end beyond the edge": ({"begin": [1, 2], "end": [9, 7]}, np.s_[1:9, 2:7]),
    "stride": ({"begin": [0, 1], "end": [4, 7], "stride": [1, 2]}, np.s_[0:4, 1:7:2]),
    "backwards": (
        {"begin": [3, 6], "end": [0, 0], "stride": [-1, -2], "end_mask": [True, True]},
        np.s_[3::-1, 6::-2],
    ),
    "begin mask": ({"begin": [2, 2], "end": [3, 5], "begin_mask": [True, False]}, np.s_[:3, 2:5]),
    "end mask": ({"begin": [2, 2], "end": [0, 0], "end_mask": [True, True]}, np.s_[2:, 2:]),
    "squeeze mask": ({"begin": [-1, 1], "end": [0, 4], "squeeze_mask": [True, False]},
                     np.s_[-1, 1:4]),
}  # fmt: skip


@pytest.mark.parametrize("case", SLICES)
def test_slices_are_numpy_s(case: str, tmp_path: Path) -> None:
    options, expected = SLICES[case]
    x = noise(4, 7)
    found = run(tmp_path, lambda x: {"y": mb.slice_by_index(x=x, **options)}, x=x)["y"]
    assert np.array_equal(found, x[expected])


def test_a_state_is_read_as_it_was_last_written(tmp_path: Path) -> None:
    def build(x: Any, memory: Any) -> dict[str, Any]:
        before = mb.read_state(input=memory)
        after = mb.coreml_update_state(
            state=memory, value=mb.add(x=before, y=mb.cast(x=x, dtype="fp16"))
        )
        return {
            "before": mb.cast(x=before, dtype="fp32"),
            "after": mb.cast(x=after, dtype="fp32"),
        }

    x = np.array([[0.1, 2048.0]], dtype=np.float32)
    oracle = Oracle(save(tmp_path, build, {"x": x}, {"memory": (1, 2)}))
    state, expected = oracle.new_state(), np.zeros((1, 2), dtype=np.float16)
    for _ in range(3):
        outputs = oracle.run("main", {"x": x}, state)
        assert np.array_equal(outputs["before"].numpy(), expected.astype(np.float32))
        expected = expected + x.astype(np.float16)
        assert np.array_equal(outputs["after"].numpy(), expected.astype(np.float32))
    assert np.array_equal(state["memory"].numpy(), expected)


def _packed(dtype: Any, values: np.ndarray) -> Any:
    return mb.const(val=values.astype(types.nptype_from_builtin(dtype)))


def test_stored_weights_are_scaled_and_looked_up(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    signed = generator.integers(-8, 8, (4, 32))
    unsigned = generator.integers(0, 16, (4, 32))
    offset = generator.integers(0, 16, (4, 2))
    bytes_ = generator.integers(-127, 128, (4, 32)).astype(np.int8)
    scale, row_scale = noise(4, 2, seed=1), noise(4, 1, seed=2)
    table = noise(2, 1, 16, 1, seed=3)
    wide, wide_offset = np.repeat(scale, 16, 1), np.repeat(offset, 16, 1)
    expected = {
        "symmetric": signed * wide,
        "asymmetric": (unsigned - wide_offset) * wide,
        "rows": bytes_ * row_scale,
        "table": np.take_along_axis(np.repeat(table[:, 0, :, 0], 2, 0), unsigned, 1),
    }

    def build(x: Any) -> dict[str, Any]:
        int4, uint4 = types.int4, types.uint4
        blockwise = mb.constexpr_blockwise_shift_scale
        weights = {
            "symmetric": blockwise(data=_packed(int4, signed), scale=scale),
            "asymmetric": blockwise(
                data=_packed(uint4, unsigned), scale=scale, offset=_packed(uint4, offset)
            ),
            "rows": blockwise(data=bytes_, scale=row_scale),
            "table": mb.constexpr_lut_to_dense(indices=_packed(uint4, unsigned), lut=table),
        }
        return {name: mb.linear(x=x, weight=weight) for name, weight in weights.items()}

    found = run(tmp_path, build, x=np.eye(32, dtype=np.float32))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].T, value, rtol=1e-6, err_msg=name)


def _operation(block: Any, kind: str) -> Any:
    return next(operation for operation in block.operations if operation.type == kind)


def _set_type(block: Any, kind: str, size: int) -> None:
    tensor = _operation(block, kind).outputs[0].type.tensorType
    tensor.dimensions[0].constant.size = size


def _set_dtype(block: Any, kind: str, dtype: str) -> None:
    tensor = _operation(block, kind).outputs[0].type.tensorType
    tensor.dataType = MIL_pb2.DataType.Value(dtype)


def _bind(block: Any, kind: str, parameter: str, value: str) -> None:
    argument = _operation(block, kind).inputs[parameter]
    del argument.arguments[:]
    argument.arguments.add().name = value


DAMAGE: dict[str, tuple[Callable[[Any], None], str]] = {
    "op": (lambda b: setattr(_operation(b, "exp"), "type", "custom_layer"), "unknown op"),
    "parameter": (lambda b: _bind(b, "exp", "z", "x"), r"no parameters \['z'\]"),
    "missing": (lambda b: _operation(b, "linear").inputs.pop("weight"), "weight is required"),
    "shape": (lambda b: _set_type(b, "linear", 3), r"declared \(3, 5\), computed \(2, 5\)"),
    "dtype": (lambda b: _set_dtype(b, "exp", "FLOAT16"), "declared fp16, computed fp32"),
    "variable weight": (lambda b: _bind(b, "linear", "weight", "x"), "weight is not a constant"),
    "undefined": (lambda b: _bind(b, "exp", "x", "nowhere"), "nowhere is not defined before"),
    "mixed": (lambda b: _bind(b, "add", "y", "ids"), "y: another type"),
    "twice": (lambda b: setattr(_operation(b, "exp").outputs[0], "name", "x"), "defined twice"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def build(x: Any, ids: Any) -> dict[str, Any]:
        table = mb.const(val=noise(5, 4))
        row = mb.exp(x=mb.gather(x=table, indices=ids))
        return {"y": mb.add(x=mb.linear(x=mb.add(x=x, y=row), weight=table), y=np.float32(1))}

    inputs = {"x": noise(2, 4), "ids": np.zeros(2, np.int32)}
    return save(tmp_path_factory.mktemp("toy"), build, inputs)


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_not_documented_is_refused(case: str, toy: Path, tmp_path: Path) -> None:
    change, complaint = DAMAGE[case]
    package = edit(_copied(toy, tmp_path), change)
    with pytest.raises(RefusedError, match=complaint):
        Oracle(package).run("main", {"x": noise(2, 4), "ids": np.zeros(2, np.int32)}, {})


def test_indices_outside_of_the_table_are_refused(toy: Path) -> None:
    for index in (-1, 5):
        with pytest.raises(RefusedError, match="outside of 0 to 5"):
            Oracle(toy).run("main", {"x": noise(2, 4), "ids": np.array([0, index])}, {})


def test_what_a_builder_lets_pass_is_refused(tmp_path: Path) -> None:
    x = noise(2, 3, 4, 5)
    weight = noise(6, 5)
    with pytest.raises(RefusedError, match="rank 4, not 1 to 3"):
        run(tmp_path / "linear", lambda x: {"y": mb.linear(x=x, weight=weight)}, x=x)

    def build(x: Any) -> dict[str, Any]:
        one, two = np.float32(1), np.float32(2)
        return {"y": mb.select(cond=mb.greater_equal(x=x, y=one), a=[one], b=[two])}

    with pytest.raises(RefusedError, match="cond is wider"):
        run(tmp_path / "select", build, x=x)


def _copied(package: Path, folder: Path) -> Path:
    return Path(shutil.copytree(package, folder / package.name))
