"""Corpus files at URLs: read through interruptions, told by their versions, noticed when they change."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import Records, ensure_rows, read_corpus
from s3 import FaultyS3, S3Server
from web import Spoil, Web

from pipeline.corpus.formats.open import open_corpus
from pipeline.corpus.formats.records import Columns
from pipeline.corpus.sources import files as corpus_files
from pipeline.corpus.sources import remote
from pipeline.corpus.sources import retry as patience
from pipeline.corpus.sources.files import CorpusFile, find_files, fingerprint
from pipeline.corpus.sources.retry import Unread
from pipeline.errors import InputError
from storage.errors import StoreMismatch
from storage.store import Store
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import ModelSettings

ANY = [".parquet", ".jsonl", ".jsonl.gz"]
TEXTS = [f"the grain of field {i} was carried over the river" for i in range(20_000)]
RESET, BUSY = Spoil(after=1000), Spoil(status=503)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.01)


def parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), out, row_group_size=2000, compression="none")
    return out.getvalue()


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)).encode()


CONTENTS = {"c.parquet": parquet(TEXTS), "c.jsonl": lines(TEXTS), "c.jsonl.gz": gzip.compress(lines(TEXTS), 1)}


def texts_of(found: Records) -> list[str]:
    return [text.decode() if isinstance(text, bytes) else text for text in found.contents]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("spoils", [[RESET], [BUSY], [Spoil(status=429), RESET, Spoil(status=408), BUSY, RESET]])
def test_a_file_is_read_on_after_interruptions(web: Web, name: str, spoils: list[Spoil]) -> None:
    web.files[name] = CONTENTS[name]
    corpus = open_corpus(f"{web.url}/{name}", Columns("text", "text", ()))
    web.spoils = list(spoils)
    assert texts_of(read_corpus(f"{web.url}/{name}")) == TEXTS
    assert not web.spoils
    web.healthy, web.spoils = 2, list(spoils)  # in the middle
    found = [text for piece in corpus.pieces() for chunk in corpus.chunks(piece) for text in chunk.contents]
    assert [text.decode() if isinstance(text, bytes) else text for text in found] == TEXTS


@pytest.mark.parametrize("name", CONTENTS)
def test_an_outage_that_lasts_ends_in_a_sentence(web: Web, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANARY_PATIENCE_S", "0.1")
    web.files[name] = CONTENTS[name]
    corpus = open_corpus(f"{web.url}/{name}", Columns("text", "text", ()))
    pieces = corpus.pieces()
    web.down = BUSY
    with pytest.raises(Unread, match=rf"{name} cannot be read: HTTP 503 \(Service Unavailable\); tried again for"):
        next(corpus.chunks(pieces[-1]))


def test_how_far_a_file_came_is_said(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANARY_PATIENCE_S", "0.1")
    web.files["c.jsonl"] = b"x" * (12 * 2**20)
    (file,) = find_files(f"{web.url}/c.jsonl", ANY)
    with file.open() as handle:
        handle.read(10)
        web.down = Spoil(status=502)
        with pytest.raises(Unread, match=r"HTTP 502 .*[1-9][\d,]+ of its 12,582,912 bytes were read"):
            handle.read()


def test_a_busy_server_is_not_an_empty_place(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files["c.jsonl"] = CONTENTS["c.jsonl"]
    web.spoils = [BUSY, Spoil(status=500)]
    web.healthy = 0
    monkeypatch.setattr(Web, "next_spoil", lambda self, method: self.spoils.pop(0) if self.spoils else self.down)
    assert [file.name for file in find_files(f"{web.url}/c.jsonl", ANY)] == ["c.jsonl"]
    monkeypatch.setenv("GRANARY_PATIENCE_S", "0.1")
    web.down = BUSY
    with pytest.raises(Unread, match=r"c\.jsonl cannot be read: HTTP 503"):
        find_files(f"{web.url}/c.jsonl", ANY)
    web.down = Spoil(status=403)
    with pytest.raises(InputError, match=r"c\.jsonl cannot be read: HTTP 403 \(Forbidden\)"):
        find_files(f"{web.url}/c.jsonl", ANY)
    with pytest.raises(InputError, match="no file matches"):
        find_files(f"{web.url}/other.jsonl", ANY)


def test_a_listing_in_html_gives_sizes_and_versions(web: Web) -> None:
    web.files |= {"data/a.jsonl": lines(TEXTS[:3]), "data/b.jsonl": lines(TEXTS[3:5])}
    for pattern in (f"{web.url}/data/", f"{web.url}/data/*.jsonl"):
        found = find_files(pattern, ANY)
        assert [(file.name, file.num_bytes) for file in found] == [
            (name.removeprefix("data/"), len(content)) for name, content in web.files.items()
        ]
        assert all(file.version for file in found)


def test_a_server_without_ranges_is_read_from_the_beginning(web: Web) -> None:
    web.ranges = False
    web.files["c.jsonl"] = lines(TEXTS * 6)  # more than fsspec reads ahead
    assert len(web.files["c.jsonl"]) > 6 * 2**20
    assert texts_of(read_corpus(f"{web.url}/c.jsonl")) == TEXTS * 6


def test_a_server_that_tells_no_size_is_refused(web: Web) -> None:
    web.lengths = False
    web.files["c.jsonl"] = CONTENTS["c.jsonl"]
    with pytest.raises(InputError, match=r"c\.jsonl does not say how many bytes it has; download it"):
        find_files(f"{web.url}/c.jsonl", ANY)


@pytest.mark.parametrize("version", ["etags", "dates"])
def test_a_remote_file_is_told_by_its_version_and_not_fetched(web: Web, version: str) -> None:
    setattr(web, {"etags": "dates", "dates": "etags"}[version], False)
    web.files["c.parquet"] = bytes(40 * 2**20)
    found = find_files(f"{web.url}/c.parquet", ANY)
    before = fingerprint(found)
    assert web.sent == 0
    assert before == {"files": 1, "bytes": 40 * 2**20, "versions": before["versions"]}
    assert fingerprint(find_files(f"{web.url}/c.parquet", ANY)) == before
    web.files["c.parquet"] = bytes(40 * 2**20 - 1) + b"x"
    assert fingerprint(find_files(f"{web.url}/c.parquet", ANY)) != before


def test_without_a_version_samples_are_fetched_and_nothing_else(web: Web, tmp_path: Path) -> None:
    web.etags = web.dates = False
    content = bytes(range(256)) * (80 * 2**12)
    web.files["c.parquet"] = content
    found = find_files(f"{web.url}/c.parquet", ANY)
    sampled = corpus_files.SAMPLED_BYTES * (corpus_files.SAMPLED_BLOCKS + 1)
    (tmp_path / "c.parquet").write_bytes(content)
    local = [CorpusFile(str(tmp_path / "c.parquet"), len(content))]
    assert fingerprint(found) == fingerprint(local)
    assert web.sent <= sampled + 2**16


def test_a_weak_tag_is_the_same_version() -> None:
    class Http:
        protocol = ("http", "https")

    assert remote.version_of(Http, {"ETag": 'W/"a-1"'}) == remote.version_of(Http, {"etag": '"a-1"'}) == "etag a-1"
    assert remote.version_of(Http, {"content_md5": b"\x01\xff"}) == "content_md5 01ff"
    assert remote.version_of(Http, {"size": 3, "ETag": ""}) == ""
    assert remote.is_version("etag a-1", {"ETag": '"a-1"', "md5Hash": "x"})
    assert not remote.is_version("etag a-1", {"etag": '"a-2"'})
    assert remote.is_version("md5hash x", {"etag": '"a-2"'})  # it does not say now


def test_a_file_that_changes_while_it_is_read_is_noticed(web: Web) -> None:
    web.files["c.jsonl"] = lines(TEXTS * 6)
    (file,) = find_files(f"{web.url}/c.jsonl", ANY)
    with file.open() as handle:
        handle.read(10)
        web.files["c.jsonl"] = lines(TEXTS * 6)[:-2] + b" \n"
        web.spoils = [BUSY]
        with pytest.raises(Unread, match=r"c\.jsonl has changed since the corpus was looked at"):
            handle.read()
    with pytest.raises(Unread, match="has changed since"), file.open() as handle:
        handle.read(10)


# ---- stores


def made(place: Path, url: str, model: Path, **settings: Any) -> tuple[Store, bool]:
    corpus = CorpusSettings(path=(url,), rows_per_unit=1024, context=64, **settings)
    return ensure_rows(place, corpus, ModelSettings(id=str(model)))


def test_a_store_goes_on_while_its_remote_files_are_the_same(web: Web, llama: Path, tmp_path: Path) -> None:
    web.files["c.jsonl"] = lines(TEXTS[:200])
    url = f"{web.url}/c.jsonl"
    store, is_new = made(tmp_path / "store", url, llama)
    assert is_new
    assert "versions" in store.info.plan["source"][0]
    sent = web.sent
    assert not made(tmp_path / "store", url, llama)[1]
    assert web.sent == sent
    web.files["c.jsonl"] = lines(TEXTS[1:201])
    with pytest.raises(StoreMismatch, match=r"corpus\.path"):
        made(tmp_path / "store", url, llama)


def test_a_store_planned_by_content_goes_on(
    web: Web, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As stores are that were made before versions were told."""
    web.files["c.jsonl"] = lines(TEXTS[:200])
    url = f"{web.url}/c.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(remote, "version_of", lambda system, about: "")
        store, _ = made(tmp_path / "store", url, llama, rows=1000)
    assert "sha256" in store.info.plan["source"][0]
    assert not made(tmp_path / "store", url, llama, rows=1000)[1]
    corpus = CorpusSettings(path=(url,), rows_per_unit=1024, context=64, rows=1500)
    grown, _ = ensure_rows(tmp_path / "store", corpus, ModelSettings(id=str(llama)), grow=True)
    assert grown.num_rows == 1500
    assert "versions" in grown.info.plan["source"][0]
    assert not made(tmp_path / "store", url, llama, rows=1500)[1]


def test_planning_that_fails_says_how_far_it_came(
    web: Web, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANARY_PATIENCE_S", "0.1")
    web.files |= {"a.jsonl": lines(TEXTS[:200]), "b.jsonl": lines(TEXTS * 6)}
    corpus = CorpusSettings(path=(f"{web.url}/a.jsonl", f"{web.url}/b.jsonl"), context=64)
    from pipeline.corpus.formats.json_lines import JsonLines

    read = JsonLines.read

    def then_down(self: Any, file: CorpusFile, piece: Any) -> Any:
        if file.name == "b.jsonl":
            web.down = BUSY
        yield from read(self, file, piece)

    monkeypatch.setattr(JsonLines, "read", then_down)
    with pytest.raises(Unread, match=r"b\.jsonl cannot be read: .*Planning had found [1-9][\d,]+ rows by then"):
        ensure_rows(tmp_path / "store", corpus, ModelSettings(id=str(llama)))
    assert not (tmp_path / "store").exists()


# ---- S3


def put(bucket: str, name: str, content: bytes) -> str:
    import fsspec

    with fsspec.open(f"{bucket}/{name}", "wb") as handle:
        handle.write(content)
    return f"{bucket}/{name}"


@pytest.fixture
def fresh_s3() -> Any:
    """s3fs keeps its file systems and what it has listed."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_object_is_told_by_its_tag(s3: S3Server, bucket: str, fresh_s3: None) -> None:
    import s3fs

    url = put(bucket, "c.jsonl", lines(TEXTS[:100]))
    put(bucket, "same.jsonl", lines(TEXTS[:100]))
    found = find_files(url, ANY)
    assert "versions" in fingerprint(found)
    assert fingerprint(found) == fingerprint(find_files(f"{bucket}/same.jsonl", ANY))
    assert texts_of(read_corpus(url)) == TEXTS[:100]
    put(bucket, "c.jsonl", lines(TEXTS[1:101]))
    s3fs.S3FileSystem.clear_instance_cache()
    assert fingerprint(find_files(url, ANY)) != fingerprint(found)
    with pytest.raises(Unread, match="has changed since"), found[0].open() as handle:
        handle.read(1)


@pytest.mark.slow
def test_objects_are_read_through_a_server_s_failures(
    s3: S3Server, bucket: str, faulty_s3: Callable[..., FaultyS3], fresh_s3: None
) -> None:
    url = put(bucket, "c.parquet", CONTENTS["c.parquet"])
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    proxy = faulty_s3(rate=0.3, seed=3, kinds=["slowdown", "error", "reset", "cut"])
    assert texts_of(read_corpus(url)) == TEXTS
    assert sum(proxy.counts().values()) > proxy.counts()["forwarded"]
