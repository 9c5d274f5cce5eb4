"""A Hugging Face Hub of one process: repositories in memory behind the HTTP calls that uploads and downloads make.

Written from what ``huggingface_hub`` sends and reads; files are committed inline, never through large-file storage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
_RESOLVE = re.compile(r"/([\w-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([\w-]+/[\w.-]+)/(\w+)(?:/([^/]+))?(?:/.*)?")


def parts(path: str) -> tuple[str, str, str]:
    """A call's repository, what it wants, and the revision."""
    found = _API.fullmatch(path)
    assert found, f"the fake hub does not know {path}"
    return found[1], found[2], unquote(found[3] or "main")


class FakeHub:
    """``repositories``: name to files; ``asked``: every file that was fetched; ``tokens``: those that came along."""

    def __init__(self) -> None:
        self.repositories: dict[str, Files] = {}
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.revisions: set[str] = {"main"}
        self.url = ""

    def commit(self, name: str) -> str:
        """A revision's name that depends on the files."""
        return hashlib.sha1(repr(sorted(self.repositories[name].items())).encode()).hexdigest()

    def post(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":  # of the card in a commit
            return {"errors": [], "warnings": []}
        name, what, revision = parts(path)
        if what == "branch":
            self.revisions.add(revision)
            return {}
        if what == "preupload":
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = self.commit(name)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}", "hookOutput": ""}

    def get(self, path: str) -> tuple[bytes, dict[str, str]] | None:
        found = _RESOLVE.fullmatch(path)
        if found:
            name, revision, file = found.groups()
            data = self.repositories.get(name, {}).get(unquote(file))
            if data is None or revision not in {*self.revisions, self.commit(name)}:
                code = "EntryNotFound" if name in self.repositories else "RepoNotFound"
                return b"", {"X-Error-Code": code}
            self.asked.append(unquote(file))
            tag = hashlib.sha1(data).hexdigest()
            return data, {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit(name)}
        name, what, revision = parts(path)
        if name not in self.repositories:
            return b"", {"X-Error-Code": "RepoNotFound"}
        if revision not in {*self.revisions, self.commit(name)}:
            return b"", {"X-Error-Code": "RevisionNotFound"}
        files = self.repositories[name]
        if what == "tree":
            rows = [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in sorted(files.items())]  # fmt: skip
            return json.dumps(rows).encode(), {}
        info = {"_id": name, "id": name, "sha": self.commit(name), "siblings": [{"rfilename": p} for p in files]}
        return json.dumps(info).encode(), {}


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub at ``hub.url`` until the end of the block."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self) -> None:
            data, headers = hub.get(urlsplit(self.path).path) or (b"", {})
            self._answer(404 if "X-Error-Code" in headers else 200, data, headers)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(200, json.dumps(hub.post(urlsplit(self.path).path, body)).encode(), {})

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
