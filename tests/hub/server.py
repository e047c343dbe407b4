"""A local server that speaks as much of the Hugging Face Hub's API as downloads need, with faults on demand."""

import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
Fault = tuple[int, dict[str, str]] | str | float
"""What a request meets: (status, headers), 'drop' (no answer), 'cut' (half of the body), or seconds of silence."""


def commit_of(folder: Path) -> str:
    """The commit that stands for what a folder holds."""
    total = hashlib.sha1()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{file.relative_to(folder)} {hashlib.sha1(file.read_bytes()).hexdigest()}".encode())
    return total.hexdigest()


class Hub(ThreadingHTTPServer):
    """`repos` maps 'models/owner/name' or 'datasets/owner/name' to a folder, `moved` old to new names, `faults` a
    pattern of 'METHOD /path' to what its next requests meet, one each. `asked` lists all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos: dict[str, Path] = {}
        self.moved: dict[str, str] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, request: str) -> Fault | None:
        for pattern, left in self.faults.items():
            if left and re.search(pattern, request):
                return left.pop(0)
        return None

    def handle_error(self, *_: Any) -> None:  # a client that went away
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.asked.append(request)
        fault = self.server.fault(request)
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, tuple):
            self._send(fault[0], b"", fault[1])
            return
        if fault == "drop":
            self._end()
            return
        for old, new in self.server.moved.items():
            if old.removeprefix("models/") in path:
                there = path.replace(old.removeprefix("models/"), new.removeprefix("models/"))
                self._send(307, b"", {"Location": there})
                return
        if found := API.fullmatch(path):
            self._api(*found.groups())
        elif found := FILE.fullmatch(path):
            self._file(*found.groups(), cut=fault == "cut")
        else:
            self._send(404, b"", {})

    do_HEAD = do_GET  # noqa: N815

    def _api(self, kind: str, name: str, what: str | None, revision: str | None) -> None:
        folder = self._folder(f"{kind}/{name}", revision)
        if folder is None:
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        tree = [
            {
                "type": "file",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]
        info = {"id": name, "sha": commit_of(folder), "siblings": [{"rfilename": file["path"]} for file in tree]}
        self._send(200, json.dumps(tree if what == "tree" else info).encode(), {"Content-Type": "application/json"})

    def _file(self, kind: str | None, name: str, revision: str, file: str, cut: bool) -> None:
        folder = self._folder(f"{kind or 'models/'}{name}", revision)
        if folder is None:
            return
        data = (folder / file).read_bytes()
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(folder), "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[int(start[1]) if start else 0 :], headers, cut)

    def _folder(self, repo: str, revision: str | None) -> Path | None:
        folder = self.server.repos.get(repo)
        if folder is None:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", "v1", commit_of(folder)):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            folder = None
        return folder

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._end()

    def _end(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass
