"""Which kernels run a model file: its ops, what is built, the environment."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from rgexport.cli import run
from rgexport.commands import options as cli_options
from rgexport.export.onnx import native
from rgexport.export.onnx.native import NativeOps, native_ops
from rgexport.kernels.onnx import library as build
from rgexport.kernels.onnx.library import Kernels

FOUND = Kernels("avx2", ("QuantLinear", "RgLruScan"), ("scalar", "avx2"))


def model(*nodes: tuple[str, str]) -> bytes:
    """A graph of nodes (domain, op), and a function of our domain that is never called."""
    chain = [
        helper.make_node(op, [f"v{i}"], [f"v{i + 1}"], domain=domain, f=0.5)
        for i, (domain, op) in enumerate(nodes)
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.5, 2.5])
    graph = helper.make_graph(chain, "ai.rgexport", [], [], [weight])
    body = helper.make_node("QuantLinear", ["x"], ["y"], domain="ai.rgexport")
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("ai.rgexport", 1)]
    function = helper.make_function("ai.rgexport", "Unused", ["x"], ["y"], [body], imports)
    return helper.make_model(graph, functions=[function]).SerializeToString()


OURS = ("ai.rgexport", "RgLruScan")
STANDARD = (("", "Add"), ("com.microsoft", "MatMulNBits"), ("ai.rgexport.other", "RgLruScan"))


def test_ops_of_our_domain_are_counted():
    linear = ("ai.rgexport", "QuantLinear")
    found = native_ops(model(linear, *STANDARD, OURS, OURS))
    assert found.ops == {"QuantLinear": 1, "RgLruScan": 2}


def test_damaged_files_raise_nothing():
    whole = model(OURS, *STANDARD, OURS)
    for end in range(0, len(whole), 7):
        assert sum(native_ops(whole[:end]).ops.values()) <= 2
    for at in range(0, len(whole), 11):
        native_ops(whole[:at] + b"\xff" + whole[at + 1 :])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(build, "kernels", lambda: FOUND)
    monkeypatch.setattr(build, "library", lambda: Path("library.so"))
    return monkeypatch


def test_native_where_built(built, tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(model(OURS, ("ai.rgexport", "Later"), OURS))
    ops = {"Later": 1, "RgLruScan": 2}
    expected = NativeOps(ops, ("RgLruScan",), Path("library.so"), "native avx2", "")
    assert native_ops(file) == native_ops(file.read_bytes()) == expected


def test_an_op_of_an_older_version_has_no_kernel(built):
    made = onnx.load_from_string(model(OURS, ("ai.rgexport", "QuantLinear")))
    made.opset_import.append(helper.make_opsetid("ai.rgexport", 1))
    old = native_ops(made.SerializeToString())
    assert old.ops == {"QuantLinear": 1, "RgLruScan": 1} and old.native == ("QuantLinear",)
    made.opset_import[-1].version = native.VERSION
    assert native_ops(made.SerializeToString()).native == ("QuantLinear", "RgLruScan")


def test_which_tensors_are_mapped(demo_artifact, built):
    """Those that native ops read; the engine folds the decays, and repacks the rest."""
    found = native_ops(demo_artifact / "model.onnx")
    weights, small = ({t.name for t in ts} for ts in (found.weights, found.small))
    assert any("linear_out" in name for name in weights) and not weights & small
    assert small and all(name.endswith("rg_lru.recurrent_param") for name in small)


def test_file_without_such_ops(built):
    found = native_ops(model(*STANDARD))
    assert (found.ops, found.library, found.kernels) == ({}, None, native.STOCK)
    assert found.reason == "the file has no op of QuantLinear, RgLruScan"


def test_not_built(built):
    built.setattr(build, "kernels", lambda: Kernels(reason="they are not built"))
    built.setattr(build, "library", lambda: None)
    assert native_ops(model(OURS)) == NativeOps(
        {"RgLruScan": 1}, (), None, "stock", "they are not built"
    )


def test_turned_off(monkeypatch):
    assert cli_options.NO_NATIVE == build.NO_NATIVE
    monkeypatch.setenv(build.NO_NATIVE, "yes")
    found = native_ops(model(OURS))
    assert (found.library, found.kernels) == (None, "stock")
    assert found.reason == "RGEXPORT_NO_NATIVE turns them off"


def test_inspect_names_the_kernels(demo_artifact, built, capsys):
    assert run(["inspect", str(demo_artifact)]) == 0
    shown = capsys.readouterr().out
    assert "It runs on native avx2 kernels: " in shown and "RgLruScan" in shown
    built.setattr(build, "kernels", lambda: Kernels(reason="nobody built them"))
    assert run(["inspect", str(demo_artifact)]) == 0
    assert (
        "Native kernels: none (nobody built them); it runs on stock kernels."
        in capsys.readouterr().out
    )
