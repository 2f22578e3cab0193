"""A real S3 server process for tests, and a proxy in front of it that spoils requests; a plugin of tests/conftest.py.

The server (ministack) keeps everything in its own memory, so it is as empty as new for each run of the tests. The
addresses and keys are in the environment while a test uses a bucket, and nowhere else.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

KEY_ID, SECRET = "granary-key", "s3cr3t-that-must-not-be-seen-anywhere"
PROXY = Path(__file__).with_name("faults") / "proxy.py"
START_S = 30
_NUMBERS = count()


@dataclass(frozen=True)
class S3Server:
    """A server, or a proxy in front of one, at http://127.0.0.1:`port`."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, **more: str) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            **more,
        }

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        credential = f"{KEY_ID}/20260101/us-east-1/s3/aws4_request"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=0"}
        request = urllib.request.Request(self.url + path, data=body or None, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            return bytes(answer.read())

    def make_bucket(self, name: str | None = None) -> str:
        """Make a bucket that nobody had before and return its URL."""
        name = name or f"bucket-{os.getpid()}-{next(_NUMBERS)}"
        self.request("PUT", f"/{name}")
        return f"s3://{name}"


@dataclass(frozen=True)
class FaultyS3(S3Server):
    """The proxy: a server that spoils requests."""

    def rules(self, **rules: Any) -> None:
        """Change what is spoiled: rate, kinds, seed, stall_s, expired."""
        self.request("POST", "/-/rules", json.dumps(rules).encode())

    def counts(self) -> dict[str, int]:
        """The number of requests by what was done with them; "forwarded" are those that were left alone."""
        counts: dict[str, int] = json.loads(self.request("GET", "/-/counts"))
        return counts


def _end_with_parent() -> None:
    """Called in a new process, for when the tests are killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """A server for as long as the block lasts; its files are in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = S3Server(probe.getsockname()[1])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        "GATEWAY_PORT": str(server.port),
        "BIND_HOST": "127.0.0.1",
        "SERVICES": "s3",
        "LOG_LEVEL": "ERROR",
        "TMPDIR": str(folder),
        "S3_DATA_DIR": str(folder / "data"),
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ministack"], env=environment, stdout=log, stderr=log, preexec_fn=_end_with_parent
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                server.request("GET", "/_ministack/health")
                break
            except (urllib.error.URLError, ConnectionError):
                words = (folder / "server.log").read_text()
                assert process.poll() is None, words
                assert time.monotonic() < deadline, words
                time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


@contextmanager
def running_proxy(server: S3Server, *options: str | float) -> Iterator[FaultyS3]:
    """A proxy in front of a server; options as tests/faults/proxy.py takes them."""
    command = [sys.executable, str(PROXY), "--upstream", server.url, *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_end_with_parent)
    assert process.stdout is not None
    try:
        yield FaultyS3(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its address and keys in the environment."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return s3_server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The URL of an empty bucket."""
    return s3.make_bucket()


@pytest.fixture
def faulty_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FaultyS3]]:
    """`faulty_s3(rate=0.2, seed=1)` puts a proxy before the server, and its address into the environment."""
    with ExitStack() as stack:

        def start(**rules: Any) -> FaultyS3:
            proxy = stack.enter_context(running_proxy(s3))
            proxy.rules(**rules)
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            return proxy

        yield start
