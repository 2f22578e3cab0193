"""The contract of a backend: the few operations on whole names that a store needs, and what each promises.

Three keep it: `local` for local files, `objects` for object stores through obstore (s3, gs, az), and `fsspec_files` for
any other file system that fsspec knows.

They promise:

- what is read under a name is whole: a name appears only with all its bytes, which are durable then;
- of several callers that `create` one name, each with a content of its own, exactly one is told that it did, even if
  the answer to its request was lost (but see `storage.backends.fsspec_files`);
- a name that is not there is a FileNotFoundError; a backend that does not answer for long is a StorageError.
"""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

Buffer = Any  # bytes, or a C-contiguous array (anything with the buffer protocol)
Staged = Any  # what a backend remembers between `stage` and `publish`


class Backend(Protocol):
    """What holds the bytes. Keys are relative, with slashes; "" is the root. Safe to use from several threads."""

    @property
    def url(self) -> str:
        """The root, as a person writes it. Holds no credentials."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether names are files of this machine: then small files cost nothing and folders can be renamed."""
        ...

    @property
    def threads(self) -> int:
        """How many operations at once use it fully."""
        ...

    def read(self, key: str) -> bytes: ...

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers one after the other with the bytes from `start`; return the whole size of the name.

        What is beyond its end is left as it was: compare the size."""
        ...

    def open(self, key: str) -> BinaryIO:
        """Open for reading with seek, for Parquet."""
        ...

    def stage(self, key: str, buffers: Sequence[Buffer]) -> Staged:
        """Bring the bytes to the backend. They are sure to be durable and under their name after `publish`."""
        ...

    def publish(self, staged: Sequence[Staged]) -> None: ...

    def discard(self, staged: Sequence[Staged]) -> None:
        """Forget what was staged and will not be published."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Write the name only if it is not there. Return whether this call made it.

        An answer may be lost, so what is there is compared: content that is there already counts as made. Where it
        matters who won the content must be the caller's own and hold its writer id."""
        ...

    def check_writable(self) -> None:
        """Raise StorageError, within seconds, unless names can be created, only once, and removed here."""
        ...

    def exists(self, key: str) -> bool: ...

    def names(self, key: str) -> list[str]:
        """The names directly below, sorted; none if there are none."""
        ...

    def walk(self, key: str) -> Iterator[str]:
        """The keys of all that is below a name, at any depth, one after the other; their order is the backend's."""
        ...

    def remove(self, key: str) -> None:
        """Remove the name and everything below it, if it is there."""
        ...


PROBE = "granary-probe-"
"""`check_writable` creates and removes names that begin like this. One that is left belonged to a killed process, and
may be removed."""


def scatter(body: memoryview, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers one after the other with what a request brought; what it does not reach is left as it was."""
    at = 0
    for buffer in buffers:
        part = body[at : at + buffer.nbytes]
        buffer[: part.nbytes] = part
        at += buffer.nbytes
