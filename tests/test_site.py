"""The files of a site with the page, the command that makes it, and the server for one machine."""

import hashlib
import http.client
import json
import shutil
import threading
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace

import pytest

from rgexport.artifacts.manifest import CARD
from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.web_page import build, site
from rgexport.web_page.local_server import local_server
from rgexport.web_page.site import read_content
from tests.artifacts import export_demo
from tests.command_line import rgexport

PAGE = "index.html", "sw.js", "manifest.webmanifest", "assets/index.js"
"""Files of a stand-in for the page, which takes Node to build."""


@pytest.fixture(autouse=True, scope="module")
def built_page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.zip"
    with zipfile.ZipFile(file, "w") as page:
        for name in PAGE:
            page.writestr(name, f"<html>{name}</html>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "BUILT", file)
        yield


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    target = tmp_path_factory.mktemp("site") / "wasm"
    export_demo(target, "onnx", "--profile", "wasm")
    return target


@pytest.fixture(scope="module")
def wasm_site(artifact):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "CHUNK_BYTES", 1 << 20)
        return site.make_site([open_artifact(artifact)])


def model_of(files):
    (model,) = json.loads(read_content(files[site.CATALOG]))["models"]
    return model


def test_files_are_their_chunks(artifact, monkeypatch):
    """Put together by the catalog, they are the artifact's; each chunk has the hash of its name.

    A chunk that occurs twice is one download, or the page would never have all that it waits for.
    """
    monkeypatch.setattr(site, "CHUNK_BYTES", 1024)
    made = site.make_site([open_artifact(artifact)])
    model = model_of(made)
    assert model["profile"] == "wasm"
    for file in model["files"]:
        chunks = [read_content(made[f"chunks/{name}.bin"]) for name in file["chunks"]]
        assert [hashlib.sha256(chunk).hexdigest() for chunk in chunks] == file["chunks"]
        assert all(len(chunk) == 1024 for chunk in chunks[:-1])
        assert b"".join(chunks) == (artifact / file["path"]).read_bytes()
        assert sum(map(len, chunks)) == file["bytes"]
    names = {file["path"] for file in model["files"]}
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} < names
    sizes = [len(read_content(part)) for name, part in made.items() if name.startswith("chunks/")]
    assert model["bytes"] == sum(sizes) < sum(file["bytes"] for file in model["files"])
    assert set(PAGE) < set(made)


def test_a_site_is_replaced_and_nothing_else(wasm_site, tmp_path, artifact):
    folder = tmp_path / "site"
    site.write_site(wasm_site, folder, force=False)
    written = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert written.keys() == wasm_site.keys()
    assert all(path.read_bytes() == read_content(wasm_site[name]) for name, path in written.items())
    asked = "web", str(artifact), "-o", str(folder)
    refused = rgexport(*asked, folder=tmp_path)
    assert refused.returncode == 2 and "--force" in refused.stderr
    assert rgexport(*asked, "--force", folder=tmp_path).returncode == 0
    for change in ((folder / "CNAME").touch, (folder / "sw.js").unlink):
        change()  # now it may be anything
        before = sorted(folder.rglob("*"))
        refused = rgexport(*asked, "--force", folder=tmp_path)
        assert refused.returncode == 2 and sorted(folder.rglob("*")) == before
        (folder / "CNAME").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "cpu"}, "is for cpu; a browser needs the profile wasm or webgpu"),
        ({"kind": "gguf"}, "is for gguf; a browser needs"),
        ({"files": {}}, "lacks config.json, tokenizer.json"),
        ({}, "two artifacts are for wasm"),
    ],
)
def test_artifacts_that_no_browser_runs(change, message, artifact):
    opened = open_artifact(artifact)
    changed = replace(opened, manifest=replace(opened.manifest, **change))
    with pytest.raises(RequestError, match=message):
        site.make_site([opened, changed][bool(change) :])


def test_the_terms_are_those_of_the_card(artifact, tmp_path, capsys):
    """Gemma's terms are shown for Google's weights alone."""
    folder = shutil.copytree(artifact, tmp_path / "model")
    for head, is_gemma, licence in (
        ("license: gemma", True, "gemma"),
        ("license: apache-2.0\nbase_model: someone/griffin", False, "apache-2.0"),
        ("license: other", False, None),
        ("base_model:\n- google/recurrentgemma-9b", True, "gemma"),
        ("base_model: someone/griffin", False, None),
    ):
        (folder / CARD).write_text(f"---\n{head}\n---\n\n# A model\n")
        model = model_of(site.make_site([open_artifact(folder)]))
        assert (model["gemma"], model["licence"]) == (is_gemma, licence)
        has_licence = "license" in head or is_gemma
        assert ("names no licence" in capsys.readouterr().err) != has_licence


def test_what_is_missing_is_said(monkeypatch, tmp_path, artifact):
    result = rgexport("web", "nothing", folder=tmp_path)
    assert result.returncode == 2 and "give -o DIR to write the site" in result.stderr
    monkeypatch.setattr(site, "BUILT", tmp_path / "page.zip")
    with pytest.raises(RequestError, match=r"Node was missing .* `make page`"):
        site.make_site([open_artifact(artifact)])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildFailed, match="npm are not installed"):
        build.build(tmp_path / "page.zip")


def test_the_local_server(wasm_site):
    """It has the headers that threads need, and the types that browsers insist on.

    The page of a name that an attacker lets point to this machine reads nothing (DNS rebinding).
    """
    with local_server(wasm_site, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        address = f"http://127.0.0.1:{port}/"
        for name in ("", *(name for name in wasm_site if not name.startswith("chunks/"))):
            with urllib.request.urlopen(address + name) as answer:
                assert answer.read() == read_content(wasm_site[name or "index.html"])
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
                if name.endswith("js"):
                    assert answer.headers["Content-Type"] == "text/javascript"
        for wrong in ("../pyproject.toml", "chunks/", "%2e%2e/x"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + wrong)
        hosts = ["localhost", f"127.0.0.1:{port}", "[::1]", "evil.test", "127.0.0.1.evil.test"]
        for host in hosts:
            for method in ("GET", "HEAD"):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request(method, "/", headers={"Host": host})
                answer = connection.getresponse()
                is_allowed = "evil" not in host
                assert answer.status == (200 if is_allowed else 403)
                assert (b"index.html" in answer.read()) == (is_allowed and method == "GET")
                connection.close()
        with pytest.raises(RequestError, match=r"cannot listen on .* choose another"):
            local_server(wasm_site, port)
        server.shutdown()
