"""A server that answers as the Hugging Face hub does for downloads of files: repositories, branches and commits."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class HubServer:
    """Repositories as they are served. `requests` are the paths that were asked for."""

    url: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """(repository, commit) -> file name -> content."""
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, repository: str, folder: Path, ref: str = "main") -> str:
        """Add a commit with the files of a folder, and let `ref` be that commit. Return it."""
        commit = hashlib.sha1(f"{repository} {len(self.files)}".encode()).hexdigest()
        self.files[repository, commit] = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.refs[repository, ref] = commit
        return commit

    def find(self, repository: str, revision: str) -> str | None:
        """The commit of a branch or a commit; None if there is none."""
        commit = self.refs.get((repository, revision), revision)
        return commit if (repository, commit) in self.files else None


@contextmanager
def serving() -> Iterator[HubServer]:
    """Serve within the block."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(path)
            parts = path.split("/")
            if path.startswith("api/models/"):
                self._api("/".join(parts[2:4]), parts[4:], with_body)
                return
            repository, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            commit = hub.find(repository, revision)
            content = hub.files[repository, commit].get(name) if commit is not None else None
            if commit is None or content is None:
                missing = "RevisionNotFound" if commit is None else "EntryNotFound"
                self._send(404, b"", with_body, {"X-Error-Code": missing}, commit)
            else:
                self._send(200, content, with_body, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, commit)

        def _api(self, repository: str, rest: list[str], with_body: bool) -> None:
            commit = hub.find(repository, rest[1] if len(rest) > 1 else "main")
            if commit is None:
                self._send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"}, None)
                return
            names = hub.files[repository, commit]
            if len(rest) > 2:  # the tree of a folder inside, of which there are none
                self._send(404, b"{}", with_body, {"X-Error-Code": "EntryNotFound"}, commit)
                return
            if rest[:1] == ["tree"]:
                entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in names.items()]
                self._send(200, json.dumps(entries).encode(), with_body, {}, commit)
                return
            about = {"id": repository, "sha": commit, "tags": [], "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(about).encode(), with_body, {}, commit)

        def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str], commit: str | None) -> None:
            self.send_response(status)
            commits = {} if commit is None else {"X-Repo-Commit": commit}
            for name, value in {**headers, **commits, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
