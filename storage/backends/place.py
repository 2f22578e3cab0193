"""Places: names below a root, on whatever holds the bytes.

A `Place` is a key and the backend it is on; `open_place` finds the backend that a path or URL names. What a backend
promises is in `storage.backends.backend`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from storage.backends.backend import Backend, Buffer
from storage.backends.retry import Waiting
from storage.errors import StorageError

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")


@dataclass(frozen=True)
class Place:
    """A name below a backend's root; joined with `/` as paths are."""

    backend: Backend
    key: str = ""

    def __truediv__(self, name: str) -> "Place":
        return Place(self.backend, f"{self.key}/{name}" if self.key else name)

    def joinpath(self, *names: str) -> "Place":
        return Place(self.backend, "/".join([self.key, *names]) if self.key else "/".join(names))

    @property
    def name(self) -> str:
        return str(self).rstrip("/").rpartition("/")[2]

    def below(self, root: "Place") -> str:
        """The name as seen from a place above it."""
        return self.key[len(root.key) :].lstrip("/")

    @property
    def path(self) -> Path:
        """The path of a local place."""
        assert self.backend.is_local, self
        return Path(str(self))

    def __str__(self) -> str:
        return f"{self.backend.url.rstrip('/')}/{self.key}" if self.key else self.backend.url

    def read(self) -> bytes:
        return self.backend.read(self.key)

    def open(self) -> BinaryIO:
        return self.backend.open(self.key)

    def write(self, *buffers: Buffer) -> None:
        """Write the buffers one after the other, replacing what was there, durably."""
        self.backend.publish([self.backend.stage(self.key, buffers)])

    def create(self, content: bytes) -> bool:
        return self.backend.create(self.key, content)

    def exists(self) -> bool:
        return self.backend.exists(self.key)

    def names(self) -> list[str]:
        return self.backend.names(self.key)

    def remove(self) -> None:
        self.backend.remove(self.key)


def check_url(url: str) -> None:
    """Raise StorageError for a URL that carries credentials or options, which would end up in logs and records."""
    if "://" not in url:
        return
    parts = urlsplit(url)
    is_container = parts.scheme in ("abfs", "abfss") and parts.password is None  # abfss://container@account/...
    named = "@" in parts.netloc and not is_container
    cut_key = ":" in parts.netloc and "@" in parts.path  # a secret key may hold slashes
    options = "=" in parts.query or parts.fragment  # a ? alone is a pattern's
    if named or cut_key or options:
        raise StorageError(
            f"the URL {parts.scheme}://... carries credentials or options: give them in the environment "
            "(AWS_ACCESS_KEY_ID, ...), where they reach no spec, log or store"
        )


def home_expanded(path: str | Path) -> Path:
    """Replace a leading `~` by the user's folder. Raises StorageError for a user that this machine does not know."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # pathlib's word for it
        user = Path(path).parts[0]
        raise StorageError(f"no folder of a user {user} on this machine: {path}") from None


def open_place(url: str | Path | Place, *, waiting: Waiting | None = None) -> Place:
    """The place a path or URL names. Nothing is read. Raises StorageError for a URL that cannot be used.

    `waiting` is told of pauses instead of stderr, and makes the place patient from its first request (see
    `storage.backends.retry`): for processes that are started for a store which was found in order.
    """
    if isinstance(url, Place):
        return url
    text = str(url)
    parts = urlsplit(text)
    if len(parts.scheme) <= 1 or parts.scheme == "file":
        from storage.backends.local import LocalFiles

        path = Path(parts.path) if parts.scheme == "file" else Path(text)
        return Place(LocalFiles(home_expanded(path).absolute()))
    check_url(text)
    if parts.scheme in OBJECT_STORES:
        from storage.backends.objects import ObjectStore

        return Place(ObjectStore.at(text, waiting))
    from storage.backends.fsspec_files import FsspecFiles

    return Place(FsspecFiles.at(text, waiting))
