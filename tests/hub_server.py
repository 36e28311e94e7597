"""A Hub on this machine: the endpoints that huggingface_hub calls, over real HTTP, with faults.

Large files are served as on the real Hub: `resolve` answers with a redirect to a storage server of
another origin, which takes no token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_LocalHubSecretToken"
LARGE = re.compile(r".*\.(safetensors|bin)")

Files = dict[str, bytes]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    sha: str
    files: Files
    message: str


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)

    @property
    def files(self) -> Files:
        return self.branches["main"].files

    def commit(self, branch: str, files: Files, message: str) -> Commit:
        parent = self.branches[branch].sha if branch in self.branches else ""
        sha = hashlib.sha1(f"{parent}{message}{len(self.commits)}".encode()).hexdigest()
        commit = Commit(sha, files, message)
        self.commits.append(commit)
        self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> Commit | None:
        found = [commit for commit in self.commits if commit.sha == revision]
        return self.branches.get(revision) or (found[0] if found else None)


@dataclass
class Fault:
    """What goes wrong, for requests that match.

    Attributes:
        kind: A status as text ("500"), or "cut" (the connection ends in mid-body), "short" or
            "long" (another number of bytes than asked for), "whole" (ranges are ignored), "etag"
            (the file seems to be another one from now on).
        path: Pattern that the path must contain.
        times: How many requests are hit; -1 for all.
        skip: How many matching requests go well before.
        method: Of the request.
        headers: To add to an error.
        hits: How many requests were hit.
    """

    kind: str
    path: str
    times: int = -1
    skip: int = 0
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    hits: int = 0


@dataclass
class Request:
    method: str
    path: str
    at_hub: bool
    token: str | None
    status: int = 0
    sent: int = 0


class LocalHub:
    """Two servers: the Hub (`url`) and its storage (`storage_url`)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.has_storage = True  # without, large files come from the Hub itself
        self.lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", 0), _handler(self, hub)) for hub in (True, False)]
        self.url, self.storage_url = (
            f"http://127.0.0.1:{server.server_port}" for server in self._servers
        )

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        threads = [
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            for server in self._servers
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server in self._servers:
                server.shutdown()
                server.server_close()

    def add(
        self, repo_id: str, source: Path | Files, *, private: bool = False, gated: bool = False
    ) -> str:
        """Makes a repository of a folder; returns the commit."""
        files = source
        if isinstance(source, Path):
            paths = [path for path in source.rglob("*") if path.is_file()]
            files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths}
        repo = self.repos.setdefault(repo_id, Repo(private, gated))
        return repo.commit("main", dict(files), "add").sha

    def fail(self, kind: str, path: str, **options: Any) -> None:
        self.faults.append(Fault(kind, path, **options))

    def sent(self, path: str = "") -> int:
        """Bytes of bodies that were sent for paths that contain this pattern."""
        return sum(request.sent for request in self.requests if re.search(path, request.path))

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    fault.hits += 1
                    return fault
        return None

    def changed(self, path: str) -> bool:
        """Whether a file seems to be another one: an "etag" fault has hit it."""
        return any(f.kind == "etag" and f.hits and re.search(f.path, path) for f in self.faults)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        pass  # a client may go away in mid-answer


def _handler(hub: LocalHub, at_hub: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub, Handler.at_hub = hub, at_hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    at_hub: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    # Answers -------------------------------------------------------------------------------------

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        split = urlsplit(self.path)
        self.url_path, self.query = unquote(split.path), parse_qs(split.query)
        authorization = self.headers.get("Authorization")
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        self.entry = Request(self.command, self.path, self.at_hub, self.token)
        self.hub.requests.append(self.entry)
        self.fault = self.hub.fault_for(self.command, self.url_path)
        if self.fault is not None and self.fault.kind.isdigit():
            self.send(int(self.fault.kind), b"fault", self.fault.headers)
        elif self.at_hub:
            self.answer_as_hub()
        else:
            self.answer_as_storage()

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        self.entry.status = status
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.fault is not None and self.fault.kind == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.entry.sent += len(body)
            self.wfile.write(body)

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str, message: str = "") -> None:
        body = json.dumps({"error": message or code}).encode()
        headers = {"X-Error-Code": code} if code else {}
        self.send(status, body, {**headers, "X-Error-Message": message or code})

    # The Hub -------------------------------------------------------------------------------------

    def answer_as_hub(self) -> None:
        path = self.url_path
        routes = (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate_yaml),
            (r"/api/whoami-v2", self.whoami),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", self.info),
            (
                r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)/?(?P<file>.*)",
                self.tree,
            ),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>.+)", self.branch),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", self.preupload),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", self.commit),
            (r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/verify", self.lfs_verify),
            (r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self.resolve),
        )
        if self.token not in (None, TOKEN):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for pattern, route in routes:
            found = re.fullmatch(pattern, path)
            if found:
                return route(**found.groupdict())
        return self.refuse(404, "", f"no route for {path}")

    def repository(self, repo: str) -> Repo | None:
        """The repository, or None after an answer."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.token is None):
            self.refuse(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
            return None
        if self.command in ("POST", "PUT") and self.token is None:
            self.refuse(401, "", "Invalid username or password.")
            return None
        return found

    def at(self, repo: str, revision: str | None) -> Commit | None:
        """The commit, or None after an answer."""
        found = self.repository(repo)
        commit = found and found.at(revision or "main")
        if found is not None and commit is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return commit

    def whoami(self) -> None:
        if self.token is None:
            self.refuse(401, "", "Invalid username or password.")
        else:
            self.send_json({"name": "me", "type": "user", "orgs": []})

    def create(self) -> None:
        if self.token is None:
            return self.refuse(401, "", "Invalid username or password.")
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            return self.send_json({"error": "You already created this repo", "url": url}, 409)
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repos[repo_id] = Repo(private)
        self.hub.repos[repo_id].commit("main", {".gitattributes": b""}, "initial commit")
        return self.send_json({"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        errors = [{"message": '"license" is unknown'}] if "license: mine" in content else []
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, repo: str, revision: str | None) -> None:
        commit = self.at(repo, revision)
        if commit is not None:
            files = [{"rfilename": name} for name in sorted(commit.files)]
            found = self.hub.repos[repo]
            self.send_json(
                {
                    "_id": "0",
                    "id": repo,
                    "modelId": repo,
                    "sha": commit.sha,
                    "siblings": files,
                    "private": found.private,
                    "gated": "manual" if found.gated else False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )

    def tree(self, repo: str, revision: str, file: str) -> None:
        commit = self.at(repo, revision)
        if commit is None:
            return None
        names = [name for name in sorted(commit.files) if not file or name.startswith(f"{file}/")]
        if file and not names:
            return self.refuse(404, "EntryNotFound", f"{file} does not exist")
        entries = []
        for name in names:
            data = commit.files[name]
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
            if LARGE.fullmatch(name):
                oid = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return self.send_json(entries)

    def branch(self, repo: str, revision: str) -> None:
        found = self.repository(repo)
        if found is None:
            return None
        if revision in found.branches:
            return self.refuse(409, "", "Reference already exists")
        found.branches[revision] = found.branches["main"]
        return self.send_json({})

    def preupload(self, repo: str, revision: str) -> None:
        commit = self.at(repo, revision)
        if commit is not None:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if LARGE.fullmatch(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.send_json({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        if self.repository(repo) is None:
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.storage_url}/lfs/{item['oid']}?signature=1"}
                verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_verify(self, repo: str) -> None:
        known = json.loads(self.body)["oid"] in self.hub.blobs
        self.send_json({}, 200 if known else 404)

    def commit(self, repo: str, revision: str) -> None:
        parent = self.at(repo, revision)
        if parent is None:
            return None
        files, summary = dict(parent.files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                summary = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.refuse(400, "", "LFS object was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        branch = "refs/pr/1" if "create_pr" in self.query else revision
        done = self.hub.repos[repo].commit(branch, files, summary)
        url = f"{self.hub.url}/{repo}"
        answer = {"commitUrl": f"{url}/commit/{done.sha}", "commitOid": done.sha}
        if branch != revision:
            answer["pullRequestUrl"] = f"{url}/discussions/1"
        return self.send_json(answer)

    def resolve(self, repo: str, revision: str, file: str) -> None:
        commit = self.at(repo, revision)
        if commit is None:
            return None
        if self.hub.repos[repo].gated and self.token is None:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        about = {"X-Repo-Commit": commit.sha}
        if file not in commit.files:
            body = b"Entry not found"
            return self.send(404, body, {**about, "X-Error-Code": "EntryNotFound"})
        data = commit.files[file]
        if not LARGE.fullmatch(file) or not self.hub.has_storage:
            return self.send_range(data, self.etag(git_oid(data)), about)
        oid = hashlib.sha256(data).hexdigest()
        self.hub.blobs[oid] = data
        about |= {
            "X-Linked-Etag": f'"{self.etag(oid)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage_url}/lfs/{oid}?file={file}",
        }
        return self.send(302, b"", about)

    def etag(self, oid: str) -> str:
        return oid[::-1] if self.hub.changed(self.url_path) else oid

    # The storage ---------------------------------------------------------------------------------

    def answer_as_storage(self) -> None:
        oid = self.url_path.removeprefix("/lfs/")
        if self.token is not None:
            return self.refuse(400, "", "a token was sent to the storage")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.refuse(400, "", "wrong hash")
            self.hub.blobs[oid] = self.body
            return self.send(200, b"", {"ETag": f'"{oid[:32]}"'})
        if oid not in self.hub.blobs:
            return self.refuse(404, "", "no such object")
        return self.send_range(self.hub.blobs[oid], self.etag(oid[:32]), {})

    def send_range(self, data: bytes, etag: str, headers: dict[str, str]) -> None:
        headers = {**headers, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        kind = self.fault.kind if self.fault is not None else ""
        if asked is None or kind == "whole":
            self.send(200, data, headers)
            return
        start = int(asked[1])
        stop = min(int(asked[2] or len(data)) + 1, len(data))
        if start >= stop:
            self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        stop -= (stop - start) // 2 if kind == "short" else 0
        body = data[start:stop] + (b"more" if kind == "long" else b"")
        given = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        self.send(206, body, {**headers, "Content-Range": given})
