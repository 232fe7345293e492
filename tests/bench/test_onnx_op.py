"""The op alone: what is timed computes the product."""

from argparse import Namespace

import numpy as np
import onnxruntime
import pytest

from bench import onnx_op
from bench.onnx_models import STORAGES, op_model
from rgexport.kernels.onnx.library import library
from rgexport.quantize import affine
from rgexport.quantize.scheme import Affine

KERNELS = "native", "stock"


def session(model: bytes, kernels: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if kernels == "native":
        if library() is None:
            pytest.skip("no native kernels here: not built, or turned off")
        options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(model, options)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", STORAGES)
def test_model_computes_the_product(name, kernels):
    storage = STORAGES[name]
    import onnx

    model = op_model(192, 40, storage)
    parts = {
        t.name: onnx.numpy_helper.to_array(t).reshape(40, -1)
        for t in onnx.load_from_string(model).graph.initializer
    }
    scheme = Affine(bits=storage.bits, block=storage.block, symmetric="zero_points" not in parts)
    weight = affine.decode(parts, scheme, 192).astype(np.float64)
    x = np.random.default_rng(1).standard_normal((1, 7, 192), np.float32)
    (found,) = session(model, kernels).run(None, {"x": x})
    expected = x @ weight.T
    assert np.abs(found - expected).max() <= 1e-2 * np.abs(expected).max()


def test_rates_of_all(monkeypatch):
    if library() is None:
        pytest.skip("no native kernels here: not built, or turned off")
    monkeypatch.setattr(onnx_op, "SHAPES", ((128, 32), (64, 96)))
    monkeypatch.setattr(onnx_op, "TOKENS", 4)
    found = onnx_op.op_alone(Namespace(rounds=2))
    assert [(s["inputs"], s["outputs"]) for s in found["shapes"]] == [(128, 32), (64, 96)]
    names = {"oneDNN rows", "oneDNN columns"} | {f"{s} {k}" for s in STORAGES for k in KERNELS}
    for shape in found["shapes"]:
        assert shape["rates"].keys() == names
        assert all(len(rates) == 2 and min(rates) > 0 for rates in shape["rates"].values())
