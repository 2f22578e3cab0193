"""Places of a corpus that cannot be read, and never will be: one sentence that says what happened, and what to do."""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from lab import Lab
from web import Spoil, Web

from pipeline.corpus.formats.named import NamedDataset
from pipeline.corpus.formats.open import open_corpus
from pipeline.corpus.formats.records import Columns
from pipeline.corpus.sources import retry as patience
from pipeline.corpus.sources.files import find_files
from pipeline.corpus.sources.retry import Unread
from pipeline.errors import InputError

LINES = "".join(json.dumps({"text": f"field {n}"}) + "\n" for n in range(400)).encode()
ANY = [".jsonl"]
SAID = {
    400: "HTTP 400 (Bad Request): the server does not understand this URL",
    401: "HTTP 401 (Unauthorized): the server wants to know who asks; give credentials in the environment",
    403: "HTTP 403 (Forbidden): who asks may not read it, or a signed URL has run out",
    410: "HTTP 410 (Gone): it was there and has been removed; give another place",
    451: "HTTP 451 (Unavailable For Legal Reasons): the server may not give it",
    418: "HTTP 418 (I'm a Teapot): the server refuses; open the URL in a browser to see why",
}
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgTGemyzTBcLS7MupO
IIuihQtCobrOtuvHMFL4owgabBOhRANCAARTIZuw2Z1FxR7qF6Ie4BX7YDy9Je3G
Nk1NAJmYNEIwOsvejOTJjC/9AMkXulapNE0v8WunKxYggkwUjC9OUkG7
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBpTCCAUqgAwIBAgIUWrJK5D6LXYUdwcT4NkSFriNF0VgwCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOc29tZXdoZXJlLmVsc2UwIBcNMjYxMjAxMDMxODE3WhgPMjEy
NjExMDcwMzE4MTdaMBkxFzAVBgNVBAMMDnNvbWV3aGVyZS5lbHNlMFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAEUyGbsNmdRcUe6heiHuAV+2A8vSXtxjZNTQCZmDRC
MDrL3ozkyYwv/QDJF7pWqTRNL/FrpysWIIJMFIwvTlJBu6NuMGwwHQYDVR0OBBYE
FLF4PQNch4JuDKODPMxhocp42ibeMB8GA1UdIwQYMBaAFLF4PQNch4JuDKODPMxh
ocp42ibeMA8GA1UdEwEB/wQFMAMBAf8wGQYDVR0RBBIwEIIOc29tZXdoZXJlLmVs
c2UwCgYIKoZIzj0EAwIDSQAwRgIhAML1nRBKi8N6Y913jxUE4L0uWDn5zx+tahgc
sKsJx8/GAiEAzKFtUvsV19zBvyI2UMhnpYhn8Vyx01RVuggc9pWkwlQ=
-----END CERTIFICATE-----
"""
"""A key and its certificate, of no one and for another host."""


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.01)


def check_sentence(said: str) -> None:
    assert "\n" not in said
    for inside in ("message=''", "Error(", "ClientResponse", "Traceback"):
        assert inside not in said


def read_all(url: str) -> None:
    corpus = open_corpus(url, Columns("text", "text", ()))
    for piece in corpus.pieces():
        for _ in corpus.chunks(piece):
            pass


@pytest.mark.parametrize("status", SAID)
@pytest.mark.parametrize("place", ["c.jsonl", "data/", "data/*.jsonl"])
def test_what_a_status_means(web: Web, status: int, place: str) -> None:
    """Of a file, of a folder's listing, and of the files that a listing has."""
    web.files |= {"c.jsonl": LINES, "data/": b"", "data/a.jsonl": LINES}
    web.down = Spoil(status=status)
    with pytest.raises(InputError) as refused:
        find_files(f"{web.url}/{place}", ANY)
    check_sentence(str(refused.value))
    assert f"corpus.path: {web.url}/{place} cannot be read: {SAID[status]}" in str(refused.value)


@pytest.mark.parametrize("status", SAID)
def test_what_a_status_means_in_the_middle_of_a_file(web: Web, status: int) -> None:
    web.files["c.jsonl"] = LINES
    (file,) = find_files(f"{web.url}/c.jsonl", ANY)
    web.down = Spoil(status=status)
    with pytest.raises(Unread) as refused, file.open() as handle:
        handle.read()
    check_sentence(str(refused.value))
    assert f"c.jsonl cannot be read: {SAID[status]}" in str(refused.value)


@pytest.mark.parametrize("to", ["/c.jsonl", "/d.jsonl", "{url}/c.jsonl"])
def test_redirects_without_end(web: Web, to: str) -> None:
    web.files |= {"c.jsonl": LINES, "d.jsonl": LINES}
    web.down = Spoil(status=302, headers={"Location": to.format(url=web.url)})
    with pytest.raises(InputError) as refused:
        find_files(f"{web.url}/c.jsonl", ANY)
    check_sentence(str(refused.value))
    assert "c.jsonl cannot be read: the server redirects without an end; open the URL in a browser, and give" in str(
        refused.value
    )


def test_redirects_without_end_in_the_middle_of_a_file(web: Web) -> None:
    web.files["c.jsonl"] = LINES
    (file,) = find_files(f"{web.url}/c.jsonl", ANY)
    web.down = Spoil(status=307, headers={"Location": "/c.jsonl"})
    with pytest.raises(Unread, match="the server redirects without an end"), file.open() as handle:
        handle.read()


@contextmanager
def serving(certificate: Path | None) -> Iterator[str]:
    """The host and port of a server with TLS, or without."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 (http.server's name)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that goes away in the handshake is what is tested."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("has_tls", "expected"),
    [
        (True, "the server's certificate is not trusted (self-signed certificate); mend the host's name, or name the"),
        (False, "the server does not speak TLS there; write http:// if that is meant, or mend the port"),
    ],
)
def test_no_secure_connection(tmp_path: Path, has_tls: bool, expected: str) -> None:
    (tmp_path / "both.pem").write_text(CERTIFICATE)
    with serving(tmp_path / "both.pem" if has_tls else None) as host, pytest.raises(InputError) as refused:
        find_files(f"https://{host}/c.jsonl", ANY)
    check_sentence(str(refused.value))
    assert f"https://{host}/c.jsonl cannot be read: {expected}" in str(refused.value)


# ---- datasets by name


def named(web: Web, folder: Path) -> NamedDataset:
    """A dataset whose file is at the server."""
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {web.url}/a.jsonl\n---\n")
    return NamedDataset(str(folder), None, "train", Columns("text", "text", ()))


DOWN = [
    *((Spoil(status=status), SAID[status]) for status in (401, 403, 410, 451)),
    (Spoil(status=302, headers={"Location": "/a.jsonl"}), "the server redirects without an end; open the URL"),
]


@pytest.mark.parametrize(("down", "expected"), DOWN, ids=[down.status for down, _ in DOWN])
@pytest.mark.parametrize("is_opened", [False, True])
def test_what_a_server_says_of_a_dataset(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, down: Spoil, expected: str, is_opened: bool
) -> None:
    web.files["a.jsonl"] = LINES
    opened = NamedDataset._open

    def then_down(self: NamedDataset) -> object:
        found = opened(self) if is_opened else None
        web.down = down
        return found or opened(self)

    monkeypatch.setattr(NamedDataset, "_open", then_down)
    with pytest.raises(Unread) as refused:
        list(named(web, tmp_path).chunks())
    check_sentence(str(refused.value))
    assert f"the dataset {tmp_path} cannot be read: {expected}" in str(refused.value)
    assert str(refused.value).endswith("; it gave 0 records")


def test_a_server_that_is_busy_as_a_dataset_is_opened(web: Web, tmp_path: Path) -> None:
    """`datasets` takes that for a file that is not there."""
    web.files["a.jsonl"] = LINES
    dataset = named(web, tmp_path)
    web.down = Spoil(status=503)
    waited = iter(range(3))

    def then_up(seconds: float) -> None:
        if next(waited, None) is None:
            web.down = None

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patience.time, "sleep", then_up)
        assert sum(len(chunk.contents) for chunk in dataset.chunks()) == 400


def test_a_dataset_that_is_not_there_offline(lab: Lab, no_ray: None) -> None:
    given = {"corpus.path": "no/such", "corpus.format": "datasets", "corpus.rows": 10, "corpus.labels": []}
    err = lab.refused("plan", lab.spec(given))
    assert (
        "corpus.path: the dataset no/such cannot be read: HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set, so that" in err
    )
