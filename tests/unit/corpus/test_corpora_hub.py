"""A dataset by its name on a hub that is busy at every step: a server that answers as the hub does, in threads here,
and `datasets` in a process of its own, as it reads HF_ENDPOINT once."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECORDS = 300
FILES = {
    f"part-{part}.jsonl": "".join(
        json.dumps({"text": f"field {n}", "n": n}) + "\n" for n in range(part * RECORDS, (part + 1) * RECORDS)
    ).encode()
    for part in range(3)
}
READ = """
import sys, time
time.sleep = lambda seconds: None  # the tries of all libraries, without their pauses
from pipeline.corpus.formats.named import NamedDataset
from pipeline.corpus.sources.retry import Unread
from pipeline.corpus.formats.records import Columns
dataset = NamedDataset("one/tiny", None, "train", Columns("text", "text", ("n",)))
try:
    numbers = [n for chunk in dataset.chunks() for n in chunk.labels["n"].to_pylist()]
except Unread as error:
    print(error)
else:
    print(numbers == list(range(900)))
"""


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, failures: dict[str, int], status: int):
        """`failures`: how many of the requests for a path with this in it fail first; "" is any other path."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failures, self.status = failures, status
        self.seen: Counter[str] = Counter()

    def is_spoiled(self, request: str) -> bool:
        self.seen[request] += 1
        key = next((key for key in self.failures if key and key in request), "")
        return self.seen[request] <= self.failures.get(key, 0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if self.server.is_spoiled(f"{self.command} {path}"):
            self._send(self.server.status, b"", {"Retry-After": "0"})
        elif path.endswith((f"/tree/{COMMIT}", f"/tree/{COMMIT}/data")):
            listed = [self._entry(name) for name in FILES]
            self._send(200, json.dumps(listed if path.endswith(COMMIT) else []).encode())
        elif path.startswith("/api/datasets/one/tiny") and "/tree/" not in path:
            about = {"id": "one/tiny", "sha": COMMIT, "private": False, "gated": False, "tags": []}
            self._send(200, json.dumps({**about, "siblings": [{"rfilename": name} for name in FILES]}).encode())
        elif "/resolve/" in path and name in FILES:
            start, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            whole, first = FILES[name], int(start)
            part = whole[first : int(last or len(whole)) + 1]
            about = {"ETag": f'"{name}"', "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(whole)}"}
            self._send(206, part, about)
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815 (http.server's name)

    def _entry(self, name: str) -> dict[str, object]:
        oid = hashlib.sha1(FILES[name]).hexdigest()
        return {"type": "file", "oid": oid, "size": len(FILES[name]), "path": name}

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    with Hub(*request.param) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def read(hub: Hub, home: Path, **environment: str) -> str:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    there = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), **environment}
    result = subprocess.run([sys.executable, "-c", READ], env=there, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "hub", [({"": 1, "part-1": 20}, 503), ({"": 2, "part-0": 13}, 429), ({"": 1}, 408)], indirect=True
)
def test_every_record_comes_from_a_hub_that_is_busy_at_every_step(hub: Hub, tmp_path: Path) -> None:
    assert read(hub, tmp_path) == "True"
    assert any(count > 1 for request, count in hub.seen.items() if "/resolve/" not in request)


@pytest.mark.slow
@pytest.mark.parametrize("hub", [({"part-1": 10**6}, 503)], indirect=True)
def test_a_hub_that_stays_busy_ends_in_a_sentence(hub: Hub, tmp_path: Path) -> None:
    said = read(hub, tmp_path, GRANARY_PATIENCE_S="5")
    assert said.startswith(
        "corpus.path: the dataset one/tiny cannot be read: HTTP 503 (Service Unavailable); tried again"
    )
    assert "; it gave 300 records. Try the same command again later" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hub", "expected"),
    [
        (
            ({"": 10**6}, 401),
            "HTTP 401 (Unauthorized): the server wants to know who asks; give credentials",
        ),
        (
            ({"": 10**6}, 404),
            "HTTP 404 (Not Found): there is nothing of this name; mend it",
        ),
        (({"": 10**6}, 403), "HTTP 403 (Forbidden): who asks may not read it, or a signed URL has run out"),
        (({"part-1": 10**6}, 410), "HTTP 410 (Gone): it was there and has been removed; give another place"),
    ],
    indirect=["hub"],
)
def test_what_a_hub_refuses(hub: Hub, tmp_path: Path, expected: str) -> None:
    said = read(hub, tmp_path, GRANARY_PATIENCE_S="5")
    assert said.startswith(f"corpus.path: the dataset one/tiny cannot be read: {expected}"), said
    assert "records" in said


@pytest.mark.slow
@pytest.mark.parametrize("hub", [({"": 10**6}, 503)], indirect=True)
def test_a_hub_that_never_opens_ends_in_a_sentence(hub: Hub, tmp_path: Path) -> None:
    said = read(hub, tmp_path, GRANARY_PATIENCE_S="5")
    assert "the dataset one/tiny cannot be read: HTTP 503 (Service Unavailable)" in said
    assert "it gave 0 records" in said
