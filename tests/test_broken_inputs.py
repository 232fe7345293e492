"""Wrong requests end in one line and exit code 2, and leave nothing behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rgexport.cli import run
from rgexport.quantize.plan import make_plan
from rgexport.quantize.schemes.registry import Float, Mixed, RowGroup
from tests.broken_checkpoints import BROKEN_CHECKPOINTS, BROKEN_PT, CONFIG, WEIGHTS, save, truncate
from tests.command_line import assert_matches, refused, rgexport
from tests.models import ODD_CONFIGS, make_config, random_weights, write_hugging_face
from tests.row_groups import INT4, INT8

Change = Callable[[dict[str, Any]], object]


def make_sound(folder: Path, *command: str) -> Path:
    write_hugging_face(CONFIG, WEIGHTS, folder / "model")
    asked = ["-m", str(folder / "model"), "--int8", "-o", str(folder / "sound")]
    assert run([*command, *asked]) == 0
    return folder / "sound"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sound(tmp_path_factory.mktemp("artifact"), "onnx")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sound(tmp_path_factory.mktemp("package"), "coreml", "--prefill-length", "4")


FIRST_CASE = next(iter(BROKEN_CHECKPOINTS))


@pytest.mark.parametrize(
    ("case", "command"),
    [
        *((case, "onnx -m model --int4") for case in (*BROKEN_CHECKPOINTS, *BROKEN_PT)),
        (FIRST_CASE, "coreml -m model"),
        (FIRST_CASE, "gguf -m model"),
    ],
)
def test_broken_checkpoint(case, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, complaint = (BROKEN_CHECKPOINTS | BROKEN_PT)[case]
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    assert_matches(complaint, refused(command.split(), capsys))
    assert not (tmp_path / "exploded").exists()


QUANTIZE = "quantize --size demo --calibration nothing"
BAD_REQUESTS: dict[str, tuple[str, str]] = {
    "no model": ("onnx --int4", "a model is needed"),
    "model and size": ("onnx -m model --size demo --int4", "both a model and a size"),
    "missing model": ("onnx -m nowhere", "no folder nowhere; .* hf:owner/name.* demo, 2b"),
    "weights as artifact": ("chat model/model.safetensors", "onnx model/model.safetensors --int4"),
    "unknown size": ("onnx --size 3b", "'3b'; expected one of demo, 2b"),
    "unknown precision": ("onnx -m model --precision int3", "'int3'; expected one of fp32"),
    "two precisions": ("onnx -m model --int4 --int8", "--int4 and --int8 contradict"),
    "flag and word": ("onnx -m model --int4 --precision fp16", "--int4 and --precision fp16"),
    "unknown profile": ("onnx -m model --profile phone", "'phone'; expected .*cpu"),
    "unknown compute": ("onnx -m model --compute int8", "'int8'; expected .*fp32"),
    "block size": ("onnx -m model --int4 --block-size 48", "48; expected one of 16, 32, 64, 128"),
    "idle option": ("onnx -m model --precision fp32 --block-size 64", "changes nothing in fp"),
    "embedding": ("onnx -m model --embedding-precision x", "'x'; expected"),
    "idle quality": ("onnx -m model --precision fp32 --quality best", "changes nothing in fp32"),
    "idle quality of gguf": ("gguf -m model --type f16 --quality best", "nothing in f16 weights"),
    "idle cluster": ("onnx -m model --cluster tcp://127.0.0.1:9", "is for --quality best or"),
    "missing plan": ("onnx -m model --plan nowhere", "cannot read nowhere: No such file"),
    "foreign plan": ("onnx -m model --plan model/config.json", "does not name the tensors"),
    "gguf row groups": ("gguf -m model --plan groups.json", r"GGUF cannot do in row groups"),
    "window": ("onnx -m model --window 0", "--window is 0"),
    "soft cap": ("onnx -m model --soft-cap -1", "--soft-cap is -1"),
    "parent missing": ("onnx -m model -o no/where", "there is no folder"),
    "target exists": ("onnx -m model -o folder --force", "folder exists and holds something else"),
    "coreml unknown precision": ("coreml -m model --precision int3", "'int3'; .*int4, pal4"),
    "coreml idle symmetry": (
        "coreml -m model --precision pal4 --embedding-precision fp16 --symmetric",
        "--symmetric changes nothing in pal4 and fp16 weights",
    ),
    "coreml compute": ("coreml -m model --compute bf16", "--compute is 'bf16'"),
    "coreml halves": ("coreml -m model --precision fp32 --compute fp16", "products in fp16 "),
    "coreml head": ("coreml -m model --precision int4 --embedding-precision fp32", "compute fp32"),
    "coreml prefill": ("coreml -m model --prefill-length 1", "--prefill-length is 1; expected 2"),
    "coreml state": ("coreml -m model --recurrent-state ring", "'ring'; expected one of io, hilo"),
    "gguf unknown type": ("gguf -m model --type q3", "'q3'; expected one of f32"),
    "gguf two types": ("gguf -m model --type q4_0 --int8", "--type q4_0 and int8 contradict"),
    "gguf override": ("gguf -m model --type q4_0 --tensor-type a", "expected REGEX=TYPE"),
    "gguf override's type": ("gguf -m model --type q4_0 --tensor-type attn_v=q9", "'q9'"),
    "gguf override's regex": ("gguf -m model --type q4_0 --tensor-type (=q8_0", "regular expr"),
    "gguf no override": ("gguf -m model --type q4_0 --tensor-type rg_lru=q8_0", "no tensor"),
    "gguf idle override": ("gguf -m model --type f16 --tensor-type a=q8_0", "changes nothing"),
    "gguf missing imatrix": ("gguf -m model --type q4_0 --imatrix nowhere", "nowhere"),
    "gguf foreign imatrix": ("gguf -m model --type q4_0 --imatrix text.gguf", "text.gguf"),
    "foreign gguf": ("generate text.gguf -p x", "text.gguf is not a GGUF file"),
    "unknown option": ("onnx --quick", "--quick"),
    "unknown command": ("convert", "convert"),
    "option without value": ("onnx -m", "requires an argument.*rgexport onnx --help"),
    "word as number": ("onnx -m model --block-size many", "'many'"),
    "no artifact": ("generate model -p x", "a checkpoint; .* rgexport onnx model --int4"),
    "missing artifact": ("chat nowhere", "no nowhere; expected .* onnx demo.* hf:owner/name"),
    "path like a hub id": ("chat ./no/where", "there is no no/where; expected"),
    "folder like a hub id": ("onnx ./no/where", "there is no folder ./no/where; expected"),
    "bench file": ("bench nowhere -o text.gguf", "text.gguf exists; pass --force"),
    "bench folder": ("bench nowhere -o no/where", "there is no folder"),
    "which artifact": ("chat", "an artifact is needed: a folder or file"),
    "two artifacts": ("generate model -m model -p x", "one artifact is needed, 2 were given"),
    "artifacts of a server": ("serve", "an artifact is needed: a folder or file"),
    "chat with the demo": ("chat demo", "a checkpoint; export it first: rgexport onnx demo"),
    "two models": ("onnx model -m model", "MODEL was given twice"),
    "chat with a .pt": ("chat model.pt", "a checkpoint; .* onnx model.pt --int4"),
    "validate a folder": ("validate folder", "folder is not an rgexport artifact: it has no"),
    "inspect nothing": ("inspect nowhere", "artifact .*, a model folder, .* hf:owner/name.* demo,"),
    "evaluate nothing": ("evaluate", "a model is needed: an artifact .*, a model folder, .* demo,"),
    "push to nowhere": ("push -m model", "takes one ARTIFACT and one OWNER/NAME"),
    "inspect no model": ("inspect folder", "folder"),
    "inspect a plan": ("inspect groups.json", "is a plan; exports take it with --plan; expected"),
    "random size": ("random --size 3b -o x", "'3b'; expected one of"),
    "random nowhere": ("random --size 2b", "--output"),
    "no target": (f"{QUANTIZE}", "0 targets are given; expected one of --target-kl, --target-size"),
    "out of reach": (f"{QUANTIZE} --bits 9 --bits 1", "--bits is 1, which no plan reaches"),
    "target kl": (f"{QUANTIZE} --target-kl nan", "--target-kl is nan; expected more than 0"),
    "target size": (f"{QUANTIZE} --target-size big", "is 'big'; expected a number of bytes"),
    "plan for pt": (f"{QUANTIZE} --bits 4 --format pt", "'pt'; expected one of onnx, coreml"),
    "missing calibration": (f"{QUANTIZE} --bits 4", "cannot read nothing: No such file"),
    "calibrate nothing": ("calibrate", "a model is needed"),
    "calibration target": ("calibrate -m model -o text.gguf --force", "something else than would"),
    "no tokens": ("calibrate -m model --tokens 0", "--tokens is 0; expected at least 1"),
    "endless tokens": (f"calibrate -m model --tokens {2**62}", "--tokens is 46.* at most 268435"),
    "endless seed": (f"calibrate -m model --seed {2**64}", "--seed is .* at most 92233720368547"),
    "held out below": ("calibrate -m model --held-out -1", "--held-out is -1"),
    "sampled below": ("calibrate -m model --text text.gguf --sampled -1", "--sampled is -1"),
    "only sampled": ("calibrate -m model --text text.gguf --sampled 16384", "leaves nothing"),
    "no mixture": ("calibrate -m model --tokens 8 --sampled 9", "--sampled 9 is more than .* 8"),
    "calibrate on text": ("calibrate -m model --text text.gguf", "no tokenizer to read the text"),
    "calibrate on": ("calibrate -m model --device tpu", "tpu"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").touch()
    (tmp_path / "text.gguf").write_text("Once upon a time")
    (tmp_path / "model.pt").touch()
    rows = Mixed((RowGroup("3", INT8), RowGroup(None, INT4)))
    plan = make_plan(CONFIG, Float("float32"), rows)
    entries = {name: scheme.to_dict() for name, scheme in plan.items()}
    (tmp_path / "groups.json").write_text(json.dumps({"plan": entries}))
    arguments, complaint = BAD_REQUESTS[case]
    assert_matches(complaint, refused(arguments.split(), capsys))


BAD_USES: dict[str, tuple[str, str]] = {
    "no tokenizer": ("generate sound -p hello", "neither tokenizer.model nor tokenizer.json"),
    "no prompt": ("generate sound", "a pipe, --prompt, --prompt-file, --ids or --load-state; none"),
    "a text and messages": ("chat sound --read -", "--read - are for one message; give it"),
    "two prompts": ("generate sound -p a --ids 1", "one of --prompt and --ids; both"),
    "words as ids": ("generate sound --ids a,b", "expected token ids"),
    "ids beyond 64 bits": (f"generate sound --ids 2,{2**63}", "92233720368.* ids from 0 to 63"),
    "endless ids": (f"generate sound --ids {'9' * 5000}", "expected token ids"),
    "temperature": ("generate sound --ids 2 --temperature -1", "temperature is -1"),
    "no new tokens": ("generate sound --ids 2 -n 0", "-n"),
    "draft beside ids": ("generate sound --ids 2 --draft-text sound/README.md", "--draft-text"),
    "idle draft": ("generate sound -p a --no-lookup --draft-text x", "changes nothing"),
    "missing text": ("validate sound --text nowhere", "nowhere"),
    "text without tokenizer": ("validate sound --text sound/README.md", "tokenizer"),
    "json nowhere": ("validate sound --json no/where.json", "where.json"),
    "html without a file": ("validate --html sound", "'ARTIFACT...'; --html took sound as its"),
    "html nowhere": ("validate sound --html no/where.html", "where.html"),
    "second artifact": ("validate sound nowhere", "nowhere"),
    "existing artifact": ("onnx -m other -o sound", "sound exists; pass --force"),
    "no artifact given": ("validate", "ARTIFACT"),
    "lost manifest": ("chat lost", "lost is not an rgexport artifact: .*or export the model again"),
    "another model": ("validate sound -m other", "embed_tokens.weight has shape"),
    "idle calibration": ("validate sound --calibration c", "--calibration is for --reproduce"),
    "reproduced alone": ("validate sound --reproduce", "pass it with -m"),
}


@pytest.mark.parametrize("case", BAD_USES)
def test_bad_use_of_an_artifact(case, artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(artifact, "sound")
    shutil.copytree(artifact, "lost", ignore=lambda *_: ["rgexport.json"])
    (tmp_path / "lost" / "config.json").touch()  # looks like a checkpoint's
    other = ODD_CONFIGS["hawk"]
    write_hugging_face(other, random_weights(other), tmp_path / "other")
    arguments, complaint = BAD_USES[case]
    assert_matches(complaint, refused(arguments.split(), capsys))


DAMAGED = {
    "artifact": ("model.onnx", "model.onnx.data", "rgexport.json"),
    "package": ("model.mlmodel", "weight.bin", "Manifest.json", "rgexport.json"),
}


@pytest.mark.parametrize(("made", "name"), [(made, n) for made in DAMAGED for n in DAMAGED[made]])
@pytest.mark.parametrize("command", ["generate sound --ids 2", "validate sound", "inspect sound"])
def test_damaged_artifact(command, made, name, request, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(request.getfixturevalue(made), "sound")
    truncate(f"**/{name}")(Path("sound"))
    assert_matches(name, refused(command.split(), capsys))


def state(number: int = 0, **fields: Any) -> Change:
    return lambda manifest: manifest["states"][number].update(fields)


def value(side: str, number: int, **fields: Any) -> Change:
    """Changes an input or output of a manifest."""
    return lambda manifest: manifest["io"][side][number].update(fields)


WRONG_STATES: dict[str, tuple[Change, str]] = {
    "none": (lambda m: m.update(states=[]), "states has 0 entries; expected 4"),
    "missing": (lambda m: m["states"].pop(), "states has 3 entries; expected 4"),
    "doubled": (lambda m: m["states"].append(m["states"][0]), "states has 5 entries; expected 4"),
    "another's name": (state(2, name="layers.0.conv1d"), r"states\[2\].name is 'layers.0.conv1d'"),
    "unknown name": (state(name="layers.7.key\x1b[2J"), r"states\[0\].name is 'layers.7.key\\x1b"),
    "huge": (state(shape=[1 << 50]), r"states\[0\].shape is \(11.*; expected \("),
    "100,001 dimensions": (state(shape=[1] * 100_001), r"states\[0\].shape is \(1, 1, "),
    "dtype": (state(dtype="nonsense"), r"states\[0\].dtype is 'nonsense'; expected 'float32'"),
    "layout": (state(layout="row"), r"states\[0\].layout is 'row'"),
    "input": (state(input="input_ids"), r"states\[0\].input is 'input_ids'; expected"),
    "output": (state(output="logits"), r"states\[0\].output is 'logits'; expected"),
    "no inputs": (lambda m: m["io"].update(inputs=[]), "io.inputs has 0 entries; expected "),
    "other ids": (value("inputs", 0, dtype="float32"), r"io.inputs\[0\].dtype is 'float32'"),
    "logits": (value("outputs", 0, shape=[1 << 60]), r"io.outputs\[0\].shape is \(11.*; expected"),
    "endless window": (
        lambda m: m["config"].update(window=2**31 - 1),
        "config.window is 2147483647: the state .* would take .* expected at most 1.07 GB",
    ),
    "another window": (lambda m: m["config"].update(window=5), r"states\[2\].* \(1, 5, 16\)"),
}
COMMANDS = (
    *("generate sound --ids 2", "chat sound -p hello", "serve sound --port 0", "validate sound"),
    *("bench sound -p 1 -n 1 -r 1", "inspect sound", "evaluate sound --suite text"),
    *("web sound -o site", "state load sound no-file"),
)


@pytest.mark.parametrize("case", WRONG_STATES)
def test_wrong_states(case, artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(artifact, "sound")
    change, complaint = WRONG_STATES[case]
    manifest = json.loads(Path("sound/rgexport.json").read_text())
    change(manifest)
    Path("sound/rgexport.json").write_text(json.dumps(manifest))
    for command in COMMANDS[:1] if case != "huge" else COMMANDS:
        line = refused(command.split(), capsys)
        assert_matches(f"rgexport.json is damaged: {complaint}", line)


def test_hub_that_cannot_be_reached(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    result = rgexport("onnx", "--size", "2b", "--int4", folder=tmp_path, environment=offline)
    assert result.returncode == 2 and result.stdout == ""
    assert_matches("^Error: .*google/recurrentgemma-2b", result.stderr)
    assert len(result.stderr.splitlines()) == 1 and not [*tmp_path.glob("*onnx*")]


@pytest.mark.parametrize("command", ["onnx", "coreml", "gguf --type f16"])
def test_full_disk(command, tmp_path, monkeypatch, capsys):
    """Files of a process may not grow beyond 64 KiB: the write fails as on a full disk."""
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    big = make_config("r", width=64, heads=2, vocab_size=2048)
    write_hugging_face(big, random_weights(big), tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    try:
        line = refused([*command.split(), "-m", "model", "-o", "out"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_matches("no space left while writing out", line)
