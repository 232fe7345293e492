"""The files of a site, and the command that makes it."""

import hashlib
import http.client
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rgexport.errors import RequestError
from rgexport.export.manifest import CARD
from rgexport.export.opening import open_artifact
from rgexport.page import build, site
from rgexport.page.local_server import local_server
from tests.command_line import rgexport


def test_files_are_their_chunks(wasm_site: site.Site, artifact: Callable[[str], Path]) -> None:
    """Put together by the catalog, they are the artifact's; each chunk has the hash of its name."""
    catalog = json.loads(site.read(wasm_site[site.CATALOG]))
    (model,) = catalog["models"]
    assert model["profile"] == "wasm"
    for file in model["files"]:
        chunks = [site.read(wasm_site[f"chunks/{name}.bin"]) for name in file["chunks"]]
        assert [hashlib.sha256(chunk).hexdigest() for chunk in chunks] == file["chunks"]
        assert all(len(chunk) == catalog["chunk_bytes"] for chunk in chunks[:-1])
        assert b"".join(chunks) == (artifact("wasm") / file["path"]).read_bytes()
        assert sum(map(len, chunks)) == file["bytes"]
    names = {file["path"] for file in model["files"]}
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} < names
    names = {name for file in model["files"] for name in file["chunks"]}
    assert model["bytes"] == sum(len(site.read(wasm_site[f"chunks/{n}.bin"])) for n in names)
    assert {"index.html", "sw.js", "manifest.webmanifest"} < set(wasm_site)


def test_a_chunk_that_occurs_twice_is_one_download(
    built_page: None, monkeypatch: pytest.MonkeyPatch, artifact: Callable[[str], Path]
) -> None:
    """Otherwise the page would never have all that it waits for."""
    monkeypatch.setattr(site, "CHUNK_BYTES", 1024)
    made = site.make_site([open_artifact(artifact("wasm"))])
    (model,) = json.loads(site.read(made[site.CATALOG]))["models"]
    chunks = [part for name, part in made.items() if name.startswith("chunks/")]
    files = sum(file["bytes"] for file in model["files"])
    assert model["bytes"] == sum(len(site.read(part)) for part in chunks) < files


def test_the_page_names_no_other_host(wasm_site: site.Site) -> None:
    """No CDN: what it loads is its own."""
    html = site.read(wasm_site["index.html"]).decode()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", html)
    assert "default-src 'self'" in html


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_name_that_was_led_here_reads_nothing(method: str) -> None:
    """The page of a name that an attacker lets point to this machine (DNS rebinding)."""
    with local_server({"index.html": b"the page"}, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for host, status in {
            "localhost": 200,
            f"127.0.0.1:{server.server_port}": 200,
            "[::1]": 200,
            "evil.test": 403,
            "127.0.0.1.evil.test": 403,
        }.items():
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request(method, "/", headers={"Host": host})
            answer = connection.getresponse()
            assert answer.status == status and (b"the page" in answer.read()) == (
                status == 200 and method == "GET"
            )
            connection.close()
        server.shutdown()


def test_a_site_is_replaced_and_nothing_else(
    wasm_site: site.Site, tmp_path: Path, artifact: Callable[[str], Path]
) -> None:
    folder = tmp_path / "site"
    site.write_site(wasm_site, folder, force=False)
    written = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert written.keys() == wasm_site.keys()
    assert all(path.read_bytes() == site.read(wasm_site[name]) for name, path in written.items())
    asked = "web", str(artifact("wasm")), "-o", str(folder)
    refused = rgexport(*asked, folder=tmp_path)
    assert refused.returncode == 2 and "--force" in refused.stderr
    assert rgexport(*asked, "--force", folder=tmp_path).returncode == 0
    for change in ((folder / "CNAME").touch, (folder / "sw.js").unlink):
        change()  # now it may be anything
        kept = sorted(folder.rglob("*"))
        refused = rgexport(*asked, "--force", folder=tmp_path)
        assert refused.returncode == 2 and sorted(folder.rglob("*")) == kept
        (folder / "CNAME").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "cpu"}, "is for cpu; a browser needs the profile wasm or webgpu"),
        ({"kind": "gguf"}, "is for gguf; a browser needs"),
        ({"files": {}}, "lacks config.json, tokenizer.json"),
    ],
)
def test_artifacts_that_no_browser_runs(
    change: dict, message: str, artifact: Callable[[str], Path]
) -> None:
    opened = open_artifact(artifact("wasm"))
    with pytest.raises(RequestError, match=message):
        site.make_site([replace(opened, manifest=replace(opened.manifest, **change))])


@pytest.mark.parametrize(
    ("head", "gemma", "licence"),
    [
        ("license: gemma", True, "gemma"),
        ("license: apache-2.0\nbase_model: someone/griffin", False, "apache-2.0"),
        ("license: other", False, None),
        ("base_model: google/recurrentgemma-2b-it", True, "gemma"),
        ("base_model:\n- google/recurrentgemma-9b", True, "gemma"),
        ("base_model: someone/griffin", False, None),
    ],
)
def test_the_terms_are_those_of_the_card(
    built_page: None,
    artifact: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    head: str,
    gemma: bool,
    licence: str | None,
) -> None:
    """Gemma's terms are shown for Google's weights alone."""
    folder = tmp_path / "model"
    shutil.copytree(artifact("wasm"), folder)
    (folder / CARD).write_text(f"---\n{head}\n---\n\n# A model\n")
    made = site.make_site([open_artifact(folder)])
    (model,) = json.loads(site.read(made[site.CATALOG]))["models"]
    assert (model["gemma"], model["licence"]) == (gemma, licence)
    has_licence = "license" in head or gemma
    assert ("names no licence" in capsys.readouterr().err) != has_licence


def test_two_of_a_profile(artifact: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="two artifacts have the profile wasm"):
        site.make_site([open_artifact(artifact("wasm"))] * 2)


def test_an_installation_without_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(site, "BUILT", tmp_path / "page.zip")
    with pytest.raises(RequestError, match=r"Node was missing .* `make page`"):
        site.make_site([open_artifact(artifact("wasm"))])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildFailed, match="npm are not installed"):
        build.build(tmp_path / "page.zip")


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "give -o DIR to write the site, --serve, or both"), (["--open", "-o", "x"], "--serve")],
)
def test_what_a_command_lacks(options: list[str], message: str, tmp_path: Path) -> None:
    result = rgexport("web", "nothing", *options, folder=tmp_path)
    assert result.returncode == 2 and message in result.stderr


def test_the_local_server(wasm_site: site.Site) -> None:
    """It has the headers that threads need, and the types that browsers insist on."""
    server = local_server(wasm_site, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        for name in ("", *(name for name in wasm_site if not name.startswith("chunks/"))):
            with urllib.request.urlopen(address + name) as answer:
                assert answer.read() == site.read(wasm_site[name or "index.html"])
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
                if name.endswith("js"):
                    assert answer.headers["Content-Type"] == "text/javascript"
        for wrong in ("../pyproject.toml", "chunks/", "%2e%2e/x"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + wrong)
        with pytest.raises(RequestError, match=r"cannot listen on .* choose another"):
            local_server(wasm_site, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
