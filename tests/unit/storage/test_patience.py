"""What is waited for, for how long, and who is told: a real server behind a proxy whose credentials expire."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from s3 import KEY_ID, SECRET, FaultyS3

from storage.backends import retry as patience
from storage.backends.place import Place, open_place
from storage.backends.retry import Denied, Outage, Passing, Patience
from storage.errors import Unreachable

OTHER_KEY = "renewed-key"


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANARY_PATIENCE_S", "20")
    monkeypatch.setattr(patience, "SAID_AFTER_S", 0.2)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.3)


@pytest.fixture
def expiring(bucket: str, faulty_s3: Callable[..., FaultyS3]) -> tuple[Place, FaultyS3]:
    """A place that has been used, and the server's rules."""
    proxy = faulty_s3()
    place = open_place(bucket)
    place.backend.check_writable()
    (place / "a").write(b"a")
    return place, proxy


def in_a_while(proxy: FaultyS3, do: Callable[[], object]) -> threading.Thread:
    """Do it a second after the server has next refused a request, however busy the machine is."""

    def refused() -> int:
        counts = proxy.counts()
        return sum(counts.values()) - counts.get("forwarded", 0)

    before = refused()

    def wait() -> None:
        deadline = time.monotonic() + 60
        while refused() == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(1)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_credentials_of_the_environment_that_are_renewed(
    expiring: tuple[Place, FaultyS3], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, proxy = expiring
    proxy.rules(expired=[KEY_ID])
    timer = in_a_while(proxy, lambda: monkeypatch.setenv("AWS_ACCESS_KEY_ID", OTHER_KEY))
    assert (place / "a").read() == b"a"
    timer.join()
    err = capsys.readouterr().err.splitlines()
    assert err == [
        f"waiting: {place}/a cannot be read: ExpiredToken (The provided token has expired)",
        "going on: the store answers again",
    ]
    (place / "b").write(b"b")
    assert capsys.readouterr().err == ""


def test_credentials_of_a_file_that_is_written_anew(
    bucket: str, faulty_s3: Callable[..., FaultyS3], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a tool does that keeps signing in."""
    file = tmp_path / "credentials"

    def sign_in(key: str) -> None:
        file.write_text(
            f"[default]\n[lab]\naws_access_key_id = {key}\naws_secret_access_key = {SECRET}\naws_session_token = t\n"
        )

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    sign_in(KEY_ID)
    proxy, place = faulty_s3(), open_place(bucket)
    place.backend.check_writable()
    proxy.rules(expired=[KEY_ID])
    timer = in_a_while(proxy, lambda: sign_in(OTHER_KEY))
    (place / "a").write(b"a")
    timer.join()
    assert (place / "a").read() == b"a"
    assert proxy.counts()["expired"] > 1


def test_credentials_that_are_never_renewed(
    expiring: tuple[Place, FaultyS3], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, proxy = expiring
    monkeypatch.setenv("GRANARY_PATIENCE_S", "1.5")
    proxy.rules(expired=[KEY_ID])
    words = (
        rf"^{place}/a cannot be read: ExpiredToken \(The provided token has expired\); tried again for [12] s\. "
        "What is committed stays: put that right and run the same command again$"
    )
    with pytest.raises(Unreachable, match=words) as caught:
        (place / "a").read()
    assert SECRET not in str(caught.value)
    assert capsys.readouterr().err.count("\n") == 1


def test_many_threads_say_it_once(expiring: tuple[Place, FaultyS3], capsys: pytest.CaptureFixture[str]) -> None:
    place, proxy = expiring
    proxy.rules(expired=[KEY_ID])
    threads = [threading.Thread(target=lambda: [(place / "a").read() for _ in range(5)]) for _ in range(16)]
    for thread in threads:
        thread.start()
    timer = in_a_while(proxy, lambda: proxy.rules(expired=[]))
    for thread in [*threads, timer]:
        thread.join()
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["waiting", "going on"]


def test_a_process_with_a_supervisor_waits_from_its_first_request(
    bucket: str, faulty_s3: Callable[..., FaultyS3], capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str | None] = []
    (open_place(bucket) / "a").write(b"a")
    proxy = faulty_s3(expired=[KEY_ID])
    timer = in_a_while(proxy, lambda: proxy.rules(expired=[]))
    assert (open_place(bucket, waiting=told.append) / "a").read() == b"a"
    timer.join()
    (first, second) = told
    assert first is not None
    assert "ExpiredToken" in first
    assert second is None
    assert capsys.readouterr().err == ""


def test_what_was_never_allowed_is_not_waited_for(expiring: tuple[Place, FaultyS3]) -> None:
    """Reading was, so that the credentials are sound; writing was not, by this process."""
    place, proxy = expiring
    fresh = open_place(str(place))
    fresh.names()
    proxy.rules(read_only=True)
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"cannot be written: AccessDenied \(Access Denied\)$"):
        (fresh / "b").write(b"b")
    assert time.monotonic() - started < 10  # and not for GRANARY_PATIENCE_S
    timer = in_a_while(proxy, lambda: proxy.rules(read_only=False))
    (place / "b").write(b"b")  # this one has written before
    timer.join()


def test_the_pauses_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pure of any server: how often a request is made, and when it is given up."""
    slept: list[float] = []
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr(patience.time, "sleep", sleep)
    monkeypatch.setattr(patience.time, "monotonic", lambda: now)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 20.0)
    monkeypatch.setenv("GRANARY_PATIENCE_S", "600")

    def fail() -> None:
        raise Passing("the disk of the sea")

    with pytest.raises(Unreachable, match=r"^the disk of the sea$"):
        Patience().call(fail, "read")
    assert 5 <= len(slept) <= 8
    assert sum(slept) <= patience.FIRST_PATIENCE_S
    known = Patience()
    known.call(lambda: None, "read")
    slept.clear()
    with pytest.raises(Unreachable, match="tried again for"):
        known.call(fail, "write")
    assert 500 < sum(slept) <= 600
    assert max(slept) <= 20
    slept.clear()

    def deny() -> None:
        raise Denied("not you")

    with pytest.raises(Unreachable, match=r"^not you$"):
        known.call(deny, "write")
    assert slept == []


def test_an_outage_is_said_once_for_all_who_wait(capsys: pytest.CaptureFixture[str]) -> None:
    outage = Outage()
    for who, failure in [("a", None), ("a", "no network"), ("b", "no answer"), ("a", None), ("a", "no network")]:
        outage.heard(who, failure)
    assert capsys.readouterr().err == "waiting: no network\n"
    outage.heard("b", None)
    assert capsys.readouterr().err == ""
    outage.heard("a", None)
    outage.heard("a", None)
    assert capsys.readouterr().err == "going on: the store answers again\n"
    outage.heard("a", "a pulse from before")
    outage.heard("a", None)
    assert capsys.readouterr().err == ""
    outage.heard("a", "no network again")
    time.sleep(patience.SAID_AFTER_S)
    outage.heard("a", "no network again")
    outage.heard("a", "no network again")
    assert capsys.readouterr().err == "waiting: no network again\n"


def test_reads_that_work_do_not_end_the_wait_of_a_write(capsys: pytest.CaptureFixture[str]) -> None:
    patience = Patience()
    patience.call(lambda: None, "write")
    over = threading.Event()

    def write() -> None:
        if not over.is_set():
            raise Passing("no writes today")

    writer = threading.Thread(target=lambda: patience.call(write, "write"))
    writer.start()
    for _ in range(10):
        time.sleep(0.1)
        patience.call(lambda: None, "read")
    over.set()
    writer.join()
    assert capsys.readouterr().err == "waiting: no writes today\ngoing on: the store answers again\n"
