"""What is waited for when a corpus is read from elsewhere, how long, and what is said of it."""

import errno
import http.client
import socket
import urllib.error
from dataclasses import dataclass, field
from email.message import Message
from email.utils import formatdate
from types import SimpleNamespace

import pytest

from pipeline.corpus.sources import retry as patience
from pipeline.corpus.sources.retry import Patience, Unread, failure_of


@dataclass
class Clock:
    """Time that goes on only while something sleeps."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    monkeypatch.delenv("GRANARY_PATIENCE_S", raising=False)
    return clock


def answer(status: int, **headers: str) -> Exception:
    """An error as httpx and requests raise it."""
    error = RuntimeError(f"HTTP error {status} at a URL")
    error.response = SimpleNamespace(status_code=status, headers=headers)  # type: ignore[attr-defined]
    return error


def ending(waiting: Patience, error: Exception, so_far: str = "") -> str:
    """What is said when waiting for an error that stays ends."""
    try:
        while waiting.waits_for(error, so_far):
            pass
    except Unread as end:
        return str(end)
    raise AssertionError("it does not pass")


def within(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


def boto(code: str, status: int) -> Exception:
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    "error",
    [
        *(answer(status) for status in (408, 425, 429, 500, 502, 503, 504, 520, 522, 529)),
        within(FileNotFoundError("http://h/x"), answer(503)),  # fsspec's word for it
        urllib.error.HTTPError("http://h/x", 503, "busy", Message(), None),
        boto("SlowDown", 503),
        OSError(errno.EBUSY, "Reduce your request rate"),  # s3fs's
        ConnectionResetError(errno.ECONNRESET, "reset"),
        within(ValueError("broken"), ConnectionResetError("reset")),
        http.client.IncompleteRead(b""),
        TimeoutError(),
        socket.gaierror(-3, "Temporary failure in name resolution"),
    ],
    ids=repr,
)
def test_what_may_pass_is_told_from_any_library_s_error(error: Exception) -> None:
    assert failure_of(error) is not None


def of_aiohttp() -> list[Exception]:
    import aiohttp

    cut = aiohttp.http_exceptions.ContentLengthError("received 1 of 2 bytes")
    return [
        within(aiohttp.ClientPayloadError("cut"), cut),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut"),
        aiohttp.ServerTimeoutError(),
    ]


def of_the_hub() -> list[Exception]:
    from huggingface_hub.utils import httpx

    return [httpx.ReadError("reset"), httpx.RemoteProtocolError("peer closed"), httpx.ConnectTimeout("late")]


def of_botocore() -> list[Exception]:
    from botocore.exceptions import EndpointConnectionError, ReadTimeoutError, ResponseStreamingError

    return [
        EndpointConnectionError(endpoint_url="http://h"),
        ReadTimeoutError(endpoint_url="http://h"),
        ResponseStreamingError(error="cut"),
    ]


@pytest.mark.parametrize("make", [of_aiohttp, of_the_hub, of_botocore])
def test_connections_that_break_off_may_pass(make) -> None:  # type: ignore[no-untyped-def]
    for error in make():
        assert failure_of(error) is not None, repr(error)


def lasting() -> list[Exception]:
    import ssl

    from huggingface_hub.errors import OfflineModeIsEnabled

    return [
        *(answer(status) for status in (400, 401, 403, 404, 410, 416, 501, 505)),
        within(FileNotFoundError("http://h/x"), answer(404)),
        boto("AccessDenied", 403),
        within(ConnectionError("couldn't reach the hub"), OfflineModeIsEnabled("offline")),
        ConnectionError("Couldn't reach 'no/such' on the Hub (OfflineModeIsEnabled)"),
        within(ConnectionError("no secure connection"), ssl.SSLCertVerificationError("self-signed")),
        FileNotFoundError("x"),
        PermissionError(errno.EACCES, "no"),
        ValueError("not JSON"),
        KeyError("text"),
    ]


@pytest.mark.parametrize("number", range(17))
def test_what_lasts_is_not_waited_for(number: int, clock: Clock) -> None:
    error = lasting()[number]
    assert failure_of(error) is None, repr(error)
    assert not Patience("a place").waits_for(error)
    assert clock.slept == []


def test_the_status_that_came_last_decides() -> None:
    """A file that is not there (404), then, in handling that, a server that is busy."""
    assert failure_of(within(answer(503), answer(404))) is not None
    assert failure_of(within(answer(404), answer(503))) is None


def test_pauses_grow_and_end_in_one_sentence(clock: Clock) -> None:
    said: list[str] = []
    waiting = Patience("the dataset x", said.append)
    waiting.progressed()
    message = ending(waiting, answer(503), "it gave 12 records")
    assert sum(clock.slept) <= patience.PATIENCE_S
    assert sum(clock.slept) > patience.PATIENCE_S - 2 * patience.LONGEST_PAUSE_S
    assert 0.25 <= clock.slept[0] <= 0.5
    assert max(clock.slept) <= patience.LONGEST_PAUSE_S
    assert clock.slept[-1] > 20 * clock.slept[0]
    assert "the dataset x cannot be read: HTTP 503 (Service Unavailable); tried again for" in message
    assert "it gave 12 records" in message
    assert said == ["waiting: the dataset x: HTTP 503 (Service Unavailable); it gave 12 records"]


def test_progress_begins_the_waiting_anew(clock: Clock) -> None:
    said: list[str] = []
    waiting = Patience("x", said.append)
    for _ in range(100):
        for _ in range(8):
            assert waiting.waits_for(answer(503))
        waiting.progressed()
    assert sum(clock.slept) > 3 * patience.PATIENCE_S
    assert said == ["waiting: x: HTTP 503 (Service Unavailable)", "going on: x answers again", *said[2:]]
    assert len(said) == 200


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), (formatdate(0, usegmt=True), 0), ("soon", 0), ("", 0)])
def test_the_pause_that_a_server_asks_for_is_kept(clock: Clock, header: str, seconds: float) -> None:
    assert Patience("x", lambda text: None).waits_for(answer(429, **{"Retry-After": header}))
    assert seconds <= clock.slept[0] <= max(seconds, patience.FIRST_PAUSE_S)


def test_a_date_of_the_future_is_a_pause_too(clock: Clock) -> None:
    import time

    at = formatdate(time.time() + 90, usegmt=True)
    assert Patience("x", lambda text: None).waits_for(answer(503, **{"retry-after": at}))
    assert 80 < clock.slept[0] <= 90


def test_a_pause_longer_than_patience_ends_at_once(clock: Clock) -> None:
    with pytest.raises(Unread, match=r"HTTP 429 \(Too Many Requests\), and asks for a pause of 3,600 s"):
        Patience("x").waits_for(answer(429, **{"Retry-After": "3600"}))
    assert clock.slept == []


def test_a_place_that_never_answered_is_given_up_soon(clock: Clock) -> None:
    waiting = Patience("x", lambda text: None)
    assert "ConnectionRefusedError" in ending(waiting, ConnectionRefusedError(errno.ECONNREFUSED, "refused"))
    assert sum(clock.slept) <= patience.FIRST_PATIENCE_S


def test_the_environment_says_how_long(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANARY_PATIENCE_S", "3")
    waiting = Patience("x", lambda text: None)
    ending(waiting, answer(503))
    assert sum(clock.slept) <= 3
