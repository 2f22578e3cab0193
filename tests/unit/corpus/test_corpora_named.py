"""Datasets by name whose server is busy or breaks off: every record comes once, in the order of the stream.

The name is that of a folder whose README gives the files' URLs, so that `datasets` streams them from a real server."""

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import plan
from web import Spoil, Web

from pipeline.corpus.formats.named import NamedDataset
from pipeline.corpus.formats.records import Columns
from pipeline.corpus.sources import retry as patience
from pipeline.corpus.sources.retry import Unread

SHARDS, RECORDS = 3, 700
RESET, BUSY = Spoil(after=500), Spoil(status=503)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_RETRY_INTERVAL", 0)


def shard(number: int, ending: str) -> bytes:
    numbers = range(number * RECORDS, (number + 1) * RECORDS)
    records = [{"text": f"the grain of field {n} was carried over the river", "n": n} for n in numbers]
    if ending == "jsonl":
        return "".join(json.dumps(record) + "\n" for record in records).encode()
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), out, row_group_size=100)
    return out.getvalue()


@pytest.fixture(params=["jsonl", "parquet"])
def name(request: pytest.FixtureRequest, web: Web, tmp_path: Path) -> str:
    """The name of a dataset of three files on the server."""
    folder = tmp_path / "named"
    folder.mkdir()
    files = [f"part-{number}.{request.param}" for number in range(SHARDS)]
    web.files |= {file: shard(number, request.param) for number, file in enumerate(files)}
    listed = "\n".join(f"  - {web.url}/{file}" for file in files)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}\n---\n")
    return str(folder)


def stream(name: str) -> Iterator[int]:
    dataset = NamedDataset(name, None, "train", Columns("text", "text", ("n",)))
    for chunk in dataset.chunks():
        assert chunk.contents[0] == f"the grain of field {chunk.labels['n'][0].as_py()} was carried over the river"
        yield from chunk.labels["n"].to_pylist()


def spoiled(web: Web, monkeypatch: pytest.MonkeyPatch, healthy: int, spoils: list[Spoil]) -> None:
    """Spoil requests once the dataset is opened. (Whether a URL is there, fsspec asks in a way that takes a busy server
    for no; the hub is asked otherwise.)"""
    opened = NamedDataset._open

    def then_spoiled(self: NamedDataset) -> Any:
        dataset = opened(self)
        web.healthy, web.spoils = healthy, list(spoils)
        return dataset

    monkeypatch.setattr(NamedDataset, "_open", then_spoiled)


def test_a_dataset_is_streamed(name: str) -> None:
    assert list(stream(name)) == list(range(SHARDS * RECORDS))


@pytest.mark.parametrize("healthy", range(3))
@pytest.mark.parametrize("spoil", [RESET, BUSY, Spoil(status=429), Spoil(status=408)])
def test_it_goes_on_after_every_interruption(
    name: str, web: Web, monkeypatch: pytest.MonkeyPatch, healthy: int, spoil: Spoil
) -> None:
    spoiled(web, monkeypatch, healthy, [spoil, spoil, BUSY, RESET])
    assert list(stream(name)) == list(range(SHARDS * RECORDS))
    assert not web.spoils


@pytest.mark.parametrize("is_exact", [True, False])
def test_records_that_came_are_neither_lost_nor_doubled(
    name: str, monkeypatch: pytest.MonkeyPatch, is_exact: bool
) -> None:
    """Interrupted in the middle of files and of what is read at once, again and again; also where the library's state
    is not exactly where the stream was."""
    stops = itertools.cycle((137, 300, 513, 256, 1, 257, 700))
    whole = datasets.IterableDataset.__iter__
    times = itertools.count()

    def breaking(self: Any) -> Iterator[Any]:
        next(times)
        stop = next(stops)
        for count, record in enumerate(whole(self)):
            if count == stop:
                raise ConnectionResetError("in the middle")
            yield record

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", breaking)
    if not is_exact:
        monkeypatch.setattr(datasets.IterableDataset, "load_state_dict", lambda self, state: None)
    if not is_exact:
        stops = itertools.chain((137, 300, 513, 600, 900, 1100, 1500, 1900), itertools.repeat(10**6))
    assert list(stream(name)) == list(range(SHARDS * RECORDS))
    assert next(times) > 4


def test_a_kind_of_stream_that_cannot_tell_where_it_is(name: str, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_state(self: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(datasets.IterableDataset, "state_dict", no_state)
    spoiled(web, monkeypatch, 1, [RESET, BUSY])
    assert list(stream(name)) == list(range(SHARDS * RECORDS))


def test_a_long_outage_ends_and_says_how_far_it_came(
    name: str, web: Web, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRANARY_PATIENCE_S", "0.1")
    numbers = stream(name)
    taken = list(itertools.islice(numbers, RECORDS))
    web.down = BUSY
    with pytest.raises(Unread, match=r"the dataset .*named cannot be read: .*; it gave [1-9][\d,]+ records\."):
        taken += numbers
    with pytest.raises(Unread, match=r"it gave 0 records\..*Planning had found 0 of 1,000 rows by then; nothing was"):
        plan(name, llama, format="datasets", rows=1000)


def test_files_that_are_gone_end_it_too(name: str, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANARY_PATIENCE_S", "0.1")
    numbers = stream(name)
    next(numbers)
    for file in list(web.files)[1:]:
        del web.files[file]
    with pytest.raises(Unread, match=r"the dataset .*named cannot be read: .*; it gave \d+ records"):
        list(numbers)


def test_a_mistake_in_the_data_is_said_at_once(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {web.url}/a.jsonl\n---\n"
    )
    web.files["a.jsonl"] = b'{"text": "one", "n": 0}\n{"text": '
    with pytest.raises(Unread, match=r"the dataset .* cannot be read: .*; it gave \d+ records"):
        list(stream(str(tmp_path)))
    assert "waiting" not in capsys.readouterr().err
