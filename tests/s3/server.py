"""A real S3 server (moto, in a process of its own) behind a proxy that injects faults on demand."""

import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from time import sleep
from typing import Any

import s3fs

SERVE = (
    "from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0, verbose=False); s.start(); "
    "print(s.get_host_and_port()[1], flush=True); input()"  # until the pipe is closed: never outlives its parent
)
REFUSALS = {
    "403": ("AccessDenied", "Access Denied"),
    "500": ("InternalError", "We encountered an internal error. Please try again."),
    "503": ("SlowDown", "Please reduce your request rate."),
}
KINDS = (*REFUSALS, "cut", "hang", "lost", "stall", "terse")
HOPS = {"connection", "transfer-encoding", "content-length", "host", "expect"}
HELD = 300  # seconds, beyond every client's patience


@dataclass
class Fault:
    """What the next `left` matching requests meet; `met` counts those that did."""

    kind: str
    left: int
    method: str
    path: str
    met: int = 0


@dataclass
class S3:
    """The server as a test sees it. `behind` goes past the proxy: to bring data there, and to look at what came."""

    endpoint: str
    behind: s3fs.S3FileSystem
    bucket: str = ""
    faults: list[Fault] = field(default_factory=list)
    met: Counter[str] = field(default_factory=Counter)
    asked: list[str] = field(default_factory=list)  # 'GET /bucket/key bytes=0-9': every request that came
    _lock: Any = field(default_factory=Lock)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def environ(self) -> dict[str, str]:
        """What a client needs to know."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def fault(self, kind: str, times: int = 1, method: str = "", path: str = "") -> Fault:
        """Let the next requests of this method (any) whose path and query hold `path` meet a fault.

        '403', '500', '503': S3's own refusals. 'cut': the connection ends inside a GET's answer or a PUT's body.
        'hang': no answer while the client waits. 'lost': the request is carried out, and the connection ends.
        'stall': nothing of a PUT's body is taken. 'terse': carried out; a refusal does not name the failed condition.
        """
        assert kind in KINDS
        self.faults.append(Fault(kind, times, method, path))
        return self.faults[-1]

    def meet(self, method: str, path: str, ranged: str) -> str:
        """The kind of fault that a request meets; '' for none."""
        with self._lock:
            self.asked.append(f"{method} {path} {ranged}".strip())
            for fault in self.faults:
                if fault.left and fault.method in ("", method) and fault.path in path:
                    fault.left, fault.met = fault.left - 1, fault.met + 1
                    self.met[fault.kind] += 1
                    return fault.kind
        return ""


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def handle_one_request(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # a client that lost its patience
            super().handle_one_request()
            return
        self.close_connection = True

    def do_GET(self) -> None:
        kind = self.server.s3.meet(self.command, self.path, self.headers.get("Range", ""))
        length = int(self.headers.get("Content-Length", 0))
        if kind == "cut" and self.command != "GET":
            self.rfile.read(length // 2)
            self._end()
        elif kind == "stall":
            sleep(HELD)
        elif kind == "hang":
            self.rfile.read(length)
            self.connection.settimeout(HELD)
            self.connection.recv(1)  # nothing, once the client has hung up
            self._end()
        elif kind in REFUSALS:
            self.rfile.read(length)
            code, message = REFUSALS[kind]
            self._answer(int(kind), {"Content-Type": "application/xml"}, _xml(code, message))
        else:
            self._carry_out(self._body(length), kind)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _body(self, length: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return body

    def _carry_out(self, body: bytes, kind: str) -> None:
        there = HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOPS}
        there.request(self.command, self.path, body, headers)
        answer: HTTPResponse = there.getresponse()
        data = answer.read()
        there.close()
        if kind == "lost":
            self._end()
            return
        if kind == "terse":
            data = re.sub(rb"<Condition>.*?</Condition>", b"", data)
        told = {name: value for name, value in answer.getheaders() if name.lower() not in HOPS}
        if self.command == "HEAD" and (size := answer.getheader("Content-Length")):
            told["Content-Length"] = size
        self._answer(answer.status, told, data, cut=kind == "cut")

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._end()

    def _end(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)  # also where a forked process holds the socket too


def _xml(code: str, message: str) -> bytes:
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{error}'.encode()


@contextmanager
def serving() -> Iterator[S3]:
    """Server and proxy, on free ports of 127.0.0.1."""
    command = [sys.executable, "-c", SERVE]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as moto,
        ThreadingHTTPServer(("127.0.0.1", 0), _Proxy) as proxy,
    ):
        assert moto.stdout is not None
        port = int(moto.stdout.readline())
        behind = s3fs.S3FileSystem(
            key="testing", secret="testing", endpoint_url=f"http://127.0.0.1:{port}", use_listings_cache=False
        )
        proxy.daemon_threads, proxy.behind = True, port  # type: ignore[attr-defined]
        proxy.s3 = S3(f"http://127.0.0.1:{proxy.server_port}", behind)  # type: ignore[attr-defined]
        Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy.s3  # type: ignore[attr-defined]
        proxy.shutdown()
        moto.kill()
