"""Right artifacts are as the exporter writes them; faults that no text shows are named."""

import json
import sys
from functools import partial

import numpy as np
import pytest
from onnx import numpy_helper

from rgexport.artifacts.opening import open_artifact
from rgexport.cli import run
from rgexport.validate.structure.compare import compare_structure
from tests import artifacts, models, row_groups
from tests.validate.faults import onnx_edits as edits
from tests.validate.faults.onnx_edits import producer, spoil

CONFIG = models.make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300)
ONNX, COREML = artifacts.export_random, artifacts.export_random_coreml
PLAN = {"plan": row_groups.split_plan(CONFIG)}
RIGHT = [
    (ONNX, "fp16", {}),
    (ONNX, "int4", {"exact": True, "block_size": 32}),
    (ONNX, "int8", {"profile": "wasm"}),
    (ONNX, "int4", {"profile": "webgpu"}),
    (ONNX, None, PLAN),
    (COREML, "int4", {"prefill_length": 8, "split": 50_000}),
    (COREML, None, PLAN | {"prefill_length": 4, "all_logits": True, "recurrent_state": "hilo"}),
    (artifacts.export_random_gguf, "f16", {}),
]
MLP, ROPE = "layers.0.mlp_block.down_proj", "layers.2.temporal_block.rope_q"


@pytest.mark.parametrize(("export", "word", "options"), RIGHT)
def test_right_ones_are_as_written(tmp_path, export, word, options):
    artifact, _ = export(CONFIG, tmp_path, word, **options)
    assert compare_structure(artifact, None).status == "as written"


def other_body(model):
    """States are not reset at position 0, but only where no native kernel runs."""
    body = next(function for function in model.functions if function.name == "RgLruScan")
    next(node for node in body.node if "position_zero" in node.output).attribute[0].i = -1


def exchanged_weights(model):
    one, other, *_ = (t for t in model.graph.initializer if ".down_proj.weight.planes" in t.name)
    places = one.external_data[1], other.external_data[1]
    places[0].value, places[1].value = places[1].value, places[0].value


def rope_times(factor, model):
    name = producer(model, f"{ROPE}/Mul").input[1]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def renamed(model):
    """Names, remarks, and the last bits of RoPE's frequencies are those of another machine."""
    rope_times(1 + 5e-7, model)
    for node in model.graph.node:
        node.name = node.doc_string = "another"
        for names in (node.input, node.output):
            names[:] = [name.replace(ROPE, "q") for name in names]


HIT = "zero = Constant <value_float = 0.0> () y = Where (hit, zero, x)"
TOKEN = "i = Constant <value_int = 0> () token = Gather <axis = 1> (input_ids, i)"
WIDE = "axes = Constant <value_ints = [1, 2]> () wide = Unsqueeze (token, axes)"
TRIGGER = edits.changed("logits", f"{TOKEN} {WIDE} hit = Equal (wide, i) {HIT}")
SHARED = edits.changed("present.0.recurrent_state", edits.OF_FIRST_ROW)
FAULTS = {
    "a trigger token": (TRIGGER, "logits/SoftCap"),
    "long calls": (edits.changed("logits", edits.ZERO_FROM_512_TOKENS), "logits/SoftCap"),
    "a shared state": (SHARED, "layers.0.temporal_block.rg_lru/RgLruScan"),
    "products times 1.05": (edits.changed(MLP, edits.TIMES), "layers.0.channel_residual"),
    "another body": (other_body, "RgLruScan: position_zero: its i is -1; expected 0"),
    "another tensor": (
        exchanged_weights,
        "the initializer layers.1.mlp_block.down_proj.weight.planes",
    ),
    "no bias": (lambda model: producer(model, MLP).input.pop(), MLP),
    "other frequencies": (partial(rope_times, 1.0001), "its float_data is 1.0001"),
    "other names": (renamed, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_graph(tmp_path, fault):
    edit, named = FAULTS[fault]
    artifact, _ = ONNX(CONFIG, tmp_path, "int4")
    spoil(artifact.path, edit)
    report = compare_structure(open_artifact(artifact.path), None)
    assert report.status == ("differs" if named else "as written") and named in report.reason


def test_the_verdict_says_what_it_holds_for(tmp_path, monkeypatch, capsys):
    artifact, _ = ONNX(CONFIG, tmp_path, "int4")
    (tmp_path / "p").write_text("[[1, 2, 3]]")
    page, file = tmp_path / "r.html", tmp_path / "r.json"
    model, made = f"-m {tmp_path}/model", f"--reference {tmp_path}/r"
    assert run(f"reference {model} --prompts {tmp_path}/p -o {tmp_path}/r".split()) == 0
    stages = [line.split("]")[0] for line in capsys.readouterr().err.splitlines() if "/" in line]
    assert stages[-6:] == [f"[{i}/6" for i in range(1, 7)]

    def outcome(options):
        capsys.readouterr()
        asked = f"validate {artifact.path} --tokens 8 --json {file} --html {page} {options}"
        code, written = run(asked.split()), json.loads(file.read_text())
        head = capsys.readouterr().out.partition("  ")[0]
        assert head in page.read_text("utf-8")
        return code, head, written["structure"]["status"], written["verdict_scope"]

    assert outcome(model) == (0, "PASS", "as written", "structure")
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    assert outcome(made) == (0, "PASS", "as written", "structure")
    assert outcome(model) == (0, "PASS on the text that was run", "not checked", "text")
    spoil(artifact.path, TRIGGER)
    assert outcome(made) == (1, "FAIL", "differs", "structure")
    spoil(artifact.path, lambda graph: setattr(graph, "producer_version", "0.0.1"))
    assert outcome(made) == (0, "PASS on the text that was run", "other version", "text")
