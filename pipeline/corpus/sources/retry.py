"""Waiting for a server that a corpus is read from: one that is busy (408, 429, 5xx), or that breaks off connections.

The libraries that read (fsspec's file systems, `datasets`, `huggingface_hub`) raise errors of their own kinds, often
one within another. `failure_of` tells from such a chain whether it may pass. `Patience` waits with growing pauses, or
as long as the server asks for, and ends in one `Unread` when nothing has come for `PATIENCE_S`. It waits anew
after each progress: a corpus of days may be interrupted any number of times.

A server that cannot be reached and never was is more likely a mistake in the URL: that ends after `FIRST_PATIENCE_S`.
"""

import errno
import os
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from pipeline.corpus.sources.refusals import lasting_tls, redirects_without_end, refusal_of
from pipeline.errors import InputError
from pipeline.saying import Say, announce

PATIENCE_S = 600.0
"""Longer than a restart or a rate limit of the hub's (5 minutes). GRANARY_PATIENCE_S in the environment changes it, as
it does for stores."""
FIRST_PATIENCE_S = 6.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
MOST_WORDS = 200
"""Characters of another library's message: some list all they know."""
SAID_AFTER_S = 5.0
"""A shorter wait is not told."""

PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
PASSING_FROM, NOT_IMPLEMENTED = 506, (510, 511)
"""Statuses from here on are those of proxies and content networks (520, 522, 529 ...), but for these."""
PASSING_ERRNO = {
    *(errno.EBUSY, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.EPIPE, getattr(errno, "EREMOTEIO", errno.EIO)),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH),
}
"""EBUSY, EIO and EREMOTEIO are s3fs's words for a 5xx."""
PASSING_CLASSES = {
    *("ConnectionError", "TimeoutError", "HTTPException"),  # Python's; also those of requests and botocore
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp's
    *("TransportError", "Timeout", "ChunkedEncodingError", "ProtocolError"),  # httpx's, requests', urllib3's
    *("HTTPClientError", "ResponseStreamingError", "ResponseParserError", "IncompleteReadError"),  # botocore's
    "gaierror",
}
OFFLINE = "OfflineModeIsEnabled"
"""`datasets` raises an error of another kind in its place, of which only the words tell."""
LASTING_CLASSES = {
    *(OFFLINE, "SSLCertVerificationError", "ClientSSLError"),
    *("UnsupportedProtocol", "LocalProtocolError", "InvalidURL", "ProxyError"),
    "FileExpired",  # s3fs: the object is another now; its errno is EBUSY
}
"""Subclasses of those that do not pass."""


class Unread(InputError):
    """A place that could not be read, or not to its end."""


@dataclass(frozen=True)
class Failure:
    """Why a read failed that may be tried again."""

    sentence: str
    answered: bool
    """True if the server was there and said something."""
    retry_after_s: float | None = None
    """The pause that it asked for."""


def failure_of(error: BaseException) -> Failure | None:
    """What failed, if it may pass: told by the outermost HTTP status of a chain of errors, else by their kinds."""
    chain = list(chain_of(error))
    if any(_names(each) & LASTING_CLASSES or OFFLINE in str(each) for each in chain) or lasting_tls(chain):
        return None
    for each in chain:
        status = status_of(each)
        if status is not None:
            if not _passes(status):
                return None
            return Failure(f"HTTP {status}{_phrase(status)}", True, _retry_after(each))
    for each in chain:
        if _names(each) & PASSING_CLASSES or (isinstance(each, OSError) and each.errno in PASSING_ERRNO):
            return Failure(words_of(each), False)
    return None


def patience_s() -> float:
    return float(os.environ.get("GRANARY_PATIENCE_S", PATIENCE_S))


class Patience:
    """How long one reader waits for one place. Not for several threads."""

    def __init__(self, what: str, say: Say = announce):
        """`what`: the place, as sentences name it. `say`: told when a wait is long, and when it is over."""
        self.what, self._say = what, say
        self._has_worked = False
        self._waited: float | None = None
        self._resumed = 0.0
        self._pause = FIRST_PAUSE_S
        self._is_said = False

    def progressed(self) -> None:
        """Something came: what was waited before does not count any longer."""
        self._has_worked = True
        if self._waited is not None:
            self._waited, self._pause = None, FIRST_PAUSE_S
            if self._is_said:
                self._is_said = False
                self._say(f"going on: {self.what} answers again")

    def waits_for(self, error: BaseException, so_far: str = "") -> bool:
        """Pause, and return True: try again; False at once if `error` does not pass. Raises Unread when patience is
        over. `so_far`: how much has come, as 'it gave 3 records'."""
        failure = failure_of(error)
        if failure is None:
            return False
        if self._waited is None:
            self._waited = 0.0
        else:  # a try that lasted long was reading again what had come before, which says nothing against the server
            self._waited += min(time.monotonic() - self._resumed, LONGEST_PAUSE_S)
        waited = self._waited
        limit = patience_s()
        if not (self._has_worked or failure.answered):
            limit = min(limit, FIRST_PATIENCE_S)
        pause = self._pause * random.uniform(0.5, 1.0)
        if failure.retry_after_s is not None:
            pause = max(pause, failure.retry_after_s)
        if waited + pause > limit:
            raise Unread(self._ending(failure, waited, so_far)) from error
        if not self._is_said and waited + pause > SAID_AFTER_S:
            self._is_said = True
            self._say(f"waiting: {self.what}: {failure.sentence}{f'; {so_far}' if so_far else ''}")
        time.sleep(pause)
        self._waited, self._resumed = waited + pause, time.monotonic()
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        return True

    def _ending(self, failure: Failure, waited: float, so_far: str) -> str:
        asked = failure.retry_after_s
        wish = (
            f", and asks for a pause of {asked:,.0f} s" if asked is not None and asked > patience_s() - waited else ""
        )
        came = f"; {so_far}" if so_far else ""
        return (
            f"corpus.path: {self.what} cannot be read: {failure.sentence}{wish}; tried again for {waited:.0f} s{came}. "
            "Try the same command again later (GRANARY_PATIENCE_S: the seconds to wait)"
        )


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from, the outermost first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, requests, httpx, botocore, urllib or gcsfs; None without one."""
    if "HttpProcessingError" in _names(error):  # aiohttp's parser: an answer cut off has a code of 400 of its own
        return None
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _as_status(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    found = _as_status(getattr(response, "status_code", None))
    for name in ("status_code", "status", "code"):
        if found is None and (given := getattr(error, name, None)) is not None:
            found = _as_status(given)
            if name == "status":  # aiohttp warns who asks for a code where there is a status, be it 0
                break
    return found


def _as_status(value: object) -> int | None:
    is_status = isinstance(value, int | str) and str(value).isdecimal() and 400 <= int(value) < 600
    return int(str(value)) if is_status else None


def _passes(status: int) -> bool:
    return status in PASSING_STATUS or (status >= PASSING_FROM and status not in NOT_IMPLEMENTED)


def _phrase(status: int) -> str:
    try:
        return f" ({HTTPStatus(status).phrase})"
    except ValueError:
        return ""


def _retry_after(error: BaseException) -> float | None:
    """The seconds in an answer's Retry-After, which may be a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None)
    if not isinstance(headers, Mapping):
        return None
    text = next((str(value).strip() for name, value in headers.items() if str(name).lower() == "retry-after"), "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # none, or a date without a zone
        return None


def why_unread(error: BaseException) -> str:
    """Why something could not be read where trying again does not help: a sentence of ours where the errors are those
    of a server, else the error's own words."""
    chain = list(chain_of(error))
    status = next((found for each in chain if (found := status_of(each)) is not None), None)
    own = (str(error).strip().splitlines() or [type(error).__name__])[0]
    refusal = refusal_of(chain, status)
    if refusal is None:
        return own
    is_of_store = any(isinstance(getattr(each, "response", None), dict) for each in chain)  # botocore's says which key
    return f"{refusal} ({own})" if is_of_store else refusal


def is_answer(error: BaseException) -> bool:
    """Whether a server said why it does not give what it has: not that there is nothing, nor nothing at all."""
    chain = list(chain_of(error))
    status = next((found for each in chain if (found := status_of(each)) is not None), None)
    return redirects_without_end(chain) or status not in (None, 404)


def words_of(error: BaseException) -> str:
    """An error in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    text = f"{text[:MOST_WORDS]} ..." if len(text) > MOST_WORDS else text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
