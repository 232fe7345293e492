"""`rgexport push` and `hf:` against a fake hub."""

import hashlib
import json

import pytest

from rgexport.artifacts.hub import HubName, parse
from rgexport.artifacts.manifest import MANIFEST
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import demo_folder
from tests.artifacts import export_random_gguf
from tests.hub.fake import TOKEN, Repository
from tests.models import ODD_CONFIGS

ASK = "-p", "Hello", "-n", "8", "--temperature", "0"


def test_an_artifact_goes_there_and_back(run, hub, artifact):
    from huggingface_hub import ModelCard

    done = run("push", artifact, "me/demo")
    assert f"{hub.url}/me/demo has it. Try: rgexport chat hf:me/demo" in done.stdout
    repository = hub.repositories["me/demo"]
    assert repository.private and repository.commits == ["demo, int4, by rgexport"]
    listed = json.loads(repository.files[MANIFEST])["files"]
    assert repository.files.keys() - {".gitattributes"} == listed.keys() | {MANIFEST}
    for name, data in repository.files.items():
        assert name == ".gitattributes" or data == (artifact / name).read_bytes()

    card = ModelCard(repository.files["README.md"].decode()).data
    assert card.library_name == "onnx" and card.pipeline_tag == "text-generation"
    assert {"rgexport", "int4", "onnx"} <= {*card.tags}
    assert card.license == "other"  # the demo's own card says so

    said = run("generate", artifact, *ASK).stdout
    assert run("generate", "hf:me/demo", *ASK).stdout == said
    assert run("generate", "-m", "me/demo", *ASK).stdout == said
    requests = len(hub.asked)
    for name in ("hf:me/demo", "me/demo"):
        assert json.loads(run("inspect", name, "--json").stdout)["kind"] == "onnx"
    assert len(hub.asked) == requests, "a complete copy needs no network"
    run("evaluate", "me/demo", "--suite", "text", "--limit", "8", "--json")


def test_a_checkpoint_is_no_artifact(run, hub):
    files = {path.name: path.read_bytes() for path in demo_folder().iterdir() if path.is_file()}
    hub.repositories["me/ck"] = Repository(files=files)
    for _ in range(2):  # from the hub, and where it has nothing
        for name in ("hf:me/ck", "me/ck"):
            refusal = run("generate", name, *ASK, code=2).stderr
            assert "me/ck is a checkpoint; export it first: rgexport onnx me/ck --int4" in refusal
            assert json.loads(run("inspect", name, "--json").stdout)["kind"] == "checkpoint"
        hub.repositories.clear()


def test_a_dry_run_lists_what_would_go_there(run, hub, artifact):
    *listed, total = run("push", "-m", artifact, "me/demo", "--dry-run").stdout.splitlines()
    assert not hub.repositories and not hub.asked
    assert {line.split()[-1] for line in listed} == {path.name for path in artifact.iterdir()}
    assert "would go to me/demo, which is made private if it is new." in total
    assert "no repository" in run("push", artifact, "me/demo@main", "--dry-run", code=2).stderr


def test_an_interrupted_upload_or_download_goes_on(run, hub, artifact):
    hub.is_broken = True
    done = run("push", artifact, "me/demo", code=2)
    assert "the upload to me/demo failed" in done.stderr and "try again" in done.stderr
    assert not hub.repositories["me/demo"].commits  # nothing half there

    hub.is_broken = False
    for _ in range(2):  # nothing is sent twice
        run("push", artifact, "me/demo")
        assert len(set(hub.uploads)) == len(hub.uploads)

    hub.is_broken = True
    done = run("inspect", "hf:me/demo", code=2)
    assert "me/demo is not in the local cache and cannot be downloaded" in done.stderr
    hub.is_broken = False
    assert run("inspect", "hf:me/demo").stdout


def test_a_later_push_replaces_what_was_there(run, hub, artifact):
    run("push", artifact, "me/demo")
    files = hub.repositories["me/demo"].files
    files["picture.png"] = b"mine"
    manifest = json.loads((artifact / MANIFEST).read_text())
    del manifest["files"]["special_tokens_map.json"]
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    (artifact / "notes.txt").write_text("not listed")
    run("push", artifact, "me/demo")
    assert files.keys() & {"special_tokens_map.json", "picture.png", "notes.txt"} == {"picture.png"}
    assert files["README.md"] == (artifact / "README.md").read_bytes()
    files["README.md"] = b"Mine."
    said = run("push", artifact, "me/demo").stderr
    assert "stays as it is" in said and files["README.md"] == b"Mine."


def test_a_repository_of_something_else_is_refused(run, hub, artifact):
    hub.repositories["me/other"] = Repository(files={"weights.bin": b"x", "README.md": b"y"})
    others = json.loads((artifact / MANIFEST).read_text()) | {"name": "another model"}
    hub.repositories["me/theirs"] = Repository(files={MANIFEST: json.dumps(others).encode()})
    assert "has other files" in run("push", artifact, "me/theirs", code=2).stderr
    done = run("push", artifact, "me/other", code=2)
    assert "me/other has other files (weights.bin)" in done.stderr
    run("push", artifact, "me/other", "--force")
    assert hub.repositories["me/other"].files["README.md"] == b"y"
    assert hub.repositories["me/other"].files["weights.bin"] == b"x"


def test_a_manifest_downloads_nothing_but_what_it_lists(run, hub, artifact):
    manifest = json.loads((artifact / MANIFEST).read_text())
    for name in ("*", "not there"):
        manifest["files"][name] = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    files = {path.name: path.read_bytes() for path in artifact.iterdir()}
    more = {MANIFEST: json.dumps(manifest).encode(), "*": b"x", "evil.pkl": b"x"}
    hub.repositories["me/demo"] = Repository(files=files | more)
    assert "is incomplete" in run("inspect", "hf:me/demo", code=2).stderr
    assert not any("evil.pkl" in asked for asked in hub.asked)


def test_a_gguf_file_goes_there_and_back(run, hub, tmp_path):
    file = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)[0].path
    done = run("push", file, "me/tiny", "--public")
    assert f"rgexport generate hf:me/tiny/{file.name}" in done.stdout
    repository = hub.repositories["me/tiny"]
    assert not repository.private and repository.files[file.name] == file.read_bytes()
    assert b"library_name: gguf" in repository.files["README.md"]
    assert json.loads(run("inspect", "hf:me/tiny", "--json").stdout)["kind"] == "gguf"
    repository.files["README.md"] = b"Mine."
    run("push", file, "hf:me/tiny")
    assert repository.files["README.md"] == b"Mine."

    repository.files["other.gguf"] = file.read_bytes()
    assert "has several GGUF files" in run("inspect", "hf:me/tiny@main", code=2).stderr
    assert run("inspect", "hf:me/tiny/other.gguf").stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:me/none", "there is no model me/none on the hub, or it is private"),
        ("hf:me/gated", "me/gated is gated: accept its licence"),
        ("hf:me/empty", "hf:me/empty has no rgexport.json: it is no artifact of rgexport"),
        ("hf:me/hole", "is incomplete"),
        ("hf:me/empty@v9", "me/empty has no such revision"),
    ],
)
def test_what_cannot_be_had_is_told(run, hub, demo_artifact, name, message):
    hub.repositories["me/gated"] = Repository(gated=True)
    hub.repositories["me/empty"] = Repository()
    manifest = (demo_artifact / MANIFEST).read_bytes()
    hub.repositories["me/hole"] = Repository(files={MANIFEST: manifest})
    done = run("generate", name, *ASK, code=2)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_what_may_not_be_pushed_is_told(run, hub, artifact):
    for name, token in (("you/demo", TOKEN), ("me/demo", "hf_wrong")):
        done = run("push", artifact, name, code=2, token=token)
        assert f"the hub refuses the upload to {name}: log in" in done.stderr
    done = run("push", artifact, "demo", code=2)
    assert "demo is no artifact of the hub; expected hf:owner/name" in done.stderr
    (artifact / "model.onnx.data").write_bytes(b"x")
    assert "is damaged" in run("push", artifact, "me/demo", code=2).stderr
    assert not hub.repositories


WRONG_NAMES = "hf:a hf:a/b/c hf:/a/b hf:a/b@ hf: hf:../../etc/passwd hf:a/b/../../x.gguf"


def test_names():
    assert parse("hf:a/b") == HubName("a/b", None, None)
    assert parse("hf:a/b/c/d.gguf@refs/pr/1") == HubName("a/b", "c/d.gguf", "refs/pr/1")
    for name in (*WRONG_NAMES.split(), "hf:a b/c"):
        with pytest.raises(RequestError, match="expected hf:owner/name"):
            parse(name)
