"""A small Hugging Face hub in memory: repositories, commits, large files, tokens, gates."""

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

LARGE = 10_000  # bytes from which a file is uploaded by itself
TOKEN = "hf_test"
REPOSITORY = "/api/models/{owner}/{name}"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        hashes = sorted((name, hash(data)) for name, data in self.files.items())
        return hashlib.sha1(repr(hashes).encode()).hexdigest()


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    is_broken: bool = False
    """Whether uploads and downloads of more than a megabyte fail."""
    uploads: list[str] = field(default_factory=list)
    """Hashes of large files that came, in order."""
    asked: list[str] = field(default_factory=list)

    def repository(self, request: Request, revision: str = "main") -> Repository:
        """The repository of an address; raises if the request may not see it."""
        owner, name = (request.path_params[part] for part in ("owner", "name"))
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.private and not _has_token(request)):
            raise _refusal(401, "RepoNotFound")
        if repository.gated:
            raise _refusal(403, "GatedRepo")
        if revision not in ("main", repository.sha):
            raise _refusal(404, "RevisionNotFound")
        return repository

    def transfer(self, data: bytes) -> None:
        if self.is_broken and len(data) > 10**6:
            raise HTTPException(400)  # a connection that is cut would be tried again for a minute


def _has_token(request: Request) -> bool:
    return request.headers.get("Authorization") == f"Bearer {TOKEN}"


def _refusal(status: int, code: str) -> HTTPException:
    return HTTPException(status, code, {"X-Error-Code": code, "X-Error-Message": code})


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()
    server = uvicorn.Server(uvicorn.Config(_app(hub), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        hub.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield hub
        server.should_exit = True
        thread.join()


def _app(hub: Hub) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def note(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        hub.asked.append(f"{request.method} {request.url.path}")
        if request.method == "POST" and not _has_token(request):
            return Response(status_code=401)
        return await answer(request)

    @app.post("/api/validate-yaml")
    async def validate() -> Any:
        return {"valid": True}

    @app.post("/api/repos/create")
    async def create(request: Request) -> Any:
        asked = await request.json()
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not repo.startswith("me/"):
            raise HTTPException(403)
        status = 409 if repo in hub.repositories else 200
        is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.repositories.setdefault(repo, Repository(private=is_private))
        return JSONResponse({"url": f"{hub.url}/{repo}", "name": repo, "id": repo}, status)

    @app.post(f"{REPOSITORY}/preupload/main")
    async def announce(request: Request) -> Any:
        files = (await request.json())["files"]
        modes = ["lfs" if file["size"] >= LARGE else "regular" for file in files]
        answers = zip(files, modes, strict=True)
        return {"files": [f | {"uploadMode": mode, "shouldIgnore": False} for f, mode in answers]}

    @app.post("/{repository:path}.git/info/lfs/objects/batch")
    async def announce_large(request: Request) -> Any:
        objects = (await request.json())["objects"]
        for one in objects:
            if one["oid"] not in hub.objects:
                one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    @app.put("/lfs/{oid}")
    async def upload(oid: str, request: Request) -> None:
        data = await request.body()
        hub.transfer(data)
        assert hashlib.sha256(data).hexdigest() == oid
        hub.objects[oid] = data
        hub.uploads.append(oid)

    @app.post(f"{REPOSITORY}/commit/main")
    async def commit(request: Request) -> Any:
        repository = hub.repository(request)
        for line in (await request.body()).splitlines():
            match json.loads(line):
                case {"key": "header", "value": {"summary": summary}}:
                    repository.commits.append(summary)
                case {"key": "file", "value": {"path": path, "content": content}}:
                    repository.files[path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                    repository.files[path] = hub.objects[oid]
                case {"key": "deletedFile", "value": {"path": path}}:
                    del repository.files[path]
        owner, name = (request.path_params[part] for part in ("owner", "name"))
        url = f"{hub.url}/{owner}/{name}/commit/{repository.sha}"
        return {"commitUrl": url, "commitOid": repository.sha}

    @app.get(f"{REPOSITORY}/tree/{{revision}}")
    async def tree(revision: str, request: Request) -> Any:
        entry, files = {"type": "file", "oid": "0" * 40}, hub.repository(request, revision).files
        return [entry | {"path": name, "size": len(data)} for name, data in files.items()]

    @app.get(REPOSITORY)
    @app.get(f"{REPOSITORY}/revision/{{revision}}")
    async def about(owner: str, name: str, request: Request, revision: str = "main") -> Any:
        repository = hub.repository(request, revision)
        files = [{"rfilename": n, "size": len(data)} for n, data in repository.files.items()]
        facts = {"id": f"{owner}/{name}", "sha": repository.sha, "siblings": files}
        return facts | {"private": repository.private, "tags": [], "downloads": 0, "likes": 0}

    @app.api_route("/{owner}/{name}/resolve/{revision}/{path}", methods=["GET", "HEAD"])
    async def download(revision: str, path: str, request: Request) -> Any:
        repository = hub.repository(request, revision)
        if path not in repository.files:
            raise _refusal(404, "EntryNotFound")
        data = repository.files[path]
        if request.method == "GET":
            hub.transfer(data)
        headers = {"X-Repo-Commit": repository.sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return Response(data, headers=headers)

    return app
