"""Object stores through obstore: s3, gs and az.

A PUT is atomic and durable, so staging is the whole of writing. Objects of some size go up in parts. obstore itself
repeats what fails for moments (5xx, resets, silence), part by part; longer failures are waited for in
`retry`. Credentials, endpoint and region come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on, or
what the machine's role gives) and are looked up again after each refusal.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, BinaryIO, TypeVar

import obstore
import obstore.exceptions as failures
from obstore.store import from_url

from storage.backends.backend import PROBE, Buffer, scatter
from storage.backends.credentials import shared_file_credentials
from storage.backends.range_reader import open_ranges
from storage.backends.retry import Denied, Passing, Patience, Verb, Waiting
from storage.errors import StorageError, Unreachable

T = TypeVar("T")

PART_BYTES = 8 * 2**20
"""Parts of a large object, and the size from which it goes up in parts: S3 takes 10,000 parts of at least 5 MiB, and a
part is what is sent again when a request fails."""
PARTS_AT_ONCE = 8
NAMES_AT_ONCE = 1000
"""Names in one answer to a listing: what S3 gives at most."""
STALL_S = 30.0
"""Silence after which a request is given up and made again. GRANARY_STALL_S in the environment changes it."""
RETRIES, FIRST_RETRIES = 6, 1
"""Times obstore itself makes a request again, in pauses of 0.1 to 5 seconds; few while nothing has worked yet."""
LASTING = (failures.InvalidPathError, failures.NotSupportedError)
DENIALS = (failures.PermissionDeniedError, failures.UnauthenticatedError)
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestTimeTooSkewed")
"""Refusals of credentials that were good once."""


@dataclass(frozen=True)
class ObjectStore:
    """The backend of a bucket, or of a prefix in one."""

    url: str
    _patience: Patience = field(default_factory=Patience, compare=False, repr=False)
    _clients: dict[bool, Any] = field(default_factory=dict, compare=False, repr=False)
    """obstore's clients: for first contact, and for when the store has answered."""

    is_local = False
    threads = 16

    @classmethod
    def at(cls, url: str, waiting: Waiting | None = None) -> "ObjectStore":
        return cls(url.rstrip("/"), Patience(waiting))

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore.at, (self.url,)  # another process makes its own connections

    def read(self, key: str) -> bytes:
        return self._call(key, lambda store: bytes(obstore.get(store, key).bytes()))

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> int:
        wanted = sum(buffer.nbytes for buffer in buffers)

        def request(store: Any) -> int:
            try:
                answer = obstore.get(store, key, options={"range": (start, start + wanted)})
                body = memoryview(answer.bytes())
            except failures.GenericError as error:
                if _status(error) != "416":
                    raise
                return int(obstore.head(store, key)["size"])  # it ends before `start`
            scatter(body, buffers)
            size = int(answer.meta["size"])
            return size if body.nbytes == wanted else min(size, start + body.nbytes)

        return self._call(key, request)

    def open(self, key: str) -> BinaryIO:
        return open_ranges(self, key)

    def stage(self, key: str, buffers: Sequence[Buffer]) -> str:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        if sum(view.nbytes for view in views) <= PART_BYTES:
            whole = b"".join(views)
            self._call(key, lambda store: obstore.put(store, key, whole, use_multipart=False), "write")
        else:
            parts: dict[str, Any] = {"chunk_size": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
            self._call(key, lambda store: obstore.put(store, key, views, use_multipart=True, **parts), "write")
        return key

    def publish(self, staged: Sequence[str]) -> None:
        """Nothing is left to do: an object is whole and durable when its PUT has been answered."""

    def discard(self, staged: Sequence[str]) -> None:
        """Nothing to do: the next attempt writes the same objects, and without a commit nobody reads them."""

    def create(self, key: str, content: bytes) -> bool:
        def request(store: Any) -> bool:
            try:
                obstore.put(store, key, content, mode="create", use_multipart=False)
            except failures.AlreadyExistsError:
                # Perhaps by our own request, whose answer was lost on its way and which was made again below us.
                return bytes(obstore.get(store, key).bytes()) == content
            return True

        return self._call(key, request, "write")

    def exists(self, key: str) -> bool:
        def request(store: Any) -> None:
            try:
                obstore.head(store, key)
            except DENIALS:
                obstore.get(store, key)  # to be told why: the answer to HEAD has no words

        try:
            self._call(key, request)
        except FileNotFoundError:
            return False
        return True

    def names(self, key: str) -> list[str]:
        listed = self._call(key, lambda store: obstore.list_with_delimiter(store, key or None))
        paths = [*listed["common_prefixes"], *(entry["path"] for entry in listed["objects"])]
        return sorted(path.rpartition("/")[2] for path in paths)

    def walk(self, key: str) -> Iterator[str]:
        last: str | None = None

        def page(store: Any) -> Any:  # begun anew after the last name seen, so that a page may be asked for again
            return next(obstore.list(store, prefix=key or None, offset=last, chunk_size=NAMES_AT_ONCE), None)

        while found := self._call(key, page):
            yield from (entry["path"] for entry in found)
            last = found[-1]["path"]

    def remove(self, key: str) -> None:
        def request(store: Any) -> None:
            names = [entry["path"] for page in obstore.list(store, prefix=key or None) for entry in page]
            for name in [*names, *([key] if key else [])]:
                try:
                    obstore.delete(store, name)
                except FileNotFoundError as error:  # some servers say so
                    if _is_no_bucket(error):
                        raise

        self._call(key, request, "write")

    def check_writable(self) -> None:
        """Raise StorageError, within seconds, unless names can be listed, created, only once, and removed here."""
        self.names("")
        probe = f"{PROBE}{secrets.token_hex(8)}"
        made = [self.create(probe, content) for content in (b"first", b"second")]
        self.remove(probe)
        if made != [True, False]:
            raise StorageError(
                f"{self.url} cannot hold a store: its server replaces objects that were to be created only once (it "
                "does not know If-None-Match), so two workers could commit one unit; use another server or a newer one"
            )

    def _call(self, key: str, request: Callable[[Any], T], verb: Verb = "read") -> T:
        def attempt() -> T:
            try:
                return request(self._client())
            except FileNotFoundError as error:
                if _is_no_bucket(error):
                    raise Unreachable(f"{self.url} cannot be used: {_explain(error)}") from None
                if verb == "read":
                    raise
                raise Passing(
                    self._sentence(key, verb, error)
                ) from None  # an upload in parts that is gone: begin it again
            except failures.BaseError as error:
                if _is_no_bucket(error) or isinstance(error, LASTING):
                    raise Unreachable(f"{self.url} cannot be used: {_explain(error)}") from None
                if not _is_denial(error):
                    raise Passing(self._sentence(key, verb, error)) from None
                self._clients.clear()  # the next client reads the environment's credentials again
                expired = any(code in str(error) for code in EXPIRED)
                raise (Passing if expired else Denied)(self._sentence(key, verb, error)) from None

        return self._patience.call(attempt, verb)

    def _sentence(self, key: str, verb: Verb, error: BaseException) -> str:
        named = key and self._patience.has_worked and not key.startswith(PROBE)
        what = "read" if verb == "read" else "written"
        return f"{f'{self.url}/{key}' if named else self.url} cannot be {what}: {_explain(error)}"

    def _client(self) -> Any:
        has_worked = self._patience.has_worked
        client = self._clients.get(has_worked)
        if client is None:
            client = self._clients[has_worked] = _connect(self.url, patient=has_worked)
        return client


def _connect(url: str, *, patient: bool) -> Any:
    stall_s = float(os.environ.get("GRANARY_STALL_S", STALL_S))
    client = {
        "connect_timeout": timedelta(seconds=10 if patient else 3),
        "read_timeout": timedelta(seconds=stall_s if patient else min(stall_s, 3)),
        "timeout": timedelta(seconds=20 * stall_s),  # of a whole request: a slow line is no failure
        **_client_options(),
    }
    retry = {
        "max_retries": RETRIES if patient else FIRST_RETRIES,
        "retry_timeout": timedelta(seconds=15 + stall_s),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    options: dict[str, Any] = {"client_options": client, "retry_config": retry}
    if url.startswith("s3") and (credentials := shared_file_credentials()):
        options["credential_provider"] = credentials
    try:
        return from_url(url, **options)
    except (failures.BaseError, ValueError) as error:
        raise Unreachable(f"{url} cannot be used: {_explain(error)}") from None


def _client_options() -> dict[str, Any]:
    """The environment's options for connections, which obstore leaves out once it is given any."""
    options: dict[str, Any] = {}
    for name in ("allow_http", "allow_invalid_certificates"):
        if os.environ.get(f"AWS_{name.upper()}", "").lower() in ("1", "true", "yes"):
            options[name] = True
    for name in ("proxy_url", "proxy_excludes"):
        if value := os.environ.get(f"AWS_{name.upper()}"):
            options[name] = value
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint.startswith("http://"):
        options["allow_http"] = True  # who names such an endpoint wants it
    return options


def _status(error: BaseException) -> str:
    """The HTTP status in obstore's words for an error, which name the URL too."""
    found = re.search(r"status code: (\d{3})", str(error))
    return found[1] if found else ""


def _is_no_bucket(error: BaseException) -> bool:
    return "<Code>NoSuchBucket</Code>" in str(error)


def _is_denial(error: BaseException) -> bool:
    return isinstance(error, DENIALS) or _status(error) in ("400", "401", "403")


def _explain(error: BaseException) -> str:
    """What the server said, in a few words: obstore's messages go on with its own state for pages."""
    text = str(error)
    if _is_no_bucket(error):
        return "there is no such bucket; make it, or name another"
    code, message = re.search(r"<Code>(.*?)</Code>", text), re.search(r"<Message>(.*?)</Message>", text)
    if code:
        return f"{code[1]} ({message[1].rstrip('.')})" if message else code[1]
    if "169.254.169.254" in text or "InstanceMetadata" in text:
        return "there are no credentials in the environment (AWS_ACCESS_KEY_ID, ...), and this machine has no role"
    if _is_denial(error):
        return "the credentials of the environment are not accepted, or do not allow this"
    if status := re.search(r"status code: (\d+ [\w ]+)", text):
        return f"the server answers {status[1].strip()}"
    words = re.sub(r"https?://\S+", "...", text.splitlines()[0]).rpartition(" - ")[2]
    url = re.search(r"https?://([^/\s?]+)", text)
    at = f" at {url[1].rpartition('@')[2]}" if url else ""  # without a password that somebody put there
    return f"the server{at} does not answer ({words[:200].strip()})"
