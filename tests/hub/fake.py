"""A small Hugging Face hub in memory: repositories, commits, large files, tokens, gates."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 10_000
"""Bytes from which a file is uploaded by itself."""
TOKEN = "hf_test"


@dataclass
class Repository:
    """One model."""

    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """All of it; `breaks` cuts that many uploads of large files short."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    breaks: int = 0
    uploads: list[str] = field(default_factory=list)
    """Hashes of large files that came, in order."""
    asked: list[str] = field(default_factory=list)


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """Runs one on a free port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "no token"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            self._json({"files": modes})
        elif "/commit/" in path:
            self._commit(path, body)
        else:
            self._json({"valid": True})

    def do_PUT(self) -> None:
        oid = self._path().rpartition("/")[2]
        if self.hub.breaks > 0:
            self.hub.breaks -= 1  # a connection that is cut would be tried again for a minute
            self._body()
            self._json({"error": "broken"}, 400)
            return
        data = self._body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.hub.uploads.append(oid)
        self._send(b"")

    def do_GET(self) -> None:
        path = self._path()
        if path.startswith("/api/models/"):
            self._about(path.removeprefix("/api/models/"))
            return
        repo, _, rest = path[1:].partition("/resolve/")
        found = self._readable(repo)
        if found is None:
            return
        revision, _, name = rest.partition("/")
        if revision not in ("main", found.sha):
            self._error(404, "RevisionNotFound", found)
        elif name not in found.files:
            self._error(404, "EntryNotFound", found)
        else:
            self._file(found, found.files[name])

    do_HEAD = do_GET

    def _about(self, path: str) -> None:
        owner, name, *rest = path.split("/")
        found = self._readable(f"{owner}/{name}")
        if found is None:
            return
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in found.files.items()
            ]
            self._json(tree)
            return
        if rest[:1] == ["revision"] and rest[1] not in ("main", found.sha):
            self._error(404, "RevisionNotFound", found)
            return
        siblings = [{"rfilename": n, "size": len(data)} for n, data in found.files.items()]
        about = {"id": f"{owner}/{name}", "sha": found.sha, "siblings": siblings}
        self._json(about | {"private": found.private, "tags": [], "downloads": 0, "likes": 0})

    def _readable(self, repo: str) -> Repository | None:
        found, known = self.hub.repositories.get(repo), self.headers.get("Authorization")
        if found is None or (found.private and known != f"Bearer {TOKEN}"):
            self._error(401, "RepoNotFound", None)
        elif found.gated:
            self._error(403, "GatedRepo", found)
        else:
            return found
        return None

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not repo.startswith("me/"):
            self._json({"error": "you may not write there"}, 403)
            return
        there = repo in self.hub.repositories
        if not there:
            self.hub.repositories[repo] = Repository(
                private=asked.get("visibility") == "private" or bool(asked.get("private"))
            )
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        self._json(answer, 409 if there else 200)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            known = one["oid"] in self.hub.objects
            objects.append(one if known else one | {"actions": upload})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, path: str, body: bytes) -> None:
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        repo = self.hub.repositories[name]
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repo.commits.append(value["summary"])
            elif item["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del repo.files[value["path"]]
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def _file(self, repo: Repository, data: bytes) -> None:
        headers = {"X-Repo-Commit": repo.sha, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        start = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(data[int(start) :], status=206, headers=headers)
        elif self.hub.breaks > 0 and self.command == "GET" and len(data) >= LARGE:
            self.hub.breaks -= 1
            self._send(data[: len(data) // 2], length=len(data), headers=headers)
            self.close_connection = True
        else:
            self._send(data, headers=headers)

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _error(self, status: int, code: str, repo: Repository | None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        if repo is not None:
            headers["X-Repo-Commit"] = repo.sha
        self._send(json.dumps({"error": code}).encode(), status=status, headers=headers)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status=status)

    def _send(
        self,
        data: bytes,
        *,
        status: int = 200,
        length: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""
