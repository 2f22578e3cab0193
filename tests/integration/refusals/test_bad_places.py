"""Places where no store can be: found within seconds, before a model is read or Ray is started, in one sentence."""

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Lab
from s3 import KEY_ID, SECRET, FaultyS3, S3Server

from storage.backends.place import open_place

pytestmark = pytest.mark.usefixtures("no_ray")
QUICKLY_S = 10


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a model's files, or those of the corpus, fails the test."""

    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the place was to be looked at first")

    monkeypatch.setattr("jobs.run.describe_model", read)
    monkeypatch.setattr("workers.plan.source.open_source", read)


def refused(lab: Lab, store: str, verb: str = "harvest") -> str:
    started = time.monotonic()
    message = lab.refused(verb, lab.spec({"store": store}))
    assert time.monotonic() - started < QUICKLY_S
    assert SECRET not in message
    return message


@pytest.mark.usefixtures("no_model", "s3")
@pytest.mark.parametrize("verb", ["harvest", "run", "anchors", "train", "evaluate"])
def test_a_bucket_that_does_not_exist(lab: Lab, verb: str) -> None:
    sections = {"anchors": {"name": "a", "by": "language"}, "corpus.holdout": 0.3}
    dictionary = {"name": "sae", "input": ["resid_post.1"], "latents": 64}
    spec = lab.spec({"store": "s3://nobody-has-this/acts", **sections, "train": {"dictionaries": [dictionary]}})
    assert "s3://nobody-has-this/acts cannot be used: there is no such bucket; make it" in lab.refused(verb, spec)


@pytest.mark.usefixtures("no_model")
def test_a_folder_that_takes_no_files(lab: Lab) -> None:
    message = refused(lab, "/proc/eyes/acts")
    assert "the store at /proc/eyes/acts cannot be written: " in message
    assert "when a file was to be made in /proc; make that writable" in message


def test_plan_refuses_what_harvest_would(lab: Lab, bucket: str, faulty_s3: Callable[..., FaultyS3]) -> None:
    (lab.folder / "a.parquet").write_text("x")
    (lab.folder / "taken").mkdir()
    (lab.folder / "taken" / "notes.txt").write_text("x")
    faulty_s3(read_only=True)
    for store, words in [
        ("/proc/eyes/acts", "when a file was to be made in /proc"),
        (str(lab.folder / "a.parquet" / "x"), "a.parquet is a file; a store is a folder"),
        (str(lab.folder / "taken"), "taken is not an empty folder (it holds notes.txt)"),
        (f"{bucket}/acts", f"{bucket}/acts cannot be written: AccessDenied (Access Denied)"),
    ]:
        for verb in ("plan", "harvest"):
            assert words in refused(lab, store, verb)
    assert open_place(bucket).names() == []


def test_plan_refuses_a_disk_without_room(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(lab.folder)
    monkeypatch.setattr("jobs.preflight.shutil.disk_usage", lambda path: usage._replace(free=1000))
    for verb in ("plan", "harvest"):
        assert "is too full: the harvest needs 816.0 KiB and 1000 B are free" in refused(lab, str(lab.store), verb)


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("verb", ["status", "report", "plan"])
def test_reading_from_a_bucket_that_does_not_exist(lab: Lab, verb: str) -> None:
    what = lab.spec({"store": "s3://nobody-has-this/acts"}) if verb == "plan" else "s3://nobody-has-this/acts"
    assert "there is no such bucket" in lab.refused(verb, what)


@pytest.mark.usefixtures("s3")
def test_a_store_that_does_not_exist(lab: Lab, bucket: str) -> None:
    assert f"no store at {bucket}/acts: `granary harvest SPEC` makes one" in lab.refused("status", f"{bucket}/acts")


@pytest.mark.usefixtures("no_model")
def test_a_bucket_that_cannot_be_written(lab: Lab, bucket: str, faulty_s3: Callable[..., FaultyS3]) -> None:
    faulty_s3(read_only=True)
    message = refused(lab, f"{bucket}/acts")
    assert f"{bucket}/acts cannot be written: AccessDenied (Access Denied)\n" in message
    assert open_place(bucket).names() == []


@pytest.mark.usefixtures("no_model")
def test_a_server_that_does_not_know_create_only(lab: Lab, bucket: str, faulty_s3: Callable[..., FaultyS3]) -> None:
    faulty_s3(deaf=True)
    assert "its server replaces objects that were to be created only once" in refused(lab, f"{bucket}/acts")
    assert open_place(bucket).names() == []


@pytest.mark.usefixtures("no_model")
def test_credentials_that_are_over(lab: Lab, bucket: str, faulty_s3: Callable[..., FaultyS3]) -> None:
    faulty_s3(expired=[KEY_ID])
    assert "ExpiredToken (The provided token has expired)" in refused(lab, bucket)


@pytest.mark.usefixtures("no_model", "s3")
def test_no_credentials(lab: Lab, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert "there are no credentials in the environment" in refused(lab, bucket)


@pytest.mark.usefixtures("no_model", "s3")
def test_a_profile_without_keys(lab: Lab, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    file = tmp_path.parent / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    assert f"the profile 'lab' has no keys in {file}" in refused(lab, bucket)
    file.write_text(f"{SECRET}\n[lab\n")
    assert f"the credentials file {file} cannot be read" in refused(lab, bucket)


@pytest.fixture
def silence() -> Iterator[str]:
    """An endpoint that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.usefixtures("no_model", "s3")
def test_an_endpoint_that_says_nothing(lab: Lab, silence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", silence)
    at = silence.removeprefix("http://")
    assert f"s3://bucket/acts cannot be read: the server at {at} does not answer (" in refused(lab, "s3://bucket/acts")


@pytest.mark.slow
@pytest.mark.usefixtures("no_model", "s3")
@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid:9000", "http://192.0.2.1:9000"]
)
def test_an_endpoint_that_is_not_there(lab: Lab, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    at = endpoint.removeprefix("http://")
    assert f"s3://bucket/acts cannot be read: the server at {at} does not answer (" in refused(lab, "s3://bucket/acts")


@pytest.mark.usefixtures("no_model", "s3")
@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("store", f"s3://{KEY_ID}:{SECRET}@bucket/acts"),
        ("store", f"s3://bucket/acts?secret={SECRET}"),
        ("corpus.path", f"s3://{KEY_ID}:{SECRET}@bucket/corpus.parquet"),
        ("corpus.path", f"https://host/corpus.parquet?X-Amz-Signature={SECRET}"),
        ("model.id", f"https://user:{SECRET}@host/model"),
    ],
)
@pytest.mark.parametrize("verb", ["harvest", "plan", "submit"])
def test_credentials_in_a_spec(lab: Lab, verb: str, key: str, url: str) -> None:
    message = lab.refused(verb, lab.spec({key: url}))
    assert f"{key}: the URL {url.partition('://')[0]}://... carries credentials or options" in message
    assert SECRET not in message


def test_a_store_that_stops_answering_while_it_is_read(
    lab: Lab, s3: S3Server, harvested_on_s3: str, faulty_s3: Callable[..., FaultyS3], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANARY_PATIENCE_S", "1")
    proxy = faulty_s3()
    lab.run("status", harvested_on_s3)
    proxy.rules(expired=[KEY_ID])
    assert "ExpiredToken (The provided token has expired)" in lab.refused("status", harvested_on_s3)


@pytest.fixture
def harvested_on_s3(bucket: str, llama: Path, corpus: Path) -> str:
    from conftest import harvest

    url: Any = f"{bucket}/acts"
    return harvest(url, llama, corpus, ["resid_post.1"]).url
