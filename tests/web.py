"""A real HTTP server for tests, in threads of this process: it counts what it sends, and spoils answers when told."""

import contextlib
import re
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass(frozen=True)
class Spoil:
    """What is done with one request for a file instead of answering it."""

    status: int = 0
    """This status is all of the answer; 0: the connection is reset."""
    after: int = 0
    """With a reset: bytes of the answer's body that are sent before."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Web:
    """Files at `url`/name. Attributes may be changed at any time."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    etags: bool = True
    dates: bool = True
    ranges: bool = True
    lengths: bool = True
    spoils: list[Spoil] = field(default_factory=list)
    """What is done with the next requests for contents, one each."""
    down: Spoil | None = None
    """What is done with every request once `spoils` is used up."""
    healthy: int = 0
    """Requests for contents that are let through before the next of `spoils`, or `down`."""
    sent: int = 0
    """Bytes of bodies sent."""
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    """Method, path and status; 0 for a reset."""

    def next_spoil(self, method: str) -> Spoil | None:
        if method == "HEAD":
            return self.down if not self.spoils and not self.healthy else None
        if self.healthy:
            self.healthy -= 1
            return None
        return self.spoils.pop(0) if self.spoils else self.down


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        web, name = self.web, self.path.lstrip("/")
        spoil = web.next_spoil(self.command) if name in web.files else None
        if spoil is not None and spoil.status:
            self._send(spoil.status, b"", spoil.headers)
        elif name in web.files:
            self._send_file(web.files[name], spoil)
        elif any(other.startswith(name) for other in web.files) and (not name or name.endswith("/")):
            links = "".join(f'<a href="/{other}">{other}</a>' for other in web.files)
            self._send(200, links.encode(), {"Content-Type": "text/html"})
        else:
            self._send(404, b"")

    def _send_file(self, content: bytes, spoil: Spoil | None) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        if self.web.etags:
            headers["ETag"] = f'"{zlib.crc32(content):08x}"'
        if self.web.dates:
            headers["Last-Modified"] = formatdate(1e9 + zlib.crc32(content) % 10**6, usegmt=True)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.web.ranges else None
        status = 200
        if asked is not None:
            start, stop = int(asked[1]), min(len(content), int(asked[2] or len(content)) + 1)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        self._send(status, content, headers, spoil)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, spoil: Spoil | None = None
    ) -> None:
        self.web.requests.append((self.command, self.path, 0 if spoil else status))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.web.lengths or status != 200:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        part = body if spoil is None else body[: spoil.after]
        self.web.sent += len(part)
        with contextlib.suppress(ConnectionError):  # a reader that has enough may go away
            self.wfile.write(part)
            self.wfile.flush()
            if spoil is not None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if spoil is not None or not self.web.lengths:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def running_web() -> Iterator[Web]:
    class Handler(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Handler.web = Web(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield Handler.web
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web() -> Iterator[Web]:
    with running_web() as server:
        yield server
