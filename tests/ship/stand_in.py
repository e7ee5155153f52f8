"""A stand-in for the Hugging Face Hub: a server on 127.0.0.1 with the endpoints that huggingface_hub uses to push and
fetch a model, on repositories held in memory. Large files go through git LFS's basic transfer, as on the Hub."""

from __future__ import annotations

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

TOKEN = "hf_standin"
LARGE = (".safetensors", ".onnx")


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Commit id -> files."""
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{branch} {len(self.commits)}".encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        self.commits[digest.hexdigest()] = dict(files)
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class StandIn(ThreadingHTTPServer):
    """`fail` names a step (a word of the path) and the status it answers with; 0 cuts the connection instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.fail: dict[str, int] = {}
        self.log: list[tuple[str, str, str | None]] = []
        """(method, path, user agent) of every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no fault."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        hub = self.server
        body = self.body()
        path = unquote(urlsplit(self.path).path).strip("/")
        hub.log.append((self.command, path, self.headers.get("User-Agent")))
        failing = next((status for step, status in hub.fail.items() if step in path), None)
        if failing == 0:
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        if failing is not None:
            return self.refuse(failing, message="The stand-in refuses")
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}") and not path.startswith("lfs/"):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        match path.split("/"):
            case ["api", "validate-yaml"]:
                return self.answer(200, {"errors": [], "warnings": []})
            case ["lfs", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                hub.blobs[oid] = body
                return self.answer(200)
            case ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case ["api", "models", owner, name, *rest]:
                repository = self.find(f"{owner}/{name}")
                return repository and self.model(repository, f"{owner}/{name}", rest, body)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                objects = json.loads(body)["objects"]
                return self.answer(200, {"transfer": "basic", "objects": [self.upload(each) for each in objects]})
            case [owner, name, "resolve", revision, *file]:
                repository = self.find(f"{owner}/{name}")
                return repository and self.file(repository, revision, "/".join(file))
        return self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def find(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.headers.get("Authorization")):
            self.refuse(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
            return None
        return found

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if not self.headers.get("Authorization"):
            return self.refuse(401)
        content = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return self.answer(409, {**content, "error": "You already created this model repo"})
        made = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[name] = made
        return self.answer(200, content)

    def upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.server.blobs:
            return asked
        return {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}

    def model(self, repository: Repository, name: str, rest: list[str], body: bytes) -> None:
        match rest:
            case ["branch", branch]:
                repository.branches.setdefault(branch, repository.branches["main"])
                return self.answer(200, {})
            case [] | ["revision", _]:
                commit = repository.resolve(rest[1] if rest else "main")
                if commit is None:
                    return self.refuse(404, "RevisionNotFound")
                siblings = [{"rfilename": file} for file in repository.commits[commit]]
                return self.answer(
                    200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
                )
            case ["preupload", _]:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": modes})
            case ["commit", branch]:
                return self.commit(repository, name, branch, [json.loads(line) for line in body.splitlines()])
            case ["tree", revision]:
                files = repository.commits[repository.resolve(revision) or ""]
                return self.answer(200, [self.entry(file, content) for file, content in files.items()])
        return self.refuse(404)

    def commit(self, repository: Repository, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(repository.commits[repository.branches[branch]])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.server.blobs:
                        return self.refuse(400, message="a large file was not uploaded")
                    files[value["path"]] = self.server.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case "header" if value.get("parentCommit") != repository.branches[branch]:
                    return self.refuse(412, message="the branch has moved on")
        oid = repository.commit(branch, files)
        return self.answer(200, {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def entry(self, file: str, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": file, "size": len(content), "oid": blob_id(content)}
        if file.endswith(LARGE):
            found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return found

    def file(self, repository: Repository, revision: str, file: str) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        content = repository.commits[commit].get(file)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        etag = hashlib.sha256(content).hexdigest() if file.endswith(LARGE) else blob_id(content)
        return self.answer(
            200, content, X_Repo_Commit=commit, ETag=f'"{etag}"', Content_Length=str(len(content))
        )  # fmt: skip


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A server that runs while the block does."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
